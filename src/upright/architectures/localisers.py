"""Localisers: networks that find the transform of a spatial transformer in the image.

`ConvLocaliser` and `DenseLocaliser` are those of the paper (Jaderberg et al. 2015, arXiv:1506.02025, appendix A). A
`VotingLocaliser` votes for one of several candidates; `upright.architectures.voting` has such localisers. Any network
can be a localiser, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from upright.architectures.layers import check_size
from upright.architectures.transforms import TransformName

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
        input_shape: ``(C, H, W)``.
        num_outputs: number of output features.
        widths: units of the hidden layers.
    """

    def __init__(self, input_shape: Shape, num_outputs: int, *, widths: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        channels, height, columns = input_shape
        self.layers = nn.Sequential(nn.Flatten())
        inputs = channels * height * columns
        for width in widths:
            self.layers.extend([nn.Linear(inputs, width), nn.ReLU()])
            inputs = width
        self.layers.append(nn.Linear(inputs, num_outputs))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class VotingLocaliser(nn.Module, ABC):
    """A localiser that votes for one of ``N`` candidates: it returns features of each, ``(B, num_outputs, N)``.

    The transformer computes a score of each candidate from its features. The softmax of the scores is a distribution,
    the votes ``(B, N)``.
    """

    transform: TransformName
    """The family of transforms that the candidates belong to."""

    @abstractmethod
    def theta(self, votes: Tensor) -> Tensor:
        """Return the mean of the candidates under the votes, as parameters of the transform, ``(B, P)``."""

    @abstractmethod
    def confidence(self, votes: Tensor) -> Tensor:
        """Return the concentration of the votes, ``(B,)``: 0 if they are equal, 1 if one candidate has all."""
