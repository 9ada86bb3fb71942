"""How validation and test show an image: once as it is, or several times, each view a known transform as uint8."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from upright.warp import pixel_centres, rotation, sample, transform_points


class Views(ABC):
    """What every image of a split is shown as: ``V`` pictures, the same ones every time.

    Args:
        names: of the views, for file names and pictures; a single empty one is the image as it is.
    """

    unit = ""
    """Of the names, in pictures."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @property
    def plain(self) -> bool:
        """Whether every image is shown once, as it is."""
        return self.names == ("",)

    @abstractmethod
    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        """The views of float ``images`` ``(n, C, h, w)`` in [0, 255], whole grey levels: ``(n, V, C, H, W)``.

        Args:
            images: of one size. What is made of one must not depend on which others it comes with.
            indices: which images of the source they are, int64 ``(n,)``.
        """

    @abstractmethod
    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        """What `show` does, from output to input coordinates: ``(n, V, 3, 3)``.

        Args:
            indices: which images of the source.
            aspects: width / height of each, as the network gets them, ``(n,)``.
        """


class Angles(Views):
    """Turned anticlockwise by each of these degrees.

    Args:
        angles: in degrees.
    """

    unit = "°"

    def __init__(self, angles: Sequence[float]) -> None:
        super().__init__([""] if list(angles) == [0] else [f"{angle:+g}" if angle else "0" for angle in angles])
        self.angles = tuple(angles)

    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `Views.show`."""
        return torch.stack([_turned(images, angle) for angle in self.angles], dim=1)

    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        """See `Views.transforms`."""
        count = len(self.angles)
        angles = torch.tensor(self.angles).deg2rad().repeat(len(indices))
        return rotation(angles, aspects.repeat_interleave(count)).reshape(len(indices), count, 3, 3)


def _turned(images: Tensor, angle: float) -> Tensor:
    if angle == 0:
        return images
    height, width = images.shape[-2:]
    turn = rotation(torch.tensor([angle]).deg2rad(), width / height)
    points = transform_points(turn, pixel_centres(height, width)).expand(len(images), -1, -1)
    return sample(images, points, height, width).round().clamp(0, 255)
