"""Classification alone makes a spatial transformer upright only in part; the upright loss makes it more upright.

Protocol: The data are the digits of configs/data/digits.yaml (1,797 images). Training images are randomly rotated by up
to 60 degrees, scaled by up to a tenth and shifted slightly. Every test image has the angles -60, -30, 0, 30 and 60
degrees. Train LeNet alone, LeNet behind an affine transformer, and the same with the upright loss (weight 2), for 60
epochs each. Test the checkpoint with the lowest validation loss. There is one split; the seeds change weights, order
and augmentation.

The claim holds if every run with the upright loss has a lower uprightness (0: all images upright, 1: no rotation) than
every run without it.
"""

from functools import partial

from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, means, metric, panels, rows, spreads
from upright.training.losses import CrossEntropy

TITLES = {"lenet": "LeNet", "transformer": "spatial transformer", "upright": "with the upright loss"}


def run(bench: Bench) -> Finding:
    fraction, angles = bench.choose((0.1, (-60, 60)), (1.0, (-60, -30, 0, 30, 60)))
    affine = partial(RandomAffine, rotate=60, scale=(0.9, 1.1), shift=0.05)
    data = partial(Digits, train_fraction=fraction, angles=angles, augment=[affine])
    lenet = Experiment(LENET, data, bench.choose(1, 60), loss=partial(CrossEntropy, label_smoothing=0.1))
    transformer = lenet._replace(network=transformed("affine"))
    runs = bench.train(
        {"lenet": lenet, "transformer": transformer, "upright": transformer._replace(upright_weight=2.0)}
    )
    accuracy, uprightness = metric(runs, "test/accuracy"), metric(runs, "test/uprightness")
    held = max(uprightness["upright"]) < min(uprightness["transformer"])
    mean = means(uprightness)
    sentence = (
        f"The upright loss {'lowers' if held else 'does not clearly lower'} the uprightness, from "
        f"{mean['transformer']:.3f} to {mean['upright']:.3f} "
        f"({'every' if held else 'not every'} run with it is below every run without it)."
    )
    columns = {"test accuracy": spreads(accuracy), "uprightness": spreads(uprightness, 3)}
    figure, axes = panels(2)
    draw_points(axes[0], accuracy, "test accuracy", TITLES)
    draw_points(axes[1], uprightness, "uprightness", TITLES)
    axes[1].set_ylim(bottom=0)
    numbers = {"test/accuracy": accuracy, "test/uprightness": uprightness}
    return Finding(held, sentence, rows("network", TITLES, columns), figure, numbers)
