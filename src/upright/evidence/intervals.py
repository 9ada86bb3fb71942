"""Shares with a 95 % interval."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = NormalDist().inv_cdf(0.975)


class Share(NamedTuple):
    """A share with the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(share: float, count: float) -> Share:
    """Return the score interval of Wilson (1927), which stays inside [0, 1].

    Args:
        share: observed share, from 0 to 1.
        count: number of independent trials. An effective number may be fractional, which SciPy's function refuses.
    """
    square = Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * (share * (1 - share) / count + square / (4 * count)) ** 0.5
    # Without rounding, an interval of 0 begins at 0 and an interval of 1 ends at 1.
    return Share(share, max(centre - half, 0.0) if share else 0.0, centre + half if share < 1 else 1.0)


def clustered(right: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> Share:
    """Return Wilson's interval for answers to several views of each image, which are not independent.

    The number of answers is divided by the design effect (Kish 1965): the variance of the share as a ratio over groups,
    divided by the variance of as many independent answers. The effective number is at most the number of answers, and
    at least the number for groups whose views all agree. If all answers are alike, it equals that minimum.

    Args:
        right: True for each correct answer, ``(n,)``.
        groups: the source image of each answer, ``(n,)``.
    """
    share, count = float(right.mean()), len(right)
    _, group_indices = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_indices)
    number = len(sizes)
    if number == count:
        return wilson(share, count)
    minimum = count**2 / float(np.square(sizes).sum())
    if share in (0.0, 1.0) or number == 1:
        return wilson(share, minimum)
    residuals = np.bincount(group_indices, right) - share * sizes
    variance = number / (number - 1) * float(np.square(residuals).sum()) / count**2
    effective = share * (1 - share) / variance if variance else count
    return wilson(share, min(max(effective, minimum), count))
