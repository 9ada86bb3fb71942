"""1,797 real handwritten digits that come with scikit-learn: no download, no account."""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.errors import UserError
from upright.images import ImageSpec
from upright.warp import resize


class Digits(ImageDataModule):
    """Optical recognition of handwritten digits (Alpaydin, Kaynak 1998; the test part of the UCI set, 43 writers).

    The originals are 8 x 8 with 17 grey levels and fill their frame. Here, in the source, they are enlarged and laid
    in the middle of a black frame, as MNIST lays its 20 pixels in 28, so that turning them cuts nothing off. Every
    image counts once in the split, whatever the number of ``angles``.

    Args:
        size: height and width of the frame.
        margin: black pixels on each side of the enlarged digit, which needs at least 8 between them.
        **options: see `ImageDataModule`.
    """

    def __init__(self, *, size: int = 28, margin: int = 4, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types
        if margin < 0 or size - 2 * margin < 8:
            raise UserError(
                f"The digits are 8x8 originals; size less twice the margin must be at least 8, "
                f"got size {size} and margin {margin}."
            )
        self.size, self.margin = size, margin

    @property
    def spec(self) -> ImageSpec:
        """Grey, 0 to 9; mean and deviation follow from those of the digits without a margin, 0.306 and 0.325."""
        filled = (1 - 2 * self.margin / self.size) ** 2
        mean = 0.306 * filled
        std = math.sqrt((0.306**2 + 0.325**2) * filled - mean**2)
        return ImageSpec(1, self.size, self.size, tuple("0123456789"), mean=(round(mean, 4),), std=(round(std, 4),))

    def read(self) -> Source:
        """All of them, from the installed package."""
        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        inner = self.size - 2 * self.margin
        framed = nn.functional.pad(resize(pixels, inner, inner).round(), [self.margin] * 4).to(torch.uint8)
        images = list(framed.permute(0, 2, 3, 1).contiguous().numpy())
        names = [f"digit-{index:04d}" for index in range(len(digits.target))]
        return Source(images, digits.target.astype(np.int64).tolist(), names)
