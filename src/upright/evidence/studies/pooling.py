"""Pooling makes a network tolerant of small shifts, rotations and changes of scale, and of small ones only.

Protocol: Train LeNet (ReLU; 61,706 parameters) on MNIST without augmentation: with 2 x 2 max pooling, with 2 x 2
average pooling, and without pooling. Without pooling, its convolutions have a stride of two pixels, so maps and
parameters stay the same. Each run has 22,800 training images and 5 epochs (114,000 images). Then distort every second
test image: shift it by 0 to 6 pixels (left, right, up, down), rotate it by up to 45 degrees (both directions), and
scale it by 0.6 to 1.4. Digits have a margin of 4 pixels, so larger shifts cut off a part of them. Consistency is the
share of images with the same predicted class as without the distortion. Also count the outputs of networks for images
of other sizes than the one they were built for.

The claim holds if all are true:

- Max pooling and average pooling are both more consistent than no pooling (means over seeds) at a shift of 2 pixels, at
  a rotation of 15 degrees and at a scale of 0.8.
- At a shift of 6 pixels, both have a consistency below 0.9.
- Networks that end in global average pooling have the same number of outputs for every image size.
"""

from functools import partial

import torch
from torch import nn

from upright.architectures.lenet import LeNet
from upright.architectures.localisers import Network, Shape
from upright.architectures.nin import NiN
from upright.architectures.resnet import SmallResNet
from upright.evidence.bench import LENET, Bench, Experiment
from upright.evidence.distortions import MEASURES, Kinds, curves, rotate, shift, zoom
from upright.evidence.finding import Finding, draw_band, means, metric, panels, rows, spreads


class StridedLeNet(LeNet):
    """LeNet whose convolutions have a stride of two pixels in place of pooling: the same maps and parameters.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: ``K``.
    """

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__(input_shape, num_classes, activation="relu", pooling="max")
        self.features = nn.Sequential(*(layer for layer in self.features if not isinstance(layer, nn.MaxPool2d)))
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                layer.stride = (2, 2)


POOLINGS: dict[str, Network] = {
    "max": LENET,
    "average": partial(LeNet, activation="relu", pooling="avg"),
    "none": StridedLeNet,
}
TITLES = {"max": "max pooling", "average": "average pooling", "none": "no pooling"}
GLOBAL: dict[str, Network] = {
    "NiN": partial(NiN, widths=(32, 48, 64), stem=(5, 1, 2)),
    "SmallResNet": partial(SmallResNet, depth=8),
}
SIZES = ((28, 28), (20, 36), (64, 48))
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))
KINDS: Kinds = {
    "pixels": {n: [shift(n * x, n * y, 28, 28) for x, y in DIRECTIONS] for n in range(7)},
    "degrees": {angle: [rotate(angle), rotate(-angle)] for angle in (0, 5, 10, 15, 20, 30, 45)},
    "size": {factor: [zoom(factor)] for factor in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)},
}
LABELS = {"pixels": "shift, pixels", "degrees": "rotation, degrees", "size": "scale"}
COMPARED = {"2 pixels": ("pixels", 2), "15 degrees": ("degrees", 15), "0.8 x": ("size", 0.8), "6 pixels": ("pixels", 6)}


@torch.no_grad()
def outputs(network: Network, height: int, width: int) -> str:
    """Return the number of outputs of a network for 28 x 28 pixels on an image of another size."""
    try:
        return str(network((1, 28, 28), 10).eval()(torch.zeros(1, 1, height, width)).numel())
    except RuntimeError:
        return "error"


def run(bench: Bench) -> Finding:
    data = bench.data(train_fraction=bench.choose(0.3, 0.4), val_fraction=0.05, batch_size=128)
    runs = bench.train({key: Experiment(network, data, bench.choose(1, 5)) for key, network in POOLINGS.items()})
    lines = bench.measure(curves, runs, KINDS, bench.choose(8, 2))
    same = {
        name: {
            key: [each[kind]["consistency"][list(KINDS[kind]).index(strength)] for each in lines[key]] for key in runs
        }
        for name, (kind, strength) in COMPARED.items()
    }
    lengths = {
        key: [outputs(network, height, width) for height, width in SIZES]
        for key, network in (POOLINGS | GLOBAL).items()
    }
    mean = {name: means(groups) for name, groups in same.items()}
    *small, far = COMPARED
    less = [name for name in small if min(mean[name]["max"], mean[name]["average"]) <= mean[name]["none"]]
    limited = max(mean[far]["max"], mean[far]["average"]) < 0.9
    one_length = all(set(lengths[key]) == {"10"} for key in GLOBAL)
    shares = {name: ", ".join(f"{mean[name][key]:.3f} ({TITLES[key]})" for key in runs) for name in ("2 pixels", far)}
    sentence = (
        f"The consistency at a shift of 2 pixels is {shares['2 pixels']}, and at 6 pixels {shares[far]}. Both kinds of "
        f"pooling are more consistent than no pooling in "
        f"{'all but ' + ', '.join(less) if less else 'all three small distortions'}. Networks that end in global "
        f"average pooling {'have' if one_length else 'do not have'} 10 outputs for every size."
    )
    titles = {key: f"LeNet, {TITLES[key]}" for key in runs}
    titles |= {key: f"{key}, global average pooling, not trained" for key in GLOBAL}
    columns = {"test accuracy": spreads(metric(runs, "test/accuracy"))}
    columns |= {f"consistency, {name}": spreads(groups, 3) for name, groups in same.items()}
    heading = "outputs for " + ", ".join(f"{height}x{width}" for height, width in SIZES)
    columns[heading] = {key: ", ".join(each) for key, each in lengths.items()}
    figure, axes = panels(3, 2, width=3.6, height=2.6)
    for axis, (measure, kind) in zip(axes, [(m, kind) for m in MEASURES for kind in KINDS], strict=True):
        for key in runs:
            draw_band(axis, KINDS[kind], [each[kind][measure] for each in lines[key]], TITLES[key])
        axis.set(xlabel=LABELS[kind], ylabel=measure)
    axes[0].legend()
    held = not less and limited and one_length
    table = rows("network", titles, columns)
    return Finding(held, sentence, table, figure, {"curves": lines, "same": same, "outputs": lengths})
