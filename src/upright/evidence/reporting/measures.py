"""Measure accuracy, differences and calibration of models on the same images."""

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torchmetrics import MeanMetric
from tqdm import tqdm

from upright.data.datamodule import ImageDataModule
from upright.evidence.reporting.subjects import Floats, Subject
from upright.exporting.parity import Drop
from upright.intervals import clustered
from upright.training.metrics import class_scores
from upright.training.uprightness import Uprightness

Integers = npt.NDArray[np.int64]

TOP_K = (2, 5)
LISTED_MISTAKES = 24
BINS = 15
"""Bins of confidence, of equal width, as in Guo et al. 2017."""
TEMPERATURES = (0.02, 50.0)
"""Range in which a temperature is searched."""


@dataclass(eq=False)
class Predictions:
    """The predictions of a model for a split.

    Args:
        probabilities: probabilities of the classes, ``(N, K)``.
        labels: true classes, ``(N,)``.
        groups: index of the source image of each prediction, ``(N,)``.
        uprightness: measures of `Uprightness` over the views of the split, by name; None without rotated views or
            without observations.
        votes_confidence: mean confidence of the transformers' votes; None without votes.
    """

    probabilities: Floats
    labels: Integers
    groups: Integers
    uprightness: dict[str, float] | None = None
    votes_confidence: float | None = None

    @cached_property
    def classes(self) -> Integers:
        """Predicted classes, ``(N,)``."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @cached_property
    def correct(self) -> npt.NDArray[np.bool_]:
        """True for each correct prediction, ``(N,)``."""
        return np.asarray(self.classes == self.labels)

    @cached_property
    def confusion(self) -> Tensor:
        """Number of predictions by true class (row) and predicted class (column), ``(K, K)``."""
        classes = range(self.probabilities.shape[1])
        return torch.from_numpy(confusion_matrix(self.labels, self.classes, labels=classes))

    @cached_property
    def mistakes(self) -> Integers:
        """Indices of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.probabilities[wrong].max(axis=1), kind="stable")]

    def record(self, classes: tuple[str, ...], names: list[str]) -> dict[str, Any]:
        """Return accuracy, top-k accuracy, scores of the classes, confusion matrix and mistakes for ``report.json``."""
        hits = np.argsort(-self.probabilities, axis=1, kind="stable") == self.labels[:, None]
        scores = class_scores(self.confusion)
        # As in training, the macro mean covers the classes that occur as label or as prediction.
        occurring = [row for row, count in zip(scores, self.confusion.sum(dim=0), strict=True) if row.support or count]
        return {
            "accuracy": clustered(self.correct, self.groups),
            "top": {str(k): clustered(hits[:, :k].any(axis=1), self.groups) for k in TOP_K if k < len(classes)},
            "macro": {name: fmean(getattr(row, name) for row in occurring) for name in ("precision", "recall", "f1")},
            "classes": [{"class": name} | row._asdict() for name, row in zip(classes, scores, strict=True)],
            "confusion": self.confusion.tolist(),
            "mistakes": len(self.mistakes),
            "worst_mistakes": [
                {
                    "name": names[i],
                    "label": classes[self.labels[i]],
                    "predicted": classes[self.classes[i]],
                    "confidence": float(self.probabilities[i].max()),
                    "probability_of_label": float(self.probabilities[i, self.labels[i]]),
                }
                for i in self.mistakes[:LISTED_MISTAKES].tolist()
            ],
        }


@torch.no_grad()
def evaluate(subject: Subject, data: ImageDataModule, split: str) -> Predictions:
    """Evaluate a model on a split.

    Raises:
        UserError: if it predicts NaN or infinity.
    """
    upright, confidence, aspect = Uprightness(), MeanMetric(), data.spec.width / data.spec.height
    rows, labels, groups = [], [], []
    title = f"evaluating {subject.name} on {split}"
    for batch in tqdm(data.loader(split), desc=title, unit="batch", disable=None, leave=False):
        output = subject.output(batch.images)
        rows.append(output.probabilities)
        labels.append(batch.labels)
        groups.append(batch.group)
        if subject.model:
            upright.update(batch.group, batch.transforms, output.observations, aspect)
        for observation in output.observations:
            if observation.confidence is not None:
                confidence.update(observation.confidence)
    return Predictions(
        np.concatenate(rows),
        torch.cat(labels).numpy(),
        torch.cat(groups).numpy(),
        uprightness_values(upright) if subject.model else None,
        float(confidence.compute()) if confidence.update_called else None,
    )


