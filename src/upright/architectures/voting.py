"""Localisers that are upright by construction: they vote on a grid that moves with the image.

The idea: sample the image on a grid on which the transform becomes a shift. For a rotation it is a polar grid, for a
rotation and a scale a log-polar grid, for a translation the image itself. Convolutions shift their output with their
input. So the votes shift with the image, and the transformer brings all versions of an image to one pose, before any
training. Training only chooses the pose.

Related work: polar transformer networks (Esteves et al. 2018, arXiv:1709.01889) sample a classifier's input on such a
grid; learned canonicalisation (Kaba et al. 2023, arXiv:2211.06489) chooses among the elements of a discrete group.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from upright.architectures.layers import check_size
from upright.architectures.spatial_transformer import Shape, VotingLocaliser
from upright.warp import resize, sample

POINTS_PER_ANGLE = 2
"""Number of sampling points that are averaged for each angle, against aliasing."""
PIXELS_PER_RADIUS = 3
"""Largest number of pixels of the image's side per radius. Larger images are resized first, against aliasing."""


class PolarLocaliser(VotingLocaliser):
    """Votes for the angle of a rotation, on a polar grid around the centre.

    A rotation of the image by ``360 / angles`` degrees shifts the votes by one angle. Nothing outside of the largest
    centred disc changes them.

    Args:
        input_shape: ``(C, H, W)``, at least 4 x 4.
        num_outputs: number of features of each angle.
        angles: number ``N`` of angles of the grid.
        radii: number of radii of the grid.
        widths: maps of the convolutions on the grid.
        kernel: size of the convolutions on the grid, odd.
    """

    transform = "rotation"

    def __init__(
        self,
        input_shape: Shape,
        num_outputs: int,
        *,
        angles: int = 32,
        radii: int = 12,
        widths: Sequence[int] = (8, 8),
        kernel: int = 5,
    ) -> None:
        super().__init__()
        check_size(self, input_shape, 4)
        if angles < 4 or radii < 1:
            raise ValueError(f"A polar grid needs at least 4 angles and 1 radius, got {angles} and {radii}.")
        if kernel % 2 == 0 or kernel > angles or not widths:
            raise ValueError(
                f"A polar grid needs at least one convolution with an odd kernel of at most {angles} (angles), got "
                f"widths {list(widths)} and kernel {kernel}."
            )
        self.grid = PolarGrid(input_shape, (torch.arange(radii) + 0.5) / radii, angles)
        self.layers = nn.Sequential()
        for inputs, width in pairwise([input_shape[0], *widths]):
            self.layers.extend([CircularConv(inputs, width, (kernel, kernel)), nn.ReLU()])
        # Every angle then sees the whole disc, as the first linear layer of other localisers sees the whole image.
        self.layers.extend([nn.Conv2d(width, width, (radii, 1)), nn.ReLU()])
        self.layers.extend([CircularConv(width, num_outputs, (1, angles)), nn.Flatten(2)])

    def candidates(self) -> Tensor:
        return directions(self.grid.angles) - torch.tensor([1.0, 0.0])

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(self.grid(images))
        return features


class PolarGrid(nn.Module):
    """Sample images on a polar grid around their centre: ``(B, C, H, W)`` to ``(B, C, radii, angles)``.

    Args:
        input_shape: ``(C, H, W)``.
        radii: radius of each row, in halves of the shorter side, ascending.
        angles: number of columns: the middles of equal arcs, clockwise from the right.
    """

    points: Tensor

    def __init__(self, input_shape: Shape, radii: Tensor, angles: int) -> None:
        super().__init__()
        _, *size = input_shape
        self.radii, self.angles = len(radii), angles
        self.side = min(*size, PIXELS_PER_RADIUS * len(radii))
        self.resizes = [self.side, self.side] != size
        points = directions(POINTS_PER_ANGLE * angles) * radii[:, None, None]
        self.register_buffer("points", points.reshape(1, -1, 2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.resizes:
            images = resize(images, self.side, self.side, "crop")
        points = self.points.expand(len(images), -1, -1)
        return sample(images, points, self.radii, self.angles, shrink=(1, POINTS_PER_ANGLE))


class CircularConv(nn.Conv2d):
    """A convolution that keeps the size: it pads rows with zeros, and columns circularly.

    Args:
        channels: channels of the input.
        width: maps of the output.
        kernel: size of the kernel, ``(rows, columns)``; an odd number of rows.
    """

    def __init__(self, channels: int, width: int, kernel: tuple[int, int]) -> None:
        super().__init__(channels, width, kernel, padding=(kernel[0] // 2, 0))
        self.before, self.after = (kernel[1] - 1) // 2, kernel[1] // 2

    def forward(self, images: Tensor) -> Tensor:
        padded = torch.cat([images[..., images.shape[-1] - self.before :], images, images[..., : self.after]], dim=-1)
        return super().forward(padded)


def directions(count: int) -> Tensor:
    """Return ``count`` unit vectors (cos, sin), ``(count, 2)``: the middles of equal arcs.

    The middle of two neighbouring arcs of ``2 * count`` is the middle of an arc of ``count``.
    """
    angles = 2 * math.pi * (torch.arange(count) + 0.5) / count
    return torch.stack([angles.cos(), angles.sin()], dim=1)
