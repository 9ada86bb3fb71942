"""What many networks are built of: named activations and poolings, and the least image that they take."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "tanh", "sigmoid"]
Pooling = Literal["max", "avg"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLINGS: dict[Pooling, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

Window = tuple[int, int, int]
"""``(kernel, stride, padding)`` of a convolution or pooling."""


def choice(name: str, given: str, allowed: Iterable[str]) -> None:
    """Refuse an option that does not exist.

    Raises:
        ValueError: with those that do.
    """
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {given!r}.")


def least_size(windows: Iterable[Window]) -> int:
    """The smallest height or width from which ``windows``, one after the other, still leave one pixel.

    The inverse of ``floor((n - kernel + 2 * padding) / stride) + 1``.
    """
    size = 1
    for kernel, stride, padding in reversed(list(windows)):
        size = max(1, (size - 1) * stride + kernel - 2 * padding)
    return size


def size_after(size: int, windows: Iterable[Window]) -> int:
    """Height or width after ``windows``, one after the other."""
    for kernel, stride, padding in windows:
        size = (size - kernel + 2 * padding) // stride + 1
    return size


def check_size(network: nn.Module, input_shape: tuple[int, int, int], least: int) -> None:
    """Refuse images that ``network`` would shrink to nothing.

    Raises:
        ValueError: with the least size that works.
    """
    _, height, width = input_shape
    if min(height, width) < least:
        raise ValueError(
            f"{type(network).__name__} needs images of at least {least}x{least} pixels, got {height}x{width}."
        )


def scaled(maps: int, width: float) -> int:
    """``maps`` of a paper's table in a network ``width`` times as wide, at least one.

    Raises:
        ValueError: if ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width multiplies the numbers of maps and must be above 0, got {width}.")
    return max(1, round(maps * width))


class ConvReLU(nn.Sequential):
    """A convolution and a ReLU, with batch normalisation between them in place of the bias.

    Args:
        channels: maps that come in.
        maps: maps that go out.
        kernel: one number if it is square.
        stride: in pixels.
        padding: of zeros; ``same`` keeps the size at stride 1.
        batch_norm: without it the convolution has a bias.
    """

    def __init__(
        self,
        channels: int,
        maps: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | Literal["same"] = "same",
        batch_norm: bool = True,
    ) -> None:
        super().__init__(nn.Conv2d(channels, maps, kernel, stride, padding, bias=not batch_norm))
        if batch_norm:
            # The epsilon with which Google's Inceptions were trained.
            self.append(nn.BatchNorm2d(maps, eps=1e-3))
        self.append(nn.ReLU())


class Concat(nn.ModuleList):
    """Branches that see the same maps; what they make of them is stacked along the channels."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)`` to as many as all branches give."""
        return torch.cat([branch(maps) for branch in self], dim=1)
