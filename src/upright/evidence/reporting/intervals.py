"""How sure a share is."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
"""Of the normal distribution, for 95 %."""


class Share(NamedTuple):
    """A share with its interval of 95 %."""

    value: float
    low: float
    high: float


def wilson(share: float, count: float) -> Share:
    """The score interval of Wilson (1927), which stays inside [0, 1] and holds near its ends, too.

    Args:
        share: that was seen, from 0 to 1.
        count: of independent trials.
    """
    square = Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * (share * (1 - share) / count + square / (4 * count)) ** 0.5
    # At its ends the interval ends there, but for rounding.
    return Share(share, max(centre - half, 0.0) if share else 0.0, centre + half if share < 1 else 1.0)


def clustered(right: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> Share:
    """Wilson's interval for answers to several views of each image, which are not independent.

    Their number is divided by the design effect (Kish 1965): the variance of the share as a ratio over groups, by that
    of as many independent answers. It counts for no more than that of answers, and for no less than groups would that
    each agree, which is their number if they are equally large; for that where all answers are alike, and nothing is
    seen of how they vary. One view of each: Wilson's own.

    Args:
        right: by answer.
        groups: the image that each one is of.
    """
    share, count = float(right.mean()), len(right)
    _, places = np.unique(groups, return_inverse=True)
    sizes = np.bincount(places)
    number = len(sizes)
    if number == count:
        return wilson(share, count)
    least = count**2 / float(np.square(sizes).sum())
    if share in (0.0, 1.0) or number == 1:
        return wilson(share, least)
    residuals = np.bincount(places, right) - share * sizes
    variance = number / (number - 1) * float(np.square(residuals).sum()) / count**2
    effective = share * (1 - share) / variance if variance else count
    return wilson(share, min(max(effective, least), count))
