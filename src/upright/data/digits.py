"""1,797 real handwritten digits that come with scikit-learn: no download, no account."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from upright.data.datamodule import ImageDataModule, Source
from upright.errors import UprightError
from upright.images import ImageSpec
from upright.warp import resize


class Digits(ImageDataModule):
    """Optical recognition of handwritten digits (Alpaydin, Kaynak 1998; the test part of the UCI set, 43 writers).

    The originals are 8 x 8 with 17 grey levels; they are enlarged to ``size`` here, in the source, so that turning
    them loses little. Every image counts once in the split, whatever the number of ``angles``.

    Args:
        size: height and width of the enlarged digit, at least 8.
        **options: see `ImageDataModule`.
    """

    def __init__(self, *, size: int = 28, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types
        if size < 8:
            raise UprightError(f"The digits are 8x8 originals; size must be at least 8, got {size}.")
        self.size = size

    @property
    def spec(self) -> ImageSpec:
        """Grey, 0 to 9; mean and deviation of the digits at 28 pixels."""
        return ImageSpec(1, self.size, self.size, tuple("0123456789"), mean=(0.306,), std=(0.325,))

    def read(self) -> Source:
        """All of them, from the installed package."""
        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        enlarged = resize(pixels, self.size, self.size).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        names = [f"digit-{index:04d}" for index in range(len(digits.target))]
        return Source(list(enlarged.numpy()), digits.target.astype(np.int64).tolist(), names)
