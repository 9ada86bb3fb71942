import numpy as np
import pytest

from upright.evidence.reporting.measures import (
    Bin,
    calibration_error,
    fitted_temperature,
    log_loss,
    reliability,
    tempered,
)


def answers(count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure by a known temperature, and labels drawn from the true ones."""
    generator = np.random.default_rng(0)
    true = generator.dirichlet(np.full(4, 0.7), count)
    labels = (generator.random((count, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(max=3)
    return tempered(true, 1 / temperature), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float) -> None:
    said, labels = answers(100_000, temperature)
    found = fitted_temperature(said, labels)
    assert found is not None and found == pytest.approx(temperature, rel=0.03)
    best = log_loss(tempered(said, found), labels)
    for other in (0.97 * found, 1.03 * found):
        assert best < log_loss(tempered(said, other), labels)
    assert calibration_error(reliability(tempered(said, found), labels, np.arange(len(labels)))) < 0.01


def test_where_no_answer_is_wrong_there_is_no_temperature() -> None:
    said, _ = answers(1000, 1)
    assert fitted_temperature(said, said.argmax(axis=1)) is None
    assert fitted_temperature(np.full((10, 4), 0.25), np.arange(10) % 4) is None


def test_a_temperature_divides_logits_and_changes_no_answer() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 5)) * 20

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    np.testing.assert_allclose(tempered(softmax(logits), 3.0), softmax(logits / 3), atol=1e-9)


def test_the_error_is_that_of_a_hand_count() -> None:
    said = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.45, 0.55]])
    found = reliability(said, np.array([0, 1, 0, 0]), np.arange(4))
    # Bins of 1/15: 0.9 lies in the 14th, 0.6 in the 9th (its upper end), 0.55 in it, too.
    assert {place: each.count for place, each in enumerate(found) if each.count} == {8: 2, 13: 2}
    assert calibration_error(found) == pytest.approx(2 / 4 * abs(0.9 - 0.5) + 2 / 4 * abs(0.575 - 0.5))
    assert found[0] == Bin(above=0, to=1 / 15, count=0, confidence=None, accuracy=None)


def test_views_of_one_image_make_accuracy_by_confidence_less_sure() -> None:
    said, labels = np.tile([[0.9, 0.1]], (40, 1)), np.repeat([0, 1], 20)
    alone, views = (reliability(said, labels, groups) for groups in (np.arange(40), np.arange(40) // 4))
    one, other = (each.accuracy for bins in (alone, views) for each in bins if each.accuracy)
    assert one.value == other.value == 0.5
    assert other.high - other.low > 1.5 * (one.high - one.low)


def test_a_probability_of_zero_is_no_infinite_loss() -> None:
    assert np.isfinite(log_loss(np.array([[1.0, 0.0]]), np.array([1])))
