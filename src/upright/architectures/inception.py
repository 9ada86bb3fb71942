"""Inception networks as data: the notation of all of them, and the network that the later ones share."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from upright.architectures.layers import Concat, ConvReLU, check_size, scale_maps


@dataclass(frozen=True)
class Conv:
    """A convolution in a plan. It does not change the size; ``kernel`` is one number if it is square."""

    maps: int
    kernel: int | tuple[int, int] = 1


@dataclass(frozen=True)
class Valid:
    """A 3 x 3 convolution without padding in a plan, marked V in the figures of Inception-v4."""

    maps: int
    stride: int = 1


@dataclass(frozen=True)
class Add:
    """A `Residual` block in a plan; ``rectified`` adds a ReLU after the sum."""

    branches: "Plan"
    scale: float
    rectified: bool = True


MIN_SIZE = 75
"""Smallest height or width that leaves a pixel: all three networks shrink images equally."""

Plan = Conv | Valid | Add | Literal["max", "pool", "avg"] | tuple["Plan", ...] | list["Plan"]
"""A tuple is a sequence of parts, a list is a set of parallel branches.

All pooling is 3 x 3: ``max`` halves the size and has no padding; ``pool``, of maxima too, and ``avg`` do not change it.
"""


class Inception(nn.Module):
    """The layers of a plan, global average pooling, and one linear layer.

    Args:
        input_shape: ``(C, H, W)``, at least 75 x 75; the paper's images are 299 x 299.
        plan: the layers before the global average.
        width: factor on every number of maps.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, plan: Plan, *, width: float, dropout: float
    ) -> None:
        super().__init__()
        check_size(self, input_shape, MIN_SIZE)
        self.features, channels = assemble(plan, input_shape[0], width)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


class Residual(nn.Module):
    """Branches whose scaled output is added to the input; a 1 x 1 convolution matches the number of maps."""

    def __init__(self, channels: int, plan: Add, width: float) -> None:
        super().__init__()
        self.branches, maps = assemble(plan.branches, channels, width)
        self.expand = nn.Conv2d(maps, channels, 1)
        self.scale = plan.scale
        self.activation = nn.ReLU() if plan.rectified else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = self.activation(maps + self.scale * self.expand(self.branches(maps)))
        return total


def check_blocks(blocks: tuple[int, int, int]) -> None:
    """Refuse a network that lacks one of its three kinds of blocks."""
    if min(blocks) < 1:
        raise ValueError(f"blocks must be at least 1 of each kind, got {blocks}.")


def assemble(plan: Plan, channels: int, width: float, batch_norm: bool = True) -> tuple[nn.Module, int]:
    """Return the module that ``plan`` describes, ``width`` times as wide, and its number of output maps."""
    match plan:
        case Conv():
            maps = scale_maps(plan.maps, width)
            return ConvReLU(channels, maps, plan.kernel, batch_norm=batch_norm), maps
        case Valid():
            maps = scale_maps(plan.maps, width)
            return ConvReLU(channels, maps, 3, stride=plan.stride, padding=0), maps
        case Add():
            return Residual(channels, plan, width), channels
        case "max":
            return nn.MaxPool2d(3, 2), channels
        case "pool":
            return nn.MaxPool2d(3, 1, 1), channels
        case "avg":
            return nn.AvgPool2d(3, 1, 1, count_include_pad=False), channels
        case list():
            branches, counts = zip(*(assemble(branch, channels, width, batch_norm) for branch in plan), strict=True)
            return Concat(branches), sum(counts)
        case tuple():
            steps = nn.Sequential()
            for part in plan:
                step, channels = assemble(part, channels, width, batch_norm)
                steps.append(step)
            return steps, channels
