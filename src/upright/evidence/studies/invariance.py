"""A CNN is not invariant to rotation and scale; augmentation and transformers help within the range of training only.

Protocol: Train four networks on MNIST: LeNet (ReLU, max pooling) on the original images; LeNet on digits rotated by up
to 45 degrees and scaled by 0.8 to 1.25; the same behind a spatial transformer (similarity: rotation, scale and shift);
and the same with the upright loss (weight 2). Each has 17,640 training images and 6 epochs (105,840 images). Then
rotate every fourth test image by -90 to 90 degrees, and scale it by 0.5 to 2. At twice its size, much of a digit is
outside the frame.

The claim holds if all are true:

- Every plain run loses more than 0.1 of accuracy at a rotation of 45 degrees (mean of both directions) and at half the
  size.
- Every other run loses at most 0.03 anywhere in its range of training.
- Every other run also loses more than 0.1 at 90 degrees and at half the size.
"""

from functools import partial
from statistics import mean

from upright.data.augmentation import RandomAffine
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.distortions import Curves, Kinds, curves, rotate, zoom
from upright.evidence.finding import Finding, draw_band, metric, panels, rows, spreads

TITLES = {
    "plain": "LeNet",
    "augmented": "LeNet, augmented",
    "transformer": "spatial transformer",
    "upright": "with the upright loss",
}
KINDS: Kinds = {
    "degrees": {angle: [rotate(angle)] for angle in range(-90, 91, 15)},
    "size": {factor: [zoom(factor)] for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)},
}
TRAINED = {"degrees": (-45, 45), "size": (0.8, 1.25)}
LABELS = {"degrees": "rotation, degrees", "size": "scale"}


def losses(run: Curves) -> dict[str, float]:
    """Return the loss of accuracy from undistorted images: the largest within the training range, and beyond."""
    angles, factors = (dict(zip(strengths, run[kind]["accuracy"], strict=True)) for kind, strengths in KINDS.items())
    accuracies = {
        "up to 45 degrees": min(angles[n] for n in angles if abs(n) <= 45),
        "at 45 degrees": mean([angles[-45], angles[45]]),
        "at 90 degrees": mean([angles[-90], angles[90]]),
        "at 0.8 to 1.25 x": min(factors[n] for n in factors if 0.8 <= n <= 1.25),
        "at 0.5 x": factors[0.5],
        "at 2 x": factors[2.0],
    }
    return {name: angles[0] - accuracy for name, accuracy in accuracies.items()}


def run(bench: Bench) -> Finding:
    options = {"train_fraction": bench.choose(0.1, 0.3), "val_fraction": 0.02, "batch_size": 128}
    affine = partial(RandomAffine, rotate=45, scale=(0.8, 1.25))
    plain = Experiment(LENET, bench.data(**options), bench.choose(1, 6))
    augmented = plain._replace(data=bench.data(augment=[affine], angles=(-45, 45), **options))
    transformer = augmented._replace(network=transformed("similarity"))
    upright = transformer._replace(upright_weight=2.0)
    runs = bench.train(dict(zip(TITLES, (plain, augmented, transformer, upright), strict=True)))
    lines = bench.measure(curves, runs, KINDS, bench.choose(8, 4))
    each = {key: [losses(run) for run in lines[key]] for key in runs}
    drops = {key: {name: [run[name] for run in each[key]] for name in each[key][0]} for key in runs}
    plain_drops, *others = drops.values()
    within = max(max(one["up to 45 degrees"] + one["at 0.8 to 1.25 x"]) for one in others)
    not_invariant = min(plain_drops["at 45 degrees"] + plain_drops["at 0.5 x"]) > 0.1
    limited = all(min(one["at 90 degrees"] + one["at 0.5 x"]) > 0.1 for one in others)
    averages = {name: ", ".join(f"{mean(one[name]):.3f}" for one in others) for name in plain_drops}
    sentence = (
        f"{'Every' if not_invariant else 'Not every'} plain LeNet loses more than 0.1 of accuracy at 45 degrees (mean: "
        f"{mean(plain_drops['at 45 degrees']):.3f}) and at half the size (mean: {mean(plain_drops['at 0.5 x']):.3f}). "
        f"Within the range of training, the other networks lose up to {within:.3f} (allowed: 0.03). Beyond it, they "
        f"{'all' if limited else 'do not all'} lose more than 0.1: {averages['at 90 degrees']} at 90 degrees and "
        f"{averages['at 0.5 x']} at half the size (augmented, transformer, upright loss)."
    )
    undistorted = list(KINDS["size"]).index(1.0)
    columns = {
        "accuracy": spreads({key: [run["size"]["accuracy"][undistorted] for run in lines[key]] for key in runs}, 3)
    }
    columns |= {f"drop {name}": spreads({key: drops[key][name] for key in runs}, 3) for name in plain_drops}
    columns["uprightness"] = spreads(metric(runs, "test/uprightness"), 3)
    figure, axes = panels(2, width=4.6)
    for axis, (kind, strengths) in zip(axes, KINDS.items(), strict=True):
        axis.axvspan(*TRAINED[kind], color="#dddddd", alpha=0.6, linewidth=0, label="range of training")
        for key, title in TITLES.items():
            draw_band(axis, strengths, [run[kind]["accuracy"] for run in lines[key]], title)
        axis.set(xlabel=LABELS[kind], ylabel="accuracy", ylim=(0, 1.02))
    axes[0].legend(loc="lower center")
    numbers = {key: [{kind: run[kind]["accuracy"] for kind in KINDS} for run in lines[key]] for key in runs}
    held = not_invariant and within <= 0.03 and limited
    table = rows("network", TITLES, columns)
    return Finding(held, sentence, table, figure, {"accuracy": numbers, "lost": drops})
