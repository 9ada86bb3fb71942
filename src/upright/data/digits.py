"""1,797 real handwritten digits that come with scikit-learn, without a download."""

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

    The originals are 8 x 8 with 17 grey levels and fill their frame. They are enlarged and centred in a black frame, as
    MNIST centres its 20 pixels in 28, so that a rotation cuts nothing off.

    Args:
        size: height and width of the frame.
        margin: black pixels on each side; at least 8 pixels must remain for the digit.
        **options: options of `ImageDataModule`.
    """

    def __init__(self, *, size: int = 28, margin: int = 4, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types
        if margin < 0 or size - 2 * margin < 8:
            raise UserError(
                f"The digits are 8x8 originals; size less twice the margin must be at least 8, "
                f"got size {size} and margin {margin}."
            )
        self.size, self.margin = size, margin

    @property
    def spec(self) -> ImageSpec:
        # Mean and deviation of the digits without a margin are 0.306 and 0.325.
        area = (1 - 2 * self.margin / self.size) ** 2
        mean = 0.306 * area
        std = math.sqrt((0.306**2 + 0.325**2) * area - mean**2)
        return ImageSpec(1, self.size, self.size, tuple("0123456789"), mean=(round(mean, 4),), std=(round(std, 4),))

    def read(self) -> Source:
        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        inner = self.size - 2 * self.margin
        framed = nn.functional.pad(resize(pixels, inner, inner).round(), [self.margin] * 4).to(torch.uint8)
        images = list(framed.permute(0, 2, 3, 1).contiguous().numpy())
        names = [f"digit-{index:04d}" for index in range(len(digits.target))]
        return Source(images, digits.target.astype(np.int64).tolist(), names)
