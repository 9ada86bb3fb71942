"""Augmentation of a whole batch on its device: one transform per image, one sampling, and the transforms handed on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from upright.errors import UprightError
from upright.warp import full_precision, identity, rotation, warp


class Geometric(nn.Module, ABC):
    """A random transform of where pixels are, as a matrix; `Augmentation` composes and samples."""

    @abstractmethod
    def matrices(self, batch: int, aspect: float) -> Tensor:
        """``batch`` matrices ``(B, 3, 3)`` from output to input coordinates, on the CPU.

        Args:
            batch: how many.
            aspect: width / height of the images.
        """


class RandomAffine(Geometric):
    """Rotate, scale, shear, shift and flip at random, uniformly in each range.

    Args:
        rotate: up to so many degrees either way.
        scale: least and greatest factor of size.
        shear: up to so many degrees either way, along x.
        shift: up to this fraction of the image either way, along x and along y.
        flip: probability of a mirror image.
    """

    def __init__(
        self,
        *,
        rotate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
        shift: float = 0.0,
        flip: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise UprightError(f"scale needs 0 < least <= greatest, got {list(scale)}.")
        if not 0 <= flip <= 1:
            raise UprightError(f"flip is a probability from 0 to 1, got {flip}.")
        if not abs(shear) < 90:
            raise UprightError(f"shear must be below 90 degrees, got {shear}.")
        self.rotate, self.scale, self.shear, self.shift, self.flip = rotate, scale, shear, shift, flip

    def matrices(self, batch: int, aspect: float) -> Tensor:
        """See `Geometric.matrices`."""
        # Always six draws per image, in this order: switching one option leaves the others' numbers as they were.
        turn, size, slant, mirror, *shifts = torch.rand(6, batch)
        matrices = rotation(math.radians(self.rotate) * (2 * turn - 1), aspect)
        inner = identity(batch).clone()
        inner[:, 0, 0] = torch.where(mirror < self.flip, -1.0, 1.0)
        inner[:, 0, 1] = torch.tan(math.radians(self.shear) * (2 * slant - 1)) / aspect
        inner[:, :2] /= (self.scale[0] + (self.scale[1] - self.scale[0]) * size)[:, None, None]
        matrices = inner @ matrices
        # A shift by the whole image is 2 in normalised coordinates.
        matrices[:, :2, 2] = 2 * self.shift * (2 * torch.stack(shifts, dim=1) - 1)
        return matrices


class Augmented(NamedTuple):
    """Float images ``(B, C, H, W)`` in [0, 255], and the transform ``(B, 3, 3)`` that was done to each."""

    images: Tensor
    transforms: Tensor


class Augmentation(nn.Module):
    """The parts one after the other; neighbouring geometric ones are composed and sampled once.

    Args:
        parts: `Geometric` ones, or any ``nn.Module`` from a float batch ``(B, C, H, W)`` in [0, 255] to another.
            ``transforms`` knows only of the geometric ones.
    """

    def __init__(self, parts: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def moves(self) -> bool:
        """Whether any part is geometric."""
        return any(isinstance(part, Geometric) for part in self.parts)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Augmented:
        """uint8 or float ``images`` ``(B, C, H, W)`` in [0, 255]."""
        # Matrices are composed on the CPU.
        with full_precision(images.device), full_precision(torch.device("cpu")):
            return self._augmented(images.float())

    def _augmented(self, images: Tensor) -> Augmented:
        batch, aspect = len(images), images.shape[-1] / images.shape[-2]
        done = pending = identity(batch)
        unsampled = False
        for part in self.parts:
            if isinstance(part, Geometric):
                pending, unsampled = pending @ part.matrices(batch, aspect), True
                continue
            if unsampled:
                images, done = warp(images, pending.to(images.device)), done @ pending
                pending, unsampled = identity(batch), False
            images = part(images)
        if unsampled:
            images, done = warp(images, pending.to(images.device)), done @ pending
        return Augmented(images, done.to(images.device))
