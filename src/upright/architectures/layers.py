"""What many networks are built of: named activations and poolings, and the least image that they take."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

Activation = Literal["relu", "tanh", "sigmoid"]
Pooling = Literal["max", "avg"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLINGS: dict[Pooling, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

Window = tuple[int, int, int]
"""``(kernel, stride, padding)`` of a convolution or pooling."""


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
