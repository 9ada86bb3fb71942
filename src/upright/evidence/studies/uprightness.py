"""A spatial transformer trained by classification alone turns things upright only in part; the upright loss makes it.

Protocol: the digits (1,797 images) of configs/data/digits.yaml, in training turned at random by up to 60 degrees,
scaled by up to a tenth and moved a little; every test image at -60, -30, 0, 30 and 60 degrees; LeNet alone, behind an
affine transformer, and with the upright loss (weight 2); 60 epochs. One split; the seeds change weights, order and
augmentation; the checkpoint of the least validation loss.

It holds if every run with the upright loss has a lower uprightness (0: perfectly upright, 1: not turned at all) than
every run without.
"""

from functools import partial

from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, means, measured, panels, rows, spreads
from upright.training.losses import CrossEntropy

TITLES = {"lenet": "LeNet", "transformer": "spatial transformer", "upright": "with the upright loss"}


def run(bench: Bench) -> Finding:
    """Train LeNet alone, and behind each of two transformers."""
    fraction, angles = bench.choose((0.1, (-60, 60)), (1.0, (-60, -30, 0, 30, 60)))
    affine = partial(RandomAffine, rotate=60, scale=(0.9, 1.1), shift=0.05)
    data = partial(Digits, train_fraction=fraction, angles=angles, augment=[affine])
    lenet = Experiment(LENET, data, bench.choose(1, 60), loss=partial(CrossEntropy, label_smoothing=0.1))
    transformer = lenet._replace(network=transformed("affine"))
    upright = transformer._replace(upright_weight=2.0)
    runs = bench.train({"lenet": lenet, "transformer": transformer, "upright": upright})
    accuracy, uprightness = measured(runs, "test/accuracy"), measured(runs, "test/uprightness")
    held = max(uprightness["upright"]) < min(uprightness["transformer"])
    mean = means(uprightness)
    sentence = (
        f"The upright loss {'makes' if held else 'does not clearly make'} the transformer turn things upright: "
        f"uprightness {mean['transformer']:.3f} -> {mean['upright']:.3f} "
        f"({'every' if held else 'not every'} run with it is below every run without it)."
    )
    columns = {"test accuracy": spreads(accuracy), "uprightness": spreads(uprightness, 3)}
    figure, axes = panels(2)
    plots = {"test accuracy": accuracy, "uprightness": uprightness}
    for axis, (name, groups) in zip(axes, plots.items(), strict=True):
        draw_points(axis, {TITLES[key].replace(" ", "\n", 1): groups[key] for key in groups}, name)
    axes[1].set_ylim(bottom=0)
    numbers = {"test/accuracy": accuracy, "test/uprightness": uprightness}
    return Finding(held, sentence, rows("network", TITLES, columns), figure, numbers)
