"""A spatial transformer trained by classification alone turns things upright only in part; the upright loss makes it.

Protocol: the digits (1,797 images) of configs/data/digits.yaml, in training turned at random by up to 60 degrees,
scaled by up to a tenth and moved a little; every test image at -60, -30, 0, 30 and 60 degrees; LeNet alone, behind an
affine transformer, and with the upright loss (weight 2); 60 epochs. One split; the seeds change weights, order and
augmentation; the checkpoint of the least validation loss.

It holds if every run with the upright loss has a lower uprightness (0: perfectly upright, 1: not turned at all) than
every run without.
"""

import statistics
from functools import partial

from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.evidence.bench import Bench, Experiment
from upright.evidence.plots import draw_points, panels
from upright.evidence.study import Finding, mean_and_spread, values
from upright.training.losses import CrossEntropy

MEASURED = ("accuracy", "uprightness")
TITLES = {"lenet": "LeNet", "transformer": "spatial transformer", "upright": "with the upright loss"}


def run(bench: Bench) -> Finding:
    """Train LeNet, and two transformers in front of it."""
    lenet = partial(LeNet, activation="relu", pooling="max")
    transformer = partial(SpatialTransformer, transform="affine", padding="border")
    fraction, angles = bench.choose((0.1, (-60, 60)), (1.0, (-60, -30, 0, 30, 60)))
    moved = partial(RandomAffine, rotate=60, scale=(0.9, 1.1), shift=0.05)
    turned = partial(Digits, train_fraction=fraction, angles=angles, augment=[moved])
    plain = Experiment(
        network=partial(TransformerNetwork, transformer=transformer, network=lenet),
        data=turned,
        epochs=bench.choose(1, 60),
        loss=partial(CrossEntropy, label_smoothing=0.1),
    )
    upright = plain._replace(upright_weight=2.0)
    runs = bench.train({"lenet": plain._replace(network=lenet), "transformer": plain, "upright": upright})
    accuracy, uprightness = ({key: values(runs[key], f"test/{name}") for key in runs} for name in MEASURED)
    held = max(uprightness["upright"]) < min(uprightness["transformer"])
    before, after = (statistics.mean(uprightness[key]) for key in ("transformer", "upright"))
    sentence = (
        f"The upright loss {'makes' if held else 'does not clearly make'} the transformer turn things upright: "
        f"uprightness {before:.3f} -> {after:.3f} "
        f"({'every' if held else 'not every'} run with it is below every run without it)."
    )
    table = [
        {
            "network": title,
            "test accuracy": mean_and_spread(accuracy[key]),
            "uprightness": mean_and_spread(uprightness[key], 3),
        }
        for key, title in TITLES.items()
    ]
    figure, axes = panels(2)
    draw_points(axes[0], {TITLES[key].replace(" ", "\n", 1): accuracy[key] for key in runs}, "test accuracy")
    draw_points(axes[1], {TITLES[key].replace(" ", "\n", 1): uprightness[key] for key in runs}, "uprightness")
    axes[1].set_ylim(bottom=0)
    return Finding(held, sentence, table, figure, {"test/accuracy": accuracy, "test/uprightness": uprightness})
