"""Fixed views of an image in validation and test: the image itself, or the image under several known transforms."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from upright.warp import Padding, pixel_centres, rotation, sample, transform_points


class Views(ABC):
    """``V`` fixed views of every image of a split.

    Args:
        names: names of the views, for files and plots; a single empty name stands for the unchanged image.
    """

    unit = ""
    """Unit of the names, for plots."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @property
    def plain(self) -> bool:
        """True if the only view of an image is the unchanged image."""
        return self.names == ("",)

    @property
    def key(self) -> tuple[str, ...]:
        """The part of the name of a cache that depends on the views."""
        return self.names

    @abstractmethod
    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the views ``(n, V, C, H, W)`` of float ``images`` ``(n, C, h, w)``, rounded to 0, 1, ... 255.

        The views of an image must not depend on the other images. ``indices`` ``(n,)`` are those in the source.
        """

    @abstractmethod
    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        """Return the transforms of `show`, from output to input coordinates, ``(n, V, 3, 3)``.

        ``aspects`` ``(n,)`` are width / height of each image as the network gets it.
        """


class Angles(Views):
    """Images rotated anticlockwise by each of ``angles``, in degrees, with ``padding`` beyond their border."""

    unit = "°"

    def __init__(self, angles: Sequence[float], padding: Padding = "zeros") -> None:
        super().__init__([""] if list(angles) == [0] else [f"{angle:+g}" if angle else "0" for angle in angles])
        self.angles, self.padding = tuple(angles), padding

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.names, self.padding)

    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        return torch.stack([_rotate(images, angle, self.padding) for angle in self.angles], dim=1)

    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        count = len(self.angles)
        angles = torch.tensor(self.angles).deg2rad().repeat(len(indices))
        return rotation(angles, aspects.repeat_interleave(count)).reshape(len(indices), count, 3, 3)


def _rotate(images: Tensor, angle: float, padding: Padding) -> Tensor:
    if angle == 0:
        return images
    height, width = images.shape[-2:]
    matrix = rotation(torch.tensor([angle]).deg2rad(), width / height)
    points = transform_points(matrix, pixel_centres(height, width)).expand(len(images), -1, -1)
    return sample(images, points, height, width, padding).round().clamp(0, 255)
