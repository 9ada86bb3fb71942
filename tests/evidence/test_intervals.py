import numpy as np
import pytest

from upright.evidence.intervals import clustered, wilson


def test_wilson_is_that_of_the_paper_of_newcombe() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        share = wilson(right / count, count)
        assert share.low == pytest.approx(low, abs=5e-5) and share.high == pytest.approx(high, abs=5e-5)
    assert wilson(1 / 29, 29).low == pytest.approx(0.0061, abs=5e-5)


def test_views_that_always_agree_count_as_one() -> None:
    right = np.random.default_rng(0).random(400) < 0.9
    alike = clustered(np.repeat(right, 5), np.repeat(np.arange(400), 5))
    assert alike == pytest.approx(wilson(float(right.mean()), 400), abs=1e-3)
    assert clustered(right, np.arange(400)) == wilson(float(right.mean()), 400)


def test_views_that_know_nothing_of_each_other_count_each() -> None:
    right = np.random.default_rng(0).random(20_000) < 0.9
    groups = np.repeat(np.arange(4000), 5)
    found, each = clustered(right, groups), wilson(float(right.mean()), 20_000)
    assert found.high - found.low == pytest.approx(each.high - each.low, rel=0.05)


def test_the_interval_holds_what_it_promises() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        # A fifth of the images are hard: their views go wrong together.
        easy = generator.random(150)[:, None] < 0.8
        right = generator.random((150, 4)) < np.where(easy, 0.98, 0.6)
        share = clustered(right.flatten(), np.repeat(np.arange(150), 4))
        inside += share.low <= 0.8 * 0.98 + 0.2 * 0.6 <= share.high
    assert 0.93 <= inside / 1000 <= 0.97


def test_it_holds_where_images_have_more_and_fewer_views_that_agree() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        groups = np.repeat(np.arange(60), generator.integers(1, 6, 60))
        share = clustered((generator.random(60) < 0.8)[groups], groups)
        inside += share.low <= 0.8 <= share.high
    assert 0.94 <= inside / 1000 <= 0.97


def test_all_right_is_not_certain() -> None:
    share = clustered(np.ones(50, bool), np.repeat(np.arange(10), 5))
    assert share.value == share.high == 1 and share.low == pytest.approx(wilson(1, 10).low)
