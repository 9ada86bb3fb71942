"""What the best of M scores is worth, once it has been chosen for being the best, and which others may be the best.

Scores are ``(M, N)``: of each candidate on each of N independent images, in [0, 1]; where an image is shown in several
views, the mean over them.
"""

from math import log, sqrt

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DELTA = 0.05
RESAMPLES = 2000
CHUNK = 100
"""Resamples that are drawn at once: with the images that set candidates apart, this is what takes memory."""


def hoeffding(models: int, images: int, delta: float = DELTA) -> float:
    """How far the measured mean of any of the models may be from its true one, whatever the variance.

    Of ``P <= 2 M exp(-2 N eps^2)``, Hoeffding's inequality (1963) and the union bound (Shalev-Shwartz and Ben-David
    2014, section 11.2): the eps at which this is ``delta``.

    Args:
        models: M.
        images: N.
        delta: probability that it does not hold.
    """
    return sqrt(log(2 * models / delta) / (2 * images))


def empirical_bernstein(scores: Floats, models: int, delta: float = DELTA) -> float:
    """How far below its measured mean the true mean of the chosen model may be.

    ``sqrt(2 V L / N) + 7 L / (3 (N - 1))`` with ``L = ln(2 M / delta)`` and V the sample variance: Maurer and Pontil
    (2009), "Empirical Bernstein bounds and sample variance penalization", theorem 4, and corollary 5 for a finite
    class. Near an accuracy of 1 the variance is small, and this is several times less than Hoeffding's.

    Args:
        scores: of the chosen model, ``(N,)``, at least 2.
        models: M that it was chosen from.
        delta: probability that it does not hold.
    """
    images, level = len(scores), log(2 * models / delta)
    return sqrt(2 * float(scores.var(ddof=1)) * level / images) + 7 * level / (3 * (images - 1))


def interval(scores: Floats) -> tuple[float, float]:
    """The interval of 95 % of a mean that nobody has chosen.

    Two images all right and two all wrong are added, then it is the normal one (Agresti and Coull 1998, for shares).

    Args:
        scores: ``(N,)``.
    """
    adjusted = np.append(scores, [1.0, 1.0, 0.0, 0.0])
    mean, half = float(adjusted.mean()), 1.96 * float(adjusted.std()) / sqrt(len(adjusted))
    return max(0.0, mean - half), min(1.0, mean + half)


def resampled(scores: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """What chance does to the means, ``(B, M)``: of B samples of N images, drawn with replacement, less those of all.

    Every candidate is judged by the same images, and so is each in a resample: what is hard for all moves all.

    Args:
        scores: ``(M, N)``.
        seed: of the draws.
        resamples: B.
    """
    generator = np.random.default_rng(seed)
    # Most images are answered alike by all; how often each pattern of answers is drawn is all that counts.
    patterns, counts = np.unique(scores, axis=1, return_counts=True)
    images = scores.shape[1]
    drawn = [
        generator.multinomial(images, counts / images, size=min(CHUNK, resamples - start)) @ patterns.T / images
        for start in range(0, resamples, CHUNK)
    ]
    found: Floats = np.concatenate(drawn) - scores.mean(axis=1)
    return found


def optimism(means: Floats, noise: Floats) -> float:
    """By how much the best mean is better than what it is the mean of, by the bootstrap.

    In each resample the best is chosen, and its mean there compared with its mean on all images: Efron's optimism
    (1983; of the choice among models see Cawley and Talbot 2010, Tibshirani and Tibshirani 2009). Resamples start from
    means that hold one measurement's chance already, by which equals look unequal: of the optimism among equals this
    finds ``1 / sqrt(2)``. Compared with the images outside the resample ("out of bag") it is twice that, for it is as
    if half of the images chose. The geometric mean of the two is right for equals. Where candidates differ by more than
    chance, and there is little optimism, it is too large: for two whose difference d has a standard deviation s,
    ``exp(d^2 / 4 s^2)`` times, which is never more than a tenth of s.

    Args:
        means: measured, ``(M,)``.
        noise: of `resampled`, ``(B, M)``.
    """
    chosen = (means + noise).argmax(axis=1)
    # The luck of the one that is the best of all images has a mean of 0; without it fewer resamples do.
    luck = noise - noise[:, [means.argmax()]]
    return sqrt(2) * float(luck[np.arange(len(luck)), chosen].mean())


def may_be_best(scores: Floats, noise: Floats) -> Floats:
    """For every candidate the p-value of "none of the others is truly better", ``(M,)``.

    The largest of its studentised paired differences to all others is compared with what that is in resamples about
    their means: White's reality check (2000) with the candidate as the benchmark. The maximum accounts for the number
    of others. One candidate is truly the best, so those of p > 0.05 hold it with 95 %, as in Gupta's subset selection
    (1965) and Hsu's comparisons with the best (1984). The model confidence set (Hansen, Lunde and Nason 2011) asks for
    all that are equally good at once; McNemar's tests with Holm's correction know nothing of what candidates have in
    common, nor of views.

    Args:
        scores: ``(M, N)``.
        noise: of `resampled`, ``(B, M)``.
    """
    images, means = scores.shape[1], scores.mean(axis=1)
    covariance = np.atleast_2d(np.cov(scores, bias=True))
    variance = np.diag(covariance)
    # As in `exporting.parity.Drop`, one image more is lost and one more is gained: few differences say little of their
    # variance, and none says nothing.
    squares = images * (variance[:, None] + variance - 2 * covariance) + 2
    errors = np.sqrt(squares) / images  # (M, M)
    found = np.empty(len(means))
    for candidate, error in enumerate(errors):
        measured = ((means - means[candidate]) / error).max()
        drawn = ((noise - noise[:, [candidate]]) / error).max(axis=1)
        found[candidate] = (1 + (drawn >= measured - 1e-9).sum()) / (1 + len(drawn))
    return found
