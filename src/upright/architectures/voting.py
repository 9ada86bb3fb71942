"""A localiser that is upright by construction: its votes for the angle of a rotation rotate with the image.

The idea: sample the image on a polar grid, where a rotation is a shift along the angles. Convolutions with circular
padding shift their output with their input. So the votes shift with the image, and the transformer rotates all versions
of an image to one pose, before any training. Training only chooses the pose.

Related work: polar transformer networks (Esteves et al. 2018, arXiv:1709.01889) sample a classifier's input on such a
grid; learned canonicalisation (Kaba et al. 2023, arXiv:2211.06489) chooses among the elements of a discrete group.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from upright.architectures.initialisation import initialise
from upright.architectures.layers import check_size
from upright.architectures.localisers import Shape
from upright.architectures.transforms import unit
from upright.warp import resize, sample

PIXELS_PER_RADIUS = 4
"""Largest number of pixels of the image's side per radius. Larger images are resized first, against aliasing."""
BLUR = 3
"""Side in pixels of the box that is averaged before sampling, against aliasing."""
SLOPE = 0.1
"""Slope of the activations below 0. With 0, all maps died in some trainings, and the transformer stood still."""


class PolarLocaliser(nn.Module):
    """Votes for the angle of a rotation, on a polar grid around the centre: features of each angle, ``(B, F, N)``.

    The transformer computes a score of each angle from its features. The softmax of the scores is a distribution, the
    votes ``(B, N)``.

    A rotation of the image by ``360 / angles`` degrees shifts the votes by one angle. Nothing outside of the largest
    centred disc, and two pixels around it, changes them.

    Args:
        input_shape: ``(C, H, W)``, at least 4 x 4.
        num_outputs: number ``F`` of features of each angle.
        angles: number ``N`` of angles of the grid.
        radii: number of radii of the grid.
        widths: maps of the convolutions on the grid.
        kernel: size of the convolutions on the grid, odd.
    """

    directions: Tensor

    def __init__(
        self,
        input_shape: Shape,
        num_outputs: int,
        *,
        angles: int = 32,
        radii: int = 8,
        widths: Sequence[int] = (8, 8),
        kernel: int = 3,
    ) -> None:
        super().__init__()
        check_size(self, input_shape, 4)
        if angles < 4 or radii < 1:
            raise ValueError(f"A polar grid needs at least 4 angles and 1 radius, got {angles} and {radii}.")
        if kernel % 2 == 0 or kernel < 1 or not widths:
            raise ValueError(
                f"A polar grid needs at least one convolution with an odd kernel, got widths {list(widths)} and "
                f"kernel {kernel}."
            )
        margin = len(widths) * (kernel // 2)
        self.register_buffer("directions", directions(angles), persistent=False)
        self.grid = PolarGrid(input_shape, (torch.arange(radii) + 0.5) / radii, angles, margin)
        self.layers = nn.Sequential()
        for inputs, width in pairwise([input_shape[0], *widths]):
            self.layers.extend([nn.Conv2d(inputs, width, kernel, padding=(kernel // 2, 0)), nn.LeakyReLU(SLOPE)])
        self.layers.extend([nn.Conv2d(width, width, (radii, 1)), nn.LeakyReLU(SLOPE), Circle(width, angles)])
        self.layers.extend([nn.Conv2d(width, num_outputs, 1), nn.Flatten(2)])
        # With torch's own scheme the votes are almost equal, and rounding would decide the angle of some images.
        initialise(self, "he_normal")

    def theta(self, votes: Tensor) -> Tensor:
        """Return the mean of the angles under the votes, as parameters of the rotation, ``(B, 2)``."""
        # The mean has the length of the confidence. Of a short one, the difference from (1, 0) would be rounded.
        return unit(votes @ self.directions) - torch.tensor([1.0, 0.0], device=votes.device)

    def confidence(self, votes: Tensor) -> Tensor:
        """Return the length of the mean direction, ``(B,)``: 0 if the votes are equal, 1 if one angle has all."""
        length: Tensor = (votes @ self.directions).norm(dim=1)
        return length

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(self.grid(images))
        return features


class PolarGrid(nn.Module):
    """Sample images on a polar grid around their centre: ``(B, C, H, W)`` to ``(B, C, radii, angles + 2 * margin)``.

    Args:
        radii: radius of each row, in halves of the shorter side, ascending.
        angles: number of angles: the middles of equal arcs, clockwise from the right.
        margin: number of columns that are repeated on each side, for convolutions without padding.
    """

    points: Tensor

    def __init__(self, input_shape: Shape, radii: Tensor, angles: int, margin: int) -> None:
        super().__init__()
        _, *size = input_shape
        self.shape = len(radii), angles + 2 * margin
        self.side = min(*size, PIXELS_PER_RADIUS * len(radii))
        self.resizes = [self.side, self.side] != size
        columns = torch.arange(-margin, angles + margin) % angles
        points = directions(angles)[columns] * radii[:, None, None]
        self.register_buffer("points", points.reshape(1, -1, 2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.resizes:
            images = resize(images, self.side, self.side, "crop")
        images = avg_pool2d(images, BLUR, 1, BLUR // 2, count_include_pad=False)
        return sample(images, self.points.expand(images.shape[0], -1, -1), *self.shape)


class Circle(nn.Conv2d):
    """A convolution of each map ``(B, width, 1, angles)`` over the full circle: every angle sees all angles.

    It is computed as one matrix per map. As a convolution in bfloat16, which OpenVINO chooses on some processors,
    oneDNN had not finished one call after a minute.

    Args:
        width: number of maps.
        angles: number of angles.
    """

    positions: Tensor

    def __init__(self, width: int, angles: int) -> None:
        super().__init__(width, width, (1, angles), groups=width)
        line = torch.arange(angles)
        self.register_buffer("positions", (line[:, None] - line) % angles, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        assert self.bias is not None
        matrices = self.weight[:, 0, 0][:, self.positions]  # (width, angles, angles)
        products = features.squeeze(2).transpose(0, 1) @ matrices
        return (products.transpose(0, 1) + self.bias[:, None])[:, :, None]


def directions(count: int) -> Tensor:
    """Return ``count`` unit vectors (cos, sin), ``(count, 2)``: the middles of equal arcs."""
    angles = 2 * math.pi * (torch.arange(count) + 0.5) / count
    return torch.stack([angles.cos(), angles.sin()], dim=1)
