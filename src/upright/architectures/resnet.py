"""ResNet (He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", arXiv:1512.03385).

The idea: layers learn a change that is added to their input. A layer that changes nothing does no harm, so additional
depth no longer reduces accuracy.

Difference from the paper: a bottleneck has its stride in the 3 x 3 convolution, as in later implementations, because a
1 x 1 convolution with a stride skips three quarters of the pixels. The number of parameters is the same.

``ResNet`` is the family of table 1. ``SmallResNet`` is the family of section 4.2. ``shortcuts=False`` removes the
shortcuts; the paper calls the result a plain network, and compares it with the ResNet.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from upright.architectures.initialisation import initialise
from upright.architectures.layers import check_choice

LayerFactory = Callable[[int, int, int], nn.Module]
"""A factory of modules: it is called with ``(inputs, width, stride)``."""


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch normalisation; it divides height and width only by the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, width, 3, stride), nn.ReLU(), convolution(width, width, 3))


def bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Return a 1 x 1, a 3 x 3 and a 1 x 1 convolution; the last one has ``4 * width`` output maps."""
    return nn.Sequential(
        convolution(inputs, width, 1),
        nn.ReLU(),
        convolution(width, width, 3, stride),
        nn.ReLU(),
        convolution(width, 4 * width, 1),
    )


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the paper's shortcut B, a 1 x 1 convolution with a stride."""
    return convolution(inputs, outputs, 1, stride)


class Subsampling(nn.Module):
    """The paper's shortcut A, without parameters: every ``stride``-th pixel, and zeros for the additional maps."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class Residual(nn.Module):
    """``relu(shortcut(x) + body(x))``, or ``relu(body(x))`` without a shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return torch.relu(y if self.shortcut is None else self.shortcut(x) + y)


def residual_blocks(
    widths: tuple[int, ...], counts: tuple[int, ...], body: LayerFactory, expansion: int, shortcut: LayerFactory | None
) -> nn.Sequential:
    """Return stages of ``counts`` residual blocks; each stage but the first halves height and width.

    The body of a block has ``expansion`` times as many output maps as its width. ``shortcut`` is for blocks whose input
    and output differ in shape; other blocks have the identity. None removes all shortcuts.
    """
    residuals: list[nn.Module] = []
    inputs = widths[0]
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            outputs = expansion * width
            path: nn.Module | None = None
            if shortcut:
                path = nn.Identity() if (inputs, stride) == (outputs, 1) else shortcut(inputs, outputs, stride)
            residuals.append(Residual(body(inputs, width, stride), path))
            inputs = outputs
    return nn.Sequential(*residuals)


# Table 1: body, expansion, blocks of each stage.
DEPTHS: dict[int, tuple[LayerFactory, int, tuple[int, ...]]] = {
    18: (basic, 1, (2, 2, 2, 2)),
    34: (basic, 1, (3, 4, 6, 3)),
    50: (bottleneck, 4, (3, 4, 6, 3)),
    101: (bottleneck, 4, (3, 4, 23, 3)),
    152: (bottleneck, 4, (3, 8, 36, 3)),
}


class Residuals(nn.Module):
    """A stem, residual blocks, the mean over all pixels, and a linear layer."""

    def __init__(self, stem: nn.Module, blocks: nn.Sequential, classifier: nn.Linear) -> None:
        super().__init__()
        self.stem, self.blocks, self.classifier = stem, blocks, classifier
        initialise(self, "he_normal")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.stem(images))  # (B, D, h, w)
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


class ResNet(Residuals):
    """The networks for ImageNet. Images may have any size, also at run time.

    With 1000 classes and RGB they have 11,689,512 parameters at depth 18, then 21,797,672 (34), 25,557,032 (50),
    44,549,160 (101), and 60,192,808 (152).

    Args:
        depth: 18 or 34 of basic blocks; 50, 101 or 152 of bottlenecks.
        widths: maps of each stage; fewer than four widths leave out the last stages.
        shortcuts: add the input of each block to its output.
        stem: ``imagenet`` is a 7 x 7 convolution and pooling with a total stride of 4; ``small`` is a 3 x 3 convolution
            of stride 1, for images of about 32 pixels.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 18,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        shortcuts: bool = True,
        stem: Literal["imagenet", "small"] = "imagenet",
    ) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"ResNet has a depth of {', '.join(map(str, DEPTHS))}, got {depth}.")
        if not 1 <= len(widths) <= 4:
            raise ValueError(f"ResNet has 1 to 4 stages, got {len(widths)} widths.")
        check_choice("stem", stem, ("imagenet", "small"))
        body, expansion, counts = DEPTHS[depth]
        channels = input_shape[0]
        if stem == "imagenet":
            first = nn.Sequential(convolution(channels, widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        else:
            first = nn.Sequential(convolution(channels, widths[0], 3), nn.ReLU())
        blocks = residual_blocks(widths, counts[: len(widths)], body, expansion, projection if shortcuts else None)
        super().__init__(first, blocks, nn.Linear(expansion * widths[-1], num_classes))


class SmallResNet(Residuals):
    """The networks for CIFAR-10, with shortcuts without parameters. Images may have any size, also at run time.

    With 10 classes and RGB they have 269,722 parameters at depth 20, then 464,154 (32), 658,586 (44), 853,018 (56),
    1,727,962 (110), and 19,421,274 at depth 1202.

    Args:
        depth: 6n + 2, for three stages of n blocks.
        width: maps of the first stage, doubled in each of the others.
        shortcuts: add the input of each block to its output.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 20,
        width: int = 16,
        shortcuts: bool = True,
    ) -> None:
        count, remainder = divmod(depth - 2, 6)
        if count < 1 or remainder:
            raise ValueError(f"SmallResNet has a depth of 6n + 2 (8, 14, 20, ...), got {depth}.")
        stem = nn.Sequential(convolution(input_shape[0], width, 3), nn.ReLU())
        widths = (width, 2 * width, 4 * width)
        blocks = residual_blocks(widths, (count, count, count), basic, 1, Subsampling if shortcuts else None)
        super().__init__(stem, blocks, nn.Linear(widths[-1], num_classes))
