"""Conversion of torchvision's published weights of ResNet and VGG to our names and layout. torchvision is not needed.

Source: the names in torchvision/models/resnet.py and vgg.py of github.com/pytorch/vision. The layouts differ:

- Our ResNet numbers the blocks of all stages in one sequence. torchvision numbers them within ``layer1`` to ``layer4``.
- In torchvision's VGG, convolutions before batch normalisation have a bias. In ours they have none. The bias is
  subtracted from the running mean, which gives the same result up to rounding.
- torchvision's VGG pools its last maps to 7 x 7 for every input size. Our VGG has weights for the maps of its own input
  size. Pooling is linear, so it is merged into the first fully connected layer. Both networks give the same logits for
  images of any size.
"""

import re

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

Weights = dict[str, Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and std of the training images (torchvision's preset ``ImageClassification``)."""

STEM_AND_HEAD = {"conv1.": "stem.0.0.", "bn1.": "stem.0.1.", "fc.": "classifier."}
BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)")
VGG_POOLED = 7
VGG_FIRST_LINEAR = "classifier.layers.1.weight"


def resnet_weights(published: Weights) -> Weights:
    """Return the weights of a ResNet under our names. Names without a counterpart do not change."""
    blocks = [match for name in published if (match := BLOCK.fullmatch(name))]
    counts = [max((int(match[2]) + 1 for match in blocks if int(match[1]) == stage), default=0) for stage in range(10)]

    def rename(name: str) -> str:
        if match := BLOCK.fullmatch(name):
            stage, block, kind, number, rest = match.groups()
            # A body is convolution, ReLU, convolution and so on; each convolution is a pair with its normalisation.
            body = f"body.{2 * int(number) - 2}.{0 if kind == 'conv' else 1}"
            part = f"shortcut.{number}" if kind == "downsample." else body
            return f"blocks.{sum(counts[: int(stage)]) + int(block)}.{part}.{rest}"
        for prefix, our_prefix in STEM_AND_HEAD.items():
            if name.startswith(prefix):
                return our_prefix + name.removeprefix(prefix)
        return name

    return {rename(name): value for name, value in published.items()}


def vgg_weights(published: Weights) -> Weights:
    """Return the weights of a VGG under our names, without biases of convolutions before batch normalisation."""

    # Our classifier begins with a layer that flattens; torchvision's has no such layer.
    def next_layer(match: re.Match[str]) -> str:
        return f"classifier.layers.{int(match[1]) + 1}"

    weights = {re.sub(r"^classifier\.(\d+)", next_layer, name): value for name, value in published.items()}
    for name in list(weights):
        match = re.fullmatch(r"features\.(\d+)\.running_mean", name)
        bias = f"features.{int(match[1]) - 1}.bias" if match else ""
        if bias in weights and weights[bias].shape == weights[name].shape:
            weights[name] = weights[name] - weights.pop(bias)
    return weights


def merge_pooling(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Return weights over maps of ``rows x columns`` with the same output as ``weight`` over the pooled 7 x 7 maps.

    Their shape is ``(units, maps * rows * columns)``, and that of ``weight`` is ``(units, maps * 49)``.
    """
    pixels = torch.eye(rows * columns, dtype=weight.dtype).view(-1, 1, rows, columns)
    pooling = adaptive_avg_pool2d(pixels, VGG_POOLED).flatten(1).T  # (49, rows * columns)
    return (weight.reshape(len(weight), -1, VGG_POOLED**2) @ pooling).flatten(1)


def are_imagenet_classes(classes: tuple[str, ...]) -> bool:
    """Return True for the 1000 folder names of ImageNet in sorted order, the order of the published weights."""
    return (
        len(classes) == 1000 and list(classes) == sorted(classes) and all(re.fullmatch(r"n\d{8}", c) for c in classes)
    )
