"""A spatial transformer that votes is more upright, at any angle, than transformers that regress their parameters.

Protocol: The data are the digits of configs/data/digits_rotated.yaml (1,797 images). Training images are randomly
rotated by any angle, scaled by up to a tenth and shifted slightly. Every test image has nine angles, 40 degrees apart.
Train LeNet alone and behind five transformers, for 60 epochs each. The first is affine, as in the paper. The second is
affine, with the upright loss (weight 2). The third regresses the direction of a rotation, with the upright loss. The
fourth votes for a rotation on a polar grid, without a loss for its pose, as in configs/stn_lenet.yaml. The fifth does
the same with the upright loss and the identity prior (weight 1 each). Test the checkpoint with the lowest validation
loss. There is one split; the seeds change weights, order and augmentation.

The claim holds if every run with votes has a lower uprightness (0: all images upright, 1: no rotation) than every run
of the other transformers.

The weights of the losses with votes were chosen by validation data, one seed each.
"""

from functools import partial

from upright.architectures.voting import PolarLocaliser
from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, means, metric, panels, rows, spreads
from upright.training.losses import CrossEntropy

TITLES = {
    "lenet": "LeNet",
    "affine": "affine, as in the paper",
    "affine-upright": "affine, upright loss",
    "direction": "direction, upright loss",
    "votes": "votes",
    "votes-prior": "votes, upright loss and prior",
}
VOTES = ("votes", "votes-prior")


def run(bench: Bench) -> Finding:
    fraction, angles = bench.choose((0.1, (-120, 0, 120)), (1.0, (-160, -120, -80, -40, 0, 40, 80, 120, 160)))
    affine = partial(RandomAffine, rotate=180, scale=(0.9, 1.1), shift=0.05)
    data = partial(Digits, train_fraction=fraction, angles=angles, augment=[affine])
    lenet = Experiment(LENET, data, bench.choose(1, 60), loss=partial(CrossEntropy, label_smoothing=0.1))
    textbook = lenet._replace(network=transformed("affine"))
    votes = lenet._replace(network=transformed("rotation", localiser=PolarLocaliser))
    experiments = {
        "lenet": lenet,
        "affine": textbook,
        "affine-upright": textbook._replace(upright_weight=2.0),
        "direction": lenet._replace(network=transformed("rotation"), upright_weight=2.0),
        "votes": votes,
        "votes-prior": votes._replace(upright_weight=1.0, prior_weight=1.0),
    }
    runs = bench.train(experiments)
    accuracy, uprightness, relative, absolute = (
        metric(runs, f"test/{name}")
        for name in ("accuracy", "uprightness", "relative_degrees_median", "absolute_degrees_median")
    )
    worst = max(max(uprightness[name]) for name in VOTES)
    best = min(min(values) for name, values in uprightness.items() if values and name not in VOTES)
    mean = means(uprightness)
    sentence = (
        f"The uprightness is {mean['votes']:.3f} with votes, and {mean['votes-prior']:.3f} with votes and both losses. "
        f"It is {mean['affine']:.3f} for the paper's transformer, {mean['affine-upright']:.3f} with the upright loss, "
        f"and {mean['direction']:.3f} for a regressed direction."
    )
    columns = {
        "test accuracy": spreads(accuracy),
        "uprightness": spreads(uprightness, 3),
        "relative, degrees (median)": spreads(relative, 1),
        "absolute, degrees (median)": spreads(absolute, 1),
    }
    figure, axes = panels(2, width=5)
    draw_points(axes[0], accuracy, "test accuracy", TITLES)
    draw_points(axes[1], uprightness, "uprightness", TITLES)
    axes[1].set_ylim(bottom=0)
    numbers = {
        "test/accuracy": accuracy,
        "test/uprightness": uprightness,
        "test/relative_degrees_median": relative,
        "test/absolute_degrees_median": absolute,
    }
    return Finding(worst < best, sentence, rows("network", TITLES, columns), figure, numbers)
