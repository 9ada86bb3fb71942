"""Layers that many networks share: activations and poolings by name, blocks, and checks of the image size."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "tanh", "sigmoid"]
Pooling = Literal["max", "avg"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLINGS: dict[Pooling, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

Window = tuple[int, int, int]
"""``(kernel, stride, padding)`` of a convolution or pooling."""


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value of the option ``name`` that is not in ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")


def maps_size(network: nn.Module, layers: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width after all convolutions and poolings of ``layers``, which run in sequence.

    Raises:
        ValueError: if they would shrink images of this size to nothing.
    """
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    windows = [_window(layer) for layer in layers.modules() if isinstance(layer, kinds)]
    minimum = 1
    for kernel, stride, padding in reversed(windows):
        minimum = max(1, (minimum - 1) * stride + kernel - 2 * padding)
    check_size(network, input_shape, minimum)
    _, height, width = input_shape
    for kernel, stride, padding in windows:
        height, width = ((size - kernel + 2 * padding) // stride + 1 for size in (height, width))
    return height, width


def _window(layer: Any) -> Window:
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return kernel, stride, padding


def check_size(network: nn.Module, input_shape: tuple[int, int, int], minimum: int) -> None:
    """Refuse images with a height or width below ``minimum``, which ``network`` would shrink to nothing."""
    _, height, width = input_shape
    if min(height, width) < minimum:
        raise ValueError(
            f"{type(network).__name__} needs images of at least {minimum}x{minimum} pixels, got {height}x{width}."
        )


def scale_maps(maps: int, width: float) -> int:
    """Multiply a number of maps by ``width``; return an integer, at least 1."""
    if not width > 0:
        raise ValueError(f"width multiplies the numbers of maps and must be above 0, got {width}.")
    return max(1, round(maps * width))


class ConvReLU(nn.Sequential):
    """A convolution and a ReLU, with batch normalisation between them in place of the bias.

    Without batch normalisation the convolution has a bias.
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
