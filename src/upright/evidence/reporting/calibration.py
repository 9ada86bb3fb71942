"""Is a model right as often as it is sure?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.evidence.intervals import Share, clustered

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

BINS = 15
"""Of equal width, as in Guo et al. 2017."""
TEMPERATURES = (0.02, 50.0)
"""Between which the best one is looked for."""


@dataclass(frozen=True)
class Reliability:
    """Answers by how sure they were, in `BINS` bins of confidence ``(low, high]``.

    Args:
        counts: of answers in each bin.
        confidence: their mean, None where there are none.
        accuracy: likewise.
    """

    counts: list[int]
    confidence: list[float | None]
    accuracy: list[Share | None]

    @classmethod
    def of(cls, probabilities: Floats, labels: Labels, groups: Labels) -> "Reliability":
        """Of ``probabilities`` ``(N, K)`` for ``labels`` ``(N,)``, about the images ``groups`` ``(N,)``."""
        sure = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
        bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
        inside = [bins == number for number in range(BINS)]
        return cls(
            [int(chosen.sum()) for chosen in inside],
            [float(sure[chosen].mean()) if chosen.any() else None for chosen in inside],
            [clustered(right[chosen], groups[chosen]) if chosen.any() else None for chosen in inside],
        )

    @property
    def filled(self) -> list[tuple[int, float, Share]]:
        """Count, confidence and accuracy of the bins that have answers."""
        rows = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return [(count, sure, right) for count, sure, right in rows if sure is not None and right is not None]

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, over the answers."""
        return sum(count * abs(sure - right.value) for count, sure, right in self.filled) / sum(self.counts)

    def figures(self) -> list[dict[str, Any]]:
        """As plain data, a row for each bin."""
        rows = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return [
            {
                "above": number / BINS,
                "to": (number + 1) / BINS,
                "count": count,
                "confidence": confidence,
                "accuracy": accuracy and accuracy._asdict(),
            }
            for number, (count, confidence, accuracy) in enumerate(rows)
        ]


def log_loss(probabilities: Floats, labels: Labels) -> float:
    """Mean negative log-likelihood, in nats."""
    return float(-_logits(probabilities)[np.arange(len(labels)), labels].mean())


def tempered(probabilities: Floats, temperature: float) -> Floats:
    """The probabilities ``(N, K)`` of the same logits, divided by ``temperature``."""
    logits = _logits(probabilities) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: Floats = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def fitted_temperature(probabilities: Floats, labels: Labels) -> float | None:
    """The one of least `log_loss` (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    The loss is convex in 1 / temperature, so its slope has one zero, which is found by bisection.

    Args:
        probabilities: ``(N, K)``, of images that the model was not trained on.
        labels: ``(N,)``.

    Returns:
        None where there is no best one within `TEMPERATURES`: if no answer is wrong, the surer the better; if none is
        better than a guess, the less sure.
    """
    logits = _logits(probabilities)
    true = logits[np.arange(len(labels)), labels]

    def slope(temperature: float) -> float:
        return float(((tempered(probabilities, temperature) * logits).sum(axis=1) - true).mean())

    low, high = TEMPERATURES
    if slope(low) <= 0 or slope(high) >= 0:
        return None
    while high / low > 1 + 1e-9:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.sqrt(low * high))


def _logits(probabilities: Floats) -> Floats:
    """Up to a constant per row, which softmax does not see."""
    logits: Floats = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return logits
