"""Compute 95 % intervals of shares."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = NormalDist().inv_cdf(0.975)


class Share(NamedTuple):
    """A share and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(share: float, count: float) -> Share:
    """Return the score interval of Wilson (1927), which stays inside [0, 1].

    Args:
        share: observed share, from 0 to 1.
        count: number of independent trials. It may be fractional, which SciPy's function does not accept.
    """
    square = Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * (share * (1 - share) / count + square / (4 * count)) ** 0.5
    # The interval of share 0 begins at exactly 0, and that of share 1 ends at exactly 1, without rounding errors.
    return Share(share, max(centre - half, 0.0) if share else 0.0, centre + half if share < 1 else 1.0)


def clustered(correct: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> Share:
    """Return Wilson's interval for predictions on several views of each image, which are not independent.

    The number of predictions is divided by the design effect (Kish 1965). This is the variance of the share as a ratio
    over groups, divided by the variance of as many independent predictions. The effective number is at most the number
    of predictions. It is at least the number for groups whose views all agree, and equals this minimum if all
    predictions are correct or all are wrong.

    Args:
        correct: True for each correct prediction, ``(n,)``.
        groups: index of the source image of each prediction, ``(n,)``.
    """
    share, count = float(correct.mean()), len(correct)
    _, group_indices = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_indices)
    number = len(sizes)
    if number == count:
        return wilson(share, count)
    minimum = count**2 / float(np.square(sizes).sum())
    if share in (0.0, 1.0) or number == 1:
        return wilson(share, minimum)
    residuals = np.bincount(group_indices, correct) - share * sizes
    variance = number / (number - 1) * float(np.square(residuals).sum()) / count**2
    effective = share * (1 - share) / variance if variance else count
    return wilson(share, min(max(effective, minimum), count))
