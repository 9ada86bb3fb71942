"""An Inception as data: the notation in which v3, v4 and Inception-ResNet-v2 are written, and what reads it."""

from dataclasses import dataclass

from torch import nn

from upright.architectures.layers import Concat, ConvReLU, Pooling, Window, scaled


@dataclass(frozen=True)
class Conv:
    """In a plan: a convolution that keeps the size; ``kernel`` is one number if it is square."""

    maps: int
    kernel: int | tuple[int, int] = 1


@dataclass(frozen=True)
class Valid:
    """In a plan: a 3 x 3 convolution without padding, marked V in the figures of Inception-v4."""

    maps: int
    stride: int = 1


Plan = Conv | Valid | Pooling | tuple["Plan", ...] | list["Plan"]
"""A tuple is one thing after the other, a list is branches side by side.

All pooling is 3 x 3: ``max`` halves the size and has no padding, ``avg`` keeps the size.
"""


def assemble(plan: Plan, channels: int, width: float) -> tuple[nn.Module, int]:
    """The module that ``plan`` describes behind ``channels`` maps, ``width`` times as wide, and how many it gives."""
    match plan:
        case Conv():
            maps = scaled(plan.maps, width)
            return ConvReLU(channels, maps, plan.kernel), maps
        case Valid():
            maps = scaled(plan.maps, width)
            return ConvReLU(channels, maps, 3, stride=plan.stride, padding=0), maps
        case "max":
            return nn.MaxPool2d(3, 2), channels
        case "avg":
            return nn.AvgPool2d(3, 1, 1, count_include_pad=False), channels
        case list():
            branches, given = zip(*(assemble(branch, channels, width) for branch in plan), strict=True)
            return Concat(branches), sum(given)
        case tuple():
            steps = nn.Sequential()
            for part in plan:
                step, channels = assemble(part, channels, width)
                steps.append(step)
            return steps, channels


def shrinking_windows(plan: Plan) -> list[Window]:
    """What in ``plan`` makes the image smaller; branches all do so alike, so that the first speaks for them."""
    match plan:
        case Valid():
            return [(3, plan.stride, 0)]
        case "max":
            return [(3, 2, 0)]
        case list():
            return shrinking_windows(plan[0])
        case tuple():
            return [window for part in plan for window in shrinking_windows(part)]
        case _:
            return []
