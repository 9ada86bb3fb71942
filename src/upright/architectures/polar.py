"""A network that scores rotations on a polar grid: the network of the task "orientation".

The idea: on a polar grid, a rotation of the image is a shift along the angles. All layers commute with this shift. So
the scores of a rotated image are those of the image, shifted: the network learns the orientation of a picture once, not
at every angle. Its first layers see a part of the disc. Its last layers mix all angles, with the same weights at each.

Related work: polar transformer networks (Esteves et al. 2018, arXiv:1709.01889). The blocks over the full circle
separate space and channels as MobileNets do (Howard et al. 2017, arXiv:1704.04861).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from upright.architectures.layers import check_size
from upright.architectures.localisers import Shape
from upright.architectures.voting import SLOPE, PolarGrid
from upright.warp import full_precision


class PolarNetwork(nn.Module):
    """Scores of ``N`` rotations of an image, ``(B, N)``. Score ``k`` is for ``k * 360 / N`` degrees anticlockwise.

    A rotation of the image by ``360 / angles`` degrees shifts the scores. Nothing outside of the largest centred disc,
    and two pixels around it, changes them.

    Args:
        input_shape: ``(C, H, W)``, at least 4 x 4.
        num_outputs: the number ``N``.
        angles: smallest number of angles of the grid; it is rounded up to a multiple of ``num_outputs``.
        radii: number of radii of the grid.
        widths: maps of the convolutions on the grid.
        strides: stride of each along the radius.
        blocks: number of residual blocks over the full circle.
    """

    def __init__(
        self,
        input_shape: Shape,
        num_outputs: int,
        *,
        angles: int = 64,
        radii: int = 12,
        widths: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (2, 2, 1),
        blocks: int = 4,
    ) -> None:
        super().__init__()
        check_size(self, input_shape, 4)
        if len(widths) != len(strides) or not widths:
            raise ValueError(f"strides needs one number for each width, got {list(widths)} and {list(strides)}.")
        if math.prod(strides) > radii:
            raise ValueError(f"A grid of {radii} radii is too small for the strides {list(strides)}.")
        self.step = math.ceil(angles / num_outputs)
        angles = self.step * num_outputs
        self.grid = PolarGrid(input_shape, (torch.arange(radii) + 0.5) / radii, angles, 0)
        self.layers = nn.Sequential()
        inputs, rows = input_shape[0], radii
        for width, stride in zip(widths, strides, strict=True):
            self.layers.append(RingConvolution(inputs, width, stride))
            inputs, rows = width, -(-rows // stride)
        self.layers.extend([nn.Conv2d(inputs, inputs, (rows, 1), bias=False), nn.BatchNorm2d(inputs)])
        self.layers.append(nn.LeakyReLU(SLOPE))
        self.layers.extend(CircleBlock(inputs, angles) for _ in range(blocks))
        self.classifier = nn.Conv2d(inputs, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layers(self.grid(images))
        with full_precision(images.device):
            scores: Tensor = self.classifier(features.float()).flatten(1)
        # The angles of the grid increase clockwise.
        return scores[:, :: self.step].flip(1).roll(1, 1)


class RingConvolution(nn.Module):
    """A 3 x 3 convolution of ``(B, inputs, radii, angles)`` with circular padding, normalised, then an activation."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, width, 3, (stride, 1), (1, 0), bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        ring = torch.cat([features[..., -1:], features, features[..., :1]], dim=-1)
        return leaky_relu(self.norm(self.convolution(ring)), SLOPE)


class Harmonics(nn.Module):
    """A convolution of each map ``(B, width, 1, angles)`` over the full circle, by its lowest frequencies.

    In this form it has a quarter of the weights of a kernel over all angles, and takes a graph a few kilobytes.

    Args:
        width: number of maps.
        angles: number of angles.
        orders: number of frequencies beside the constant.
    """

    basis: Tensor

    def __init__(self, width: int, angles: int, orders: int = 8) -> None:
        super().__init__()
        orders = min(orders, angles // 2)
        phases = 2 * math.pi * torch.arange(angles)[:, None] * torch.arange(orders + 1) / angles
        basis = torch.cat([phases.cos(), phases.sin()], dim=1) * math.sqrt(2 / angles)
        self.register_buffer("basis", basis, persistent=False)
        self.gain = nn.Parameter(0.5 + 0.5 * torch.randn(orders + 1, width))
        self.quadrature = nn.Parameter(0.5 * torch.randn(orders + 1, width))

    def forward(self, features: Tensor) -> Tensor:
        basis = self.basis.to(features.dtype)
        # The maps last, as they lie in memory: this takes a quarter of the time.
        parts = basis.T @ features.squeeze(2).mT
        cosines, sines = parts[:, : len(self.gain)], parts[:, len(self.gain) :]
        # Rotate the phase of each frequency, and change its size.
        rotated = [cosines * self.gain - sines * self.quadrature, cosines * self.quadrature + sines * self.gain]
        mixed: Tensor = basis @ torch.cat(rotated, dim=1).to(features.dtype)
        return mixed.mT[:, :, None]


class CircleBlock(nn.Module):
    """``x + linear(relu(linear(harmonics(x))))`` of ``(B, width, 1, angles)``: angles are mixed first, then maps.

    Args:
        width: number of maps.
        angles: number of angles.
    """

    def __init__(self, width: int, angles: int) -> None:
        super().__init__()
        self.circle, self.norm = Harmonics(width, angles), nn.BatchNorm2d(width)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        wide = leaky_relu(self.wide(self.norm(self.circle(features))), SLOPE)
        mixed: Tensor = features + self.narrow(wide)
        return mixed
