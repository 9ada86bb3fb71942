"""What validation and test measure: torchmetrics, updated with every batch, computed once, over all processes."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from upright.files import write_text
from upright.training.uprightness import Uprightness

TOP = 5
BRIEF = ("loss", "accuracy", "uprightness")
"""What is worth a look after every epoch; all the rest is in metrics.csv."""


AT_ONCE = 4096
"""Images of which the metrics of classification hear at once: for a batch they take a millisecond, however small."""


class StageMetrics(nn.Module):
    """The metrics of one stage.

    ``precision``, ``recall`` and ``f1`` are means over the classes that were shown or predicted. ``top5`` is there for
    more than 5 classes. ``calibration_error`` is that of the predicted class, in 15 bins (Guo et al. 2017,
    arXiv:1706.04599). ``confusion`` ``(K, K)`` counts the images of row's class that were taken for column's.

    Args:
        num_classes: ``K``.
        upright: whether there is a transformer to measure.
        extra: further metrics by name, updated with probabilities and labels.
    """

    def __init__(self, num_classes: int, *, upright: bool, extra: Mapping[str, Metric] | None = None) -> None:
        super().__init__()
        # What would be validated at every update are our own probabilities and labels.
        common: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(average="micro", **common),
            "precision": MulticlassPrecision(average="macro", **common),
            "recall": MulticlassRecall(average="macro", **common),
            "f1": MulticlassF1Score(average="macro", **common),
            "calibration_error": MulticlassCalibrationError(n_bins=15, norm="l1", **common),
            "confusion": MulticlassConfusionMatrix(**common),
        }
        if num_classes > TOP:
            metrics[f"top{TOP}"] = MulticlassAccuracy(average="micro", top_k=TOP, **common)
        metrics |= extra or {}
        # Groups are given: torchmetrics takes states that are equal after the first update for one, and where all that
        # it saw is right, accuracy and top5 are.
        together = ["precision", "recall", "f1"]
        groups = [together, *([name] for name in metrics if name not in together)]
        self.classification = MetricCollection(metrics, compute_groups=groups)
        self.loss = MeanMetric()
        self.uprightness = Uprightness() if upright else None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, probabilities: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: probabilities ``(B, K)``, labels ``(B,)``, and the mean of the loss over it."""
        self.loss.update(loss, len(labels))
        self._waiting.append((probabilities, labels))
        if len(self._waiting) * len(labels) >= AT_ONCE:
            self._classify()

    def _classify(self) -> None:
        if self._waiting:
            probabilities, labels = zip(*self._waiting, strict=True)
            self.classification.update(torch.cat(probabilities), torch.cat(labels))
            self._waiting = []

    def compute(self) -> dict[str, Tensor]:
        """Every metric by its name, over all processes; what cannot be told is NaN."""
        self._classify()
        found = {"loss": self.loss.compute(), **self.classification.compute()}
        return found | ({"uprightness": self.uprightness.compute()} if self.uprightness is not None else {})

    def reset(self) -> None:
        """Begin anew."""
        self._waiting = []
        for metrics in (self.classification, self.loss, self.uprightness):
            if metrics is not None:
                metrics.reset()


class Means:
    """Means over an epoch, of what a step gives."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, value: Tensor, weight: int) -> None:
        """Another step's value, without waiting for the device."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + weight * value.detach(), count + weight

    def take(self) -> dict[str, Tensor]:
        """The means, to begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, tuple[Tensor, int]]:
        """Sums and how much they are of, so far."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, tuple[Tensor, int]]) -> None:
        """Go on from there."""
        self._sums = dict(state)


class ClassScores(NamedTuple):
    """How well one class is told; a 0 where it was never shown, or never predicted, as in scikit-learn."""

    precision: float
    recall: float
    f1: float
    support: int


def class_scores(confusion: Tensor) -> list[ClassScores]:
    """Of each class, from the counts of images of row's class that were taken for column's, ``(K, K)``."""
    right, taken, support = confusion.diag(), confusion.sum(dim=0), confusion.sum(dim=1)
    precision, recall = right / taken.clamp(min=1), right / support.clamp(min=1)
    f1 = 2 * right / (taken + support).clamp(min=1)
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    return [ClassScores(*row) for row in zip(*columns, strict=True)]


def write_tables(folder: Path, confusion: Tensor, classes: Sequence[str]) -> list[Path]:
    """Write ``test_confusion.csv`` and ``test_classes.csv`` (precision, recall, F1 and support of each class).

    Args:
        folder: where to.
        confusion: images of row's class that were taken for column's, ``(K, K)``.
        classes: their names.

    Returns:
        The two paths.
    """
    each = [
        [name, *(f"{value:.6f}" for value in scores[:3]), scores.support]
        for name, scores in zip(classes, class_scores(confusion), strict=True)
    ]
    counts = [[name, *row] for name, row in zip(classes, confusion.tolist(), strict=True)]
    tables: dict[str, list[list[object]]] = {
        "test_confusion.csv": [["label", *classes], *counts],
        "test_classes.csv": [["class", "precision", "recall", "f1", "support"], *each],
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(folder / name, text.getvalue())
    return [folder / name for name in tables]
