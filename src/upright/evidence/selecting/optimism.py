"""Estimate the optimism, which is the selection bias in the score of the best of M models, chosen on N images."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CHUNK = 100
"""Number of resamples that are drawn together. A larger number needs more memory."""


def resampled(scores: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Return the noise of the means, ``(B, M)``: the means of B bootstrap samples minus the means of all images.

    ``scores`` ``(M, N)`` are those of each model on each independent image, in [0, 1]; for an image with several views,
    the mean over its views. All models have the same images in a bootstrap sample, because they share the images of the
    split.
    """
    generator = np.random.default_rng(seed)
    # Most images have the same pattern of scores over the models. So draw only the number of images of each pattern.
    patterns, counts = np.unique(scores, axis=1, return_counts=True)
    images = scores.shape[1]
    means = [
        generator.multinomial(images, counts / images, size=min(CHUNK, resamples - start)) @ patterns.T / images
        for start in range(0, resamples, CHUNK)
    ]
    noise: Floats = np.concatenate(means) - scores.mean(axis=1)
    return noise


def optimism(means: Floats, noise: Floats) -> float:
    """Return a bootstrap estimate of the difference between the best mean and the true mean of the chosen model.

    ``means`` ``(M,)`` are the measured ones, and ``noise`` ``(B, M)`` is from `resampled`. In each bootstrap sample the
    best model is chosen, and its mean there is compared with its mean on all images (Efron 1983; for a choice among
    models see Cawley and Talbot 2010, Tibshirani and Tibshirani 2009). The measured means already contain the noise of
    one sample, so equal models look unequal, and this comparison yields ``1 / sqrt(2)`` of their optimism. A comparison
    with the images outside of the bootstrap sample yields ``sqrt(2)`` of it. The geometric mean of the two is correct
    for equal models. For models that differ by more than noise, the estimate is too large: for two models whose
    difference d has a standard deviation s, by the factor ``exp(d^2 / 4 s^2)``. The excess is never more than a tenth
    of s.
    """
    winners = (means + noise).argmax(axis=1)
    # The noise of the measured best has a mean of 0. Subtracting it reduces the variance of the estimate.
    luck = noise - noise[:, [means.argmax()]]
    return float(np.sqrt(2) * luck[np.arange(len(luck)), winners].mean())
