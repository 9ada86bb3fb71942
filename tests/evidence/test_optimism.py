"""Optimism and bounds, compared with computations by hand and with simulations of known accuracies."""

from collections.abc import Iterator

import numpy as np
import pytest

from upright.evidence.selecting.optimism import Floats, optimism, resampled
from upright.evidence.studies.selection import empirical_bernstein, hoeffding
from upright.intervals import clustered

SIMULATIONS = 500


@pytest.mark.parametrize(
    ("images", "models", "points"),
    [(5_000, 1, 1.92), (5_000, 10, 2.45), (5_000, 100, 2.88), (5_000, 1000, 3.26), (10_000, 1000, 2.30)],
)
def test_hoeffding_and_the_union_bound(images: int, models: int, points: float) -> None:
    bound = hoeffding(models, images)
    assert 100 * bound == pytest.approx(points, abs=0.005)
    assert 2 * models * np.exp(-2 * images * bound**2) == pytest.approx(0.05)


def test_the_empirical_bernstein_bound() -> None:
    one_wrong = np.append(np.ones(99), 0.0)
    # V = 0.01, L = ln(40): sqrt(2 * 0.01 * 3.6889 / 100) + 7 * 3.6889 / (3 * 99)
    assert empirical_bernstein(one_wrong, 1) == pytest.approx(0.027162 + 0.086943, abs=2e-6)
    # Without errors, the bound is 7 L / (3 (N - 1)), L = ln(400).
    assert empirical_bernstein(np.ones(1000), 10) == pytest.approx(7 * 5.991465 / 2997, rel=1e-6)
    near_one = np.append(np.ones(9900), np.zeros(100))
    assert empirical_bernstein(near_one, 100) < hoeffding(100, 10_000) / 3


def test_resamples_have_the_right_moments_and_depend_on_the_seed() -> None:
    generator = np.random.default_rng(0)
    scores = draw(generator, np.array([0.9, 0.9, 0.8]), 400)
    noise = resampled(scores, seed=3, resamples=4000)
    assert noise.shape == (4000, 3) and (noise == resampled(scores, seed=3, resamples=4000)).all()
    assert (noise != resampled(scores, seed=4, resamples=4000)).any()
    # Compare with the mean and the covariance of a mean of 400 images.
    assert np.abs(noise.mean(axis=0)).max() < 4 * np.sqrt(0.16 / 400 / 4000)
    assert np.cov(noise.T) == pytest.approx(np.cov(scores, bias=True) / 400, rel=0.15, abs=2e-5)


def draw(generator: np.random.Generator, accuracies: Floats, images: int, in_common: float = 0.6) -> Floats:
    """Draw scores of candidates with known accuracies. A share of the difficulty is common to all candidates."""
    candidates = len(accuracies)
    hard = np.where(
        generator.random((candidates, images)) < in_common,
        generator.random(images),
        generator.random((candidates, images)),
    )
    return (hard < accuracies[:, None]).astype(float)


def selections(accuracies: Floats, images: int) -> Iterator[tuple[Floats, Floats]]:
    generator = np.random.default_rng(0)
    for seed in range(SIMULATIONS):
        scores = draw(generator, accuracies, images)
        yield scores, resampled(scores, seed, resamples=300)


EQUALS = np.full(10, 0.98)
CLOSE = np.linspace(0.96, 0.98, 10)
ONE_IN_FRONT = np.append(np.full(9, 0.95), 0.985)
WITH_BAD_ONES = np.append(np.full(6, 0.98), np.full(6, 0.5))


@pytest.mark.parametrize(
    ("accuracies", "least", "most"),
    [(EQUALS, 0.85, 1.15), (WITH_BAD_ONES, 0.85, 1.15), (CLOSE, 0.9, 1.45)],
    ids=["equals", "equals and bad ones", "close"],
)
def test_the_optimism_matches_the_loss_of_the_chosen_model(accuracies: Floats, least: float, most: float) -> None:
    losses, estimates, covered = [], [], []
    for scores, noise in selections(accuracies, 1000):
        means = scores.mean(axis=1)
        chosen = means.argmax()
        # Subtract the common effect of the images on all candidates, which has a mean of 0.
        luck = means - accuracies
        losses.append(luck[chosen] - luck[: (accuracies > 0.9).sum()].mean())
        estimates.append(optimism(means, noise))
        share = clustered(scores[chosen] == 1, np.arange(scores.shape[1]))
        covered.append(share.low - estimates[-1] <= accuracies[chosen] <= share.high - estimates[-1])
    assert least < np.mean(estimates) / np.mean(losses) < most
    # Coverage of the interval after subtracting the optimism: 0.95, minus two standard errors of 500 simulations.
    assert np.mean(covered) >= 0.93


def test_a_clearly_best_model_has_no_optimism() -> None:
    estimates = [optimism(scores.mean(axis=1), noise) for scores, noise in selections(ONE_IN_FRONT, 1000)]
    assert np.mean(estimates) < 1e-4


def test_equal_predictions_have_no_optimism() -> None:
    twins = np.repeat(draw(np.random.default_rng(0), ONE_IN_FRONT, 3000)[:1], 3, axis=0)
    assert optimism(twins.mean(axis=1), resampled(twins)) == 0
