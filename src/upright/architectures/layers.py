"""Layers that many networks share: activations and poolings by name, blocks, and checks of the image size."""

from collections.abc import Collection, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "tanh", "sigmoid"]
Pooling = Literal["max", "avg"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLINGS: dict[Pooling, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

Window = tuple[int, int, int]
"""``(kernel, stride, padding)`` of a convolution or pooling."""


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that an option does not allow.

    Raises:
        ValueError: if ``value`` is not in ``allowed``; the message lists the allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")


def min_size(windows: Iterable[Window]) -> int:
    """Return the smallest height or width that leaves at least one pixel after all ``windows`` in sequence.

    It inverts ``floor((n - kernel + 2 * padding) / stride) + 1``.
    """
    size = 1
    for kernel, stride, padding in reversed(list(windows)):
        size = max(1, (size - 1) * stride + kernel - 2 * padding)
    return size


def size_after(size: int, windows: Iterable[Window]) -> int:
    """Return the height or width after all ``windows`` in sequence."""
    for kernel, stride, padding in windows:
        size = (size - kernel + 2 * padding) // stride + 1
    return size


def check_size(network: nn.Module, input_shape: tuple[int, int, int], minimum: int) -> None:
    """Refuse images that ``network`` would shrink to nothing.

    Raises:
        ValueError: if height or width is below ``minimum``.
    """
    _, height, width = input_shape
    if min(height, width) < minimum:
        raise ValueError(
            f"{type(network).__name__} needs images of at least {minimum}x{minimum} pixels, got {height}x{width}."
        )


def scale_maps(maps: int, width: float) -> int:
    """Multiply a number of maps by ``width``; return an integer, at least 1.

    Raises:
        ValueError: if ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width multiplies the numbers of maps and must be above 0, got {width}.")
    return max(1, round(maps * width))


class ConvReLU(nn.Sequential):
    """A convolution and a ReLU, with batch normalisation between them in place of the bias.

    Args:
        channels: number of input maps.
        maps: number of output maps.
        kernel: size of the kernel; one number if it is square.
        stride: stride in pixels.
        padding: zeros on each side; ``same`` does not change the size at stride 1.
        batch_norm: add batch normalisation; without it the convolution has a bias.
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
            # Google's Inceptions were trained with this epsilon.
            self.append(nn.BatchNorm2d(maps, eps=1e-3))
        self.append(nn.ReLU())


class Concat(nn.ModuleList):
    """Parallel branches with the same input ``(B, C, H, W)``; their outputs are concatenated along the channels."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self], dim=1)
