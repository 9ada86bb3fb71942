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
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from upright.architectures.initialisation import initialise
from upright.architectures.layers import check_choice, check_size
from upright.architectures.localisers import Network, Shape
from upright.architectures.transforms import unit
from upright.warp import disc, resize, sample

PIXELS_PER_RADIUS = 4
"""Largest number of pixels of the image's side per radius. Larger images are resized first, against aliasing."""
BLUR = 3
"""Side in pixels of the box that is averaged before sampling, against aliasing."""
SLOPE = 0.1
"""Slope of the activations below 0. With 0, all maps died in some trainings, and the transformer stood still."""


class VotingLocaliser(nn.Module):
    """Base of localisers that vote for one of ``N`` rotations: the softmax of their scores are the votes ``(B, N)``."""

    directions: Tensor
    """Direction (cos, sin) of the transformer's rotation for each vote, ``(N, 2)``."""

    def head(self, features: int) -> list[nn.Module]:
        """Return the layers from the localiser's output to the scores ``(B, N)``."""
        return []

    def counted(self, votes: Tensor) -> Tensor:
        """Return the votes whose mean direction is the answer; the others are 0."""
        return votes

    def theta(self, votes: Tensor) -> Tensor:
        """Return the mean of the counted directions under the votes, as parameters of the rotation, ``(B, 2)``."""
        # The mean has the length of the confidence. Of a short one, the difference from (1, 0) would be rounded.
        return unit(self.counted(votes) @ self.directions) - torch.tensor([1.0, 0.0], device=votes.device)

    def confidence(self, votes: Tensor) -> Tensor:
        """Return the length of the mean direction, ``(B,)``: 0 if the votes are equal, 1 if one angle has all."""
        length: Tensor = (votes @ self.directions).norm(dim=1)
        return length


class PolarLocaliser(VotingLocaliser):
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

    def head(self, features: int) -> list[nn.Module]:
        score = nn.Conv1d(features, 1, 1, bias=False)  # the softmax would cancel a bias
        initialise(score, "he_normal")
        # Small scores spread the votes: sharp ones would jump between two good angles of an image.
        with torch.no_grad():
            score.weight.mul_(0.1)
        return [nn.LeakyReLU(SLOPE), score, nn.Flatten()]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(self.grid(images))
        return features


class NetworkLocaliser(VotingLocaliser):
    """Votes by any network that scores rotations, for example that of an `OrientationEstimator`.

    Angle and confidence are those of the estimator, see `near_peak`. Building it loads no weights:
    `upright.training.finetuning.start_from` does so when training begins, and a checkpoint is enough for everything
    later.

    Args:
        input_shape: ``(C, H, W)``.
        num_outputs: not used, because the network returns one score for each rotation.
        network: factory of the network; it is called with the shape of its images and with ``turns``.
        turns: number ``N`` of rotations. Score ``k`` is for an image rotated by ``k * 360 / N`` degrees anticlockwise.
        size: height and width of the images that the network gets; by default the shorter side of the input. Other
            inputs are cropped to a square and resized.
        mask: ``disc`` shows the network only the largest centred disc, as the data option of this name does.
        weights: checkpoint or run of an `OrientationEstimator` whose weights are loaded when training begins.

    Attributes:
        scale: factor on the input, ``(C, 1, 1)``, where its normalisation is not that of the network.
        shift: summand after ``scale``, ``(C, 1, 1)``.
        factory: the argument ``network``.
    """

    scale: Tensor
    shift: Tensor
    disc: Tensor | None

    def __init__(
        self,
        input_shape: Shape,
        num_outputs: int,
        *,
        network: Network,
        turns: int = 64,
        size: int | None = None,
        mask: Literal["none", "disc"] = "none",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if turns < 4:
            raise ValueError(f"turns must be at least 4, got {turns}.")
        check_choice("mask", mask, ("none", "disc"))
        channels, *sides = input_shape
        self.turns, self.mask, self.weights = turns, mask, weights
        self.size = min(sides) if size is None else size
        self.resizes = [self.size, self.size] != sides
        self.factory = network
        self.network = network((channels, self.size, self.size), turns)
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("shift", torch.zeros(channels, 1, 1))
        self.register_buffer("disc", disc(self.size, self.size) if mask == "disc" else None, persistent=False)
        angles = -2 * math.pi * torch.arange(turns) / turns  # against the rotation of the image
        self.register_buffer("directions", torch.stack([angles.cos(), angles.sin()], dim=1), persistent=False)

    def counted(self, votes: Tensor) -> Tensor:
        return near_peak(votes)

    def confidence(self, votes: Tensor) -> Tensor:
        """Return the share of the votes near their peak, ``(B,)``."""
        return self.counted(votes).sum(dim=1).clamp(max=1)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.resizes:
            images = resize(images, self.size, self.size, "crop")
        images = images * self.scale + self.shift
        scores: Tensor = self.network(images if self.disc is None else images * self.disc)
        return scores


def near_peak(votes: Tensor) -> Tensor:
    """Return the votes ``(B, N)`` for ``N`` equal steps of a full turn; those 45 degrees or more from the peak are 0.

    Votes for another side of the image would pull the mean over all away from every side. The peak is that of the votes
    smoothed over as many degrees.
    """
    count = votes.shape[1]
    steps = torch.arange(count, device=votes.device)
    # Row k is for peak k: which votes count, and with which weights they are smoothed.
    distances = (torch.remainder(steps - steps[:, None] + count // 2, count) - count // 2).abs()
    near = (8 * distances < count).to(votes.dtype)
    kernel = near * (4 * math.pi * distances / count).cos().to(votes.dtype)
    return votes * near[(votes @ kernel).argmax(dim=1)]


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
