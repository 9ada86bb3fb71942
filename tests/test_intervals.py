import numpy as np
import pytest

from upright.intervals import clustered, wilson


def test_wilsons_interval_matches_published_values() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for correct, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        share = wilson(correct / count, count)
        assert share.low == pytest.approx(low, abs=5e-5) and share.high == pytest.approx(high, abs=5e-5)
    assert wilson(1 / 29, 29).low == pytest.approx(0.0061, abs=5e-5)


def test_views_that_always_agree_count_as_one() -> None:
    correct = np.random.default_rng(0).random(400) < 0.9
    equal_views = clustered(np.repeat(correct, 5), np.repeat(np.arange(400), 5))
    assert equal_views == pytest.approx(wilson(float(correct.mean()), 400), abs=1e-3)
    assert clustered(correct, np.arange(400)) == wilson(float(correct.mean()), 400)


def test_independent_views_count_individually() -> None:
    correct = np.random.default_rng(0).random(20_000) < 0.9
    groups = np.repeat(np.arange(4000), 5)
    share, expected = clustered(correct, groups), wilson(float(correct.mean()), 20_000)
    assert share.high - share.low == pytest.approx(expected.high - expected.low, rel=0.05)


def test_the_interval_covers_the_true_share_at_its_rate() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        # A fifth of the images are hard, so the errors of their views are correlated.
        easy = generator.random(150)[:, None] < 0.8
        correct = generator.random((150, 4)) < np.where(easy, 0.98, 0.6)
        share = clustered(correct.flatten(), np.repeat(np.arange(150), 4))
        inside += share.low <= 0.8 * 0.98 + 0.2 * 0.6 <= share.high
    assert 0.93 <= inside / 1000 <= 0.97


def test_the_interval_covers_the_share_for_different_numbers_of_views() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        groups = np.repeat(np.arange(60), generator.integers(1, 6, 60))
        share = clustered((generator.random(60) < 0.8)[groups], groups)
        inside += share.low <= 0.8 <= share.high
    assert 0.94 <= inside / 1000 <= 0.97


def test_the_interval_of_only_correct_predictions_has_a_width() -> None:
    share = clustered(np.ones(50, bool), np.repeat(np.arange(10), 5))
    assert share.value == share.high == 1 and share.low == pytest.approx(wilson(1, 10).low)
