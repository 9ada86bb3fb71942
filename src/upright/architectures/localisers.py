"""Localisers: networks that find the transform of a spatial transformer in the image.

`ConvLocaliser` and `DenseLocaliser` are those of the paper (Jaderberg et al. 2015, arXiv:1506.02025, appendix A). The
`PolarLocaliser` of `upright.architectures.voting` votes for one of several angles. Any network can be a localiser, too.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from upright.architectures.layers import check_size

Shape = tuple[int, int, int]
Network = Callable[[Shape, int], nn.Module]
"""A factory of networks: it is called with ``(input_shape, num_classes)``."""


class ConvLocaliser(nn.Module):
    """The paper's localiser for images (appendix A): half the size, two 5 x 5 convolutions, one linear layer.

    Max pooling follows each convolution.

    Args:
        input_shape: ``(C, H, W)``, at least 8 x 8.
        num_outputs: number of output features.
        width: maps of each convolution.
    """

    def __init__(self, input_shape: Shape, num_outputs: int, *, width: int = 20) -> None:
        super().__init__()
        check_size(self, input_shape, 8)
        channels, height, columns = input_shape
        self.layers = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(channels, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(width * (height // 8) * (columns // 8), num_outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class DenseLocaliser(nn.Module):
    """The paper's localiser for fully connected networks (appendix A). It also suits very small feature maps.

    Args:
        num_outputs: number of output features.
        widths: units of the hidden layers.
    """

    def __init__(self, input_shape: Shape, num_outputs: int, *, widths: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        units = [prod(input_shape), *widths]
        hidden = [layer for sizes in pairwise(units) for layer in (nn.Linear(*sizes), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(units[-1], num_outputs))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features
