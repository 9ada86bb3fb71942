"""A CNN is not invariant to rotation and scale; augmentation and transformers help where they were trained, not beyond.

Protocol: LeNet (ReLU, maxima) on MNIST as it is; trained on digits turned by up to 45 degrees and at 0.8 to 1.25 times
their size; so trained behind a spatial transformer (similarity: turn, size, shift); and with the upright loss as well
(weight 2). 17,640 training images, 6 epochs (105,840 images seen) each. Every fourth test image is turned from -90 to
90 degrees, and shown at 0.5 to 2 times its size, where much of it is outside of the frame.

It holds if every plain run is less accurate by more than 0.1, turned by 45 degrees (mean of both ways) and at half the
size, than on images as they are; if every other run is less accurate by at most 0.03 anywhere in the range of its
training; and if these too lose more than 0.1 at 90 degrees and at half the size.
"""

from functools import partial
from statistics import mean

from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.augmentation import RandomAffine
from upright.evidence.bench import Bench, Experiment
from upright.evidence.distortions import Curve, Kinds, curves, turn, zoom
from upright.evidence.plots import draw_band, panels
from upright.evidence.study import Finding, mean_and_spread, values

TITLES = {
    "plain": "LeNet",
    "augmented": "LeNet, augmented",
    "transformer": "spatial transformer",
    "upright": "with the upright loss",
}
KINDS: Kinds = {
    "degrees": {angle: [turn(angle)] for angle in range(-90, 91, 15)},
    "size": {factor: [zoom(factor)] for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)},
}
TRAINED = {"degrees": (-45, 45), "size": (0.8, 1.25)}
LABELS = {"degrees": "turned by, degrees", "size": "size, times"}


def losses(found: dict[str, Curve]) -> dict[str, float]:
    """What a run loses of its accuracy on images as they are: the most within the range of training, and beyond."""
    angles, factors = (dict(zip(amounts, found[kind].accuracy, strict=True)) for kind, amounts in KINDS.items())
    whole = angles[0]
    return {
        "to 45 degrees": whole - min(angles[n] for n in angles if abs(n) <= 45),
        "at 45": whole - mean([angles[-45], angles[45]]),
        "at 90": whole - mean([angles[-90], angles[90]]),
        "0.8 to 1.25 x": whole - min(factors[n] for n in factors if 0.8 <= n <= 1.25),
        "at 0.5 x": whole - factors[0.5],
        "at 2 x": whole - factors[2.0],
    }


def run(bench: Bench) -> Finding:
    """Train the four, and turn and scale what they are shown."""
    options = {"train_fraction": bench.choose(0.1, 0.3), "val_fraction": 0.02, "batch_size": 128}
    affine = partial(RandomAffine, rotate=45, scale=(0.8, 1.25))
    augmented = bench.data(augment=[affine], angles=(-45, 45), **options)
    lenet = partial(LeNet, activation="relu", pooling="max")
    transformer = partial(SpatialTransformer, transform="similarity", padding="border")
    plain = Experiment(lenet, bench.data(**options), bench.choose(1, 6))
    behind = plain._replace(network=partial(TransformerNetwork, transformer=transformer, network=lenet), data=augmented)
    runs = bench.train(
        {
            "plain": plain,
            "augmented": plain._replace(data=augmented),
            "transformer": behind,
            "upright": behind._replace(upright_weight=2.0),
        }
    )
    found = {key: curves(bench, each, KINDS, every=bench.choose(8, 4)) for key, each in runs.items()}
    lost = {key: [losses(each) for each in found[key]] for key in runs}
    others = [each for key in runs if key != "plain" for each in lost[key]]
    not_invariant = all(each["at 45"] > 0.1 and each["at 0.5 x"] > 0.1 for each in lost["plain"])
    tolerant = all(each["to 45 degrees"] <= 0.03 and each["0.8 to 1.25 x"] <= 0.03 for each in others)
    limited = all(each["at 90"] > 0.1 and each["at 0.5 x"] > 0.1 for each in others)
    means = {key: {name: mean(each[name] for each in lost[key]) for name in lost[key][0]} for key in runs}
    sentence = (
        f"LeNet {'loses' if not_invariant else 'does not in every run lose'} more than 0.1 turned by 45 degrees "
        f"({means['plain']['at 45']:.3f}) and at half the size ({means['plain']['at 0.5 x']:.3f}); the others "
        f"{'lose' if tolerant else 'do not all lose'} at most 0.03 within the range of their training (at most "
        f"{max(max(each['to 45 degrees'], each['0.8 to 1.25 x']) for each in others):.3f}), and "
        f"{'all' if limited else 'not all'} more than 0.1 at 90 degrees and at half the size, in the mean "
        + ", ".join(f"{means[k]['at 90']:.3f} and {means[k]['at 0.5 x']:.3f} ({TITLES[k]})" for k in [*runs][1:])
        + "."
    )
    table = [
        {
            "network": title,
            "accuracy": mean_and_spread([each["degrees"].accuracy[6] for each in found[key]], 3),
            **{f"lost {name}": mean_and_spread([each[name] for each in lost[key]], 3) for name in means[key]},
            "uprightness": mean_and_spread(values(runs[key], "test/uprightness"), 3),
        }
        for key, title in TITLES.items()
    ]
    figure, axes = panels(2, width=4.6)
    for axis, (kind, amounts) in zip(axes, KINDS.items(), strict=True):
        axis.axvspan(*TRAINED[kind], color="#dddddd", alpha=0.6, linewidth=0, label="range of training")
        for key, title in TITLES.items():
            draw_band(axis, list(amounts), [each[kind].accuracy for each in found[key]], title)
        axis.set_xlabel(LABELS[kind], fontsize=9)
        axis.set_ylabel("accuracy", fontsize=9)
        axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize=8, loc="lower center")
    numbers = {key: [{kind: each[kind].accuracy for kind in KINDS} for each in found[key]] for key in runs}
    return Finding(not_invariant and tolerant and limited, sentence, table, figure, {"accuracy": numbers, "lost": lost})
