import numpy as np
import pytest

from upright.evidence.reporting.measures import (
    apply_temperature,
    calibration_error,
    fit_temperature,
    log_loss,
    reliability,
)


def overconfident(count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities that need ``temperature``, and labels that are drawn from the true probabilities."""
    generator = np.random.default_rng(0)
    true = generator.dirichlet(np.full(4, 0.7), count)
    labels = (generator.random((count, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(max=3)
    return apply_temperature(true, 1 / temperature), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_fitted(temperature: float) -> None:
    probabilities, labels = overconfident(100_000, temperature)
    fitted = fit_temperature(probabilities, labels)
    assert fitted is not None and fitted == pytest.approx(temperature, rel=0.03)
    best = log_loss(apply_temperature(probabilities, fitted), labels)
    for other in (0.97 * fitted, 1.03 * fitted):
        assert best < log_loss(apply_temperature(probabilities, other), labels)
    bins = reliability(apply_temperature(probabilities, fitted), labels, np.arange(len(labels)))
    assert calibration_error(bins) < 0.01


def test_without_wrong_predictions_there_is_no_temperature() -> None:
    probabilities, _ = overconfident(1000, 1)
    assert fit_temperature(probabilities, probabilities.argmax(axis=1)) is None
    assert fit_temperature(np.full((10, 4), 0.25), np.arange(10) % 4) is None


def test_a_temperature_divides_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 5)) * 20

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    np.testing.assert_allclose(apply_temperature(softmax(logits), 3.0), softmax(logits / 3), atol=1e-9)


def test_the_calibration_error_matches_a_computation_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.45, 0.55]])
    bins = reliability(probabilities, np.array([0, 1, 0, 0]), np.arange(4))
    # The bins have a width of 1/15: 0.9 is in the 14th; 0.55 and 0.6, the upper end, are in the 9th.
    assert {index: each["count"] for index, each in enumerate(bins) if each["count"]} == {8: 2, 13: 2}
    assert calibration_error(bins) == pytest.approx(2 / 4 * abs(0.9 - 0.5) + 2 / 4 * abs(0.575 - 0.5))
    assert bins[0] == {"above": 0, "to": 1 / 15, "count": 0, "confidence": None, "accuracy": None}


def test_views_of_one_image_widen_the_interval_of_a_bin() -> None:
    probabilities, labels = np.tile([[0.9, 0.1]], (40, 1)), np.repeat([0, 1], 20)
    single, views = (reliability(probabilities, labels, groups) for groups in (np.arange(40), np.arange(40) // 4))
    one, other = (each["accuracy"] for bins in (single, views) for each in bins if each["accuracy"])
    assert one.value == other.value == 0.5
    assert other.high - other.low > 1.5 * (one.high - one.low)


def test_the_loss_of_a_probability_of_zero_is_finite() -> None:
    assert np.isfinite(log_loss(np.array([[1.0, 0.0]]), np.array([1])))
