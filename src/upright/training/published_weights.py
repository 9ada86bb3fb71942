"""torchvision's published weights of ResNet and VGG, as ours name and lay them out. torchvision itself is not needed.

Source: the names in torchvision/models/resnet.py and vgg.py of github.com/pytorch/vision. What is laid out otherwise:

- ours count the blocks of all stages in one row; theirs count them in ``layer1`` to ``layer4``;
- the convolutions of their VGG have a bias before batch normalisation, ours have none: it is taken off the running
  mean, which is the same to the last bit but rounding;
- their VGG pools its last maps to 7 x 7, whatever comes; ours has weights for the maps that there are. Pooling is
  linear, so the first fully connected layer takes it over: both give the same logits, for images of any size.
"""

import re

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

Weights = dict[str, Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images that they learnt from (torchvision's preset ``ImageClassification``)."""

STEM_AND_HEAD = {"conv1.": "stem.0.0.", "bn1.": "stem.0.1.", "fc.": "classifier."}
BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)")
VGG_POOLED = 7
VGG_FIRST_LINEAR = "classifier.layers.1.weight"


def resnet_weights(theirs: Weights) -> Weights:
    """A ResNet's by our names; what has none keeps its own."""
    found = [match for name in theirs if (match := BLOCK.fullmatch(name))]
    counts = [max((int(match[2]) + 1 for match in found if int(match[1]) == stage), default=0) for stage in range(10)]

    def ours(name: str) -> str:
        if match := BLOCK.fullmatch(name):
            stage, block, kind, number, rest = match.groups()
            # A body is convolution, ReLU, convolution and so on; a convolution is itself and its normalisation.
            body = f"body.{2 * int(number) - 2}.{0 if kind == 'conv' else 1}"
            part = f"shortcut.{number}" if kind == "downsample." else body
            return f"blocks.{sum(counts[: int(stage)]) + int(block)}.{part}.{rest}"
        for start, our_start in STEM_AND_HEAD.items():
            if name.startswith(start):
                return our_start + name.removeprefix(start)
        return name

    return {ours(name): value for name, value in theirs.items()}


def vgg_weights(theirs: Weights) -> Weights:
    """A VGG's by our names, convolutions before batch normalisation without their biases."""
    # Our classifier begins with the flattening, which is no layer of theirs.
    found = {re.sub(r"^classifier\.(\d+)", _one_more, name): value for name, value in theirs.items()}
    for name in list(found):
        match = re.fullmatch(r"features\.(\d+)\.running_mean", name)
        bias = f"features.{int(match[1]) - 1}.bias" if match else ""
        if bias in found and found[bias].shape == found[name].shape:
            found[name] = found[name] - found.pop(bias)
    return found


def _one_more(match: re.Match[str]) -> str:
    return f"classifier.layers.{int(match[1]) + 1}"


def unpooled(weight: Tensor, rows: int, columns: int) -> Tensor:
    """A linear layer over maps of ``rows x columns`` that gives what ``weight`` gives for their pooled 7 x 7.

    Args:
        weight: ``(units, maps * 49)``.
        rows: of the maps.
        columns: of the maps.

    Returns:
        ``(units, maps * rows * columns)``.
    """
    pixels = torch.eye(rows * columns, dtype=weight.dtype).view(-1, 1, rows, columns)
    pooling = adaptive_avg_pool2d(pixels, VGG_POOLED).flatten(1).T  # (49, rows * columns)
    return (weight.reshape(len(weight), -1, VGG_POOLED**2) @ pooling).flatten(1)


def are_imagenets(classes: tuple[str, ...]) -> bool:
    """Whether these are ImageNet's 1000 classes in the order that the weights know: of the names of its folders."""
    return (
        len(classes) == 1000 and list(classes) == sorted(classes) and all(re.fullmatch(r"n\d{8}", c) for c in classes)
    )