def uprightness_values(measure: Uprightness) -> dict[str, float] | None:
    """Return the measures by name; None if no image has views at different angles."""
    values = {name: float(value) for name, value in measure.compute().items()}
    return None if np.isnan(values["uprightness"]) else values


def difference(first: Predictions, other: Predictions) -> dict[str, Any]:
    """Return the accuracy of ``other`` minus that of ``first``, in points, with its interval, see `Drop`.

    The predictions are paired: both models classified the same images.
    """
    drop = Drop.of(first.correct, other.correct, first.groups)
    # `0 - x` is never -0.0, unlike `-x`.
    return {
        "points": 0 - drop.points,
        "low": 0 - drop.high,
        "high": 0 - drop.low,
        "only_first_right": int((first.correct & ~other.correct).sum()),
        "only_this_right": int((~first.correct & other.correct).sum()),
    }


def calibrate(predictions: Predictions, validation: Predictions | None) -> dict[str, Any]:
    """Measure the calibration, without and with a temperature that is fitted on the validation split.

    ``validation`` is None if this is the evaluated split. The result has ``log_loss`` (nats), the expected calibration
    ``error`` and the ``bins`` of `reliability`, the ``temperature``, and the measures with it: ``log_loss_after`` and
    so on. Without a temperature, these are None, and there is a ``reason``.
    """

    def measure(probabilities: Floats) -> dict[str, Any]:
        bins = reliability(probabilities, predictions.labels, predictions.groups)
        return {"log_loss": log_loss(probabilities, predictions.labels), "error": calibration_error(bins), "bins": bins}

    before = measure(predictions.probabilities)
    temperature, reason = None, "it is fitted on the validation split, which this report evaluates"
    if validation:
        temperature, reason = fit_temperature(validation.probabilities, validation.labels), ""
        if temperature is None:
            reason = (
                "the loss on the validation split has no minimum, because no prediction is wrong, or the predictions "
                "are not better than chance"
            )
    tempered = temperature and measure(apply_temperature(predictions.probabilities, temperature))
    after = {f"{name}_after": tempered and tempered[name] for name in before}
    return before | {"temperature": temperature, "reason": reason} | after


def reliability(probabilities: Floats, labels: Integers, groups: Integers) -> list[dict[str, Any]]:
    """Return ``count``, mean ``confidence`` and ``accuracy`` of predictions with a confidence in (``above``, ``to``].

    The arrays are probabilities of the classes ``(N, K)``, true classes ``(N,)`` and indices of source images ``(N,)``.
    An empty bin has no confidence and no accuracy: None.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in range(BINS):
        inside = numbers == number
        mean = float(confidence[inside].mean()) if inside.any() else None
        accuracy = clustered(correct[inside], groups[inside]) if inside.any() else None
        ends = {"above": number / BINS, "to": (number + 1) / BINS}
        bins.append({**ends, "count": int(inside.sum()), "confidence": mean, "accuracy": accuracy})
    return bins


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over the predictions."""
    distances = [each["count"] * abs(each["confidence"] - each["accuracy"].value) for each in bins if each["count"]]
    return float(sum(distances) / sum(each["count"] for each in bins))


def log_loss(probabilities: Floats, labels: Integers) -> float:
    """Return the mean negative log-likelihood, in nats; a probability of 0 counts as the smallest float32."""
    return float(-_logits(probabilities)[np.arange(len(labels)), labels].mean())


def apply_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Return the probabilities ``(N, K)`` for the same logits divided by ``temperature``."""
    return np.asarray(softmax(_logits(probabilities) / temperature, axis=1))


def fit_temperature(probabilities: Floats, labels: Integers) -> float | None:
    """Return the temperature with the lowest `log_loss` (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    The probabilities ``(N, K)`` are those of images that the model was not trained on, with labels ``(N,)``. The result
    is None if there is no minimum within `TEMPERATURES`.
    """
    logits = _logits(probabilities)
    true = logits[np.arange(len(labels)), labels]

    def slope(exponent: float) -> float:
        return float(((softmax(logits / np.exp(exponent), axis=1) * logits).sum(axis=1) - true).mean())

    # The loss is convex in 1 / temperature, so its slope has at most one zero.
    low, high = np.log(TEMPERATURES)
    if slope(low) <= 0 or slope(high) >= 0:
        return None
    return float(np.exp(brentq(slope, low, high)))


def _logits(probabilities: Floats) -> Floats:
    """Return the logits up to a constant per row, which softmax ignores."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
