"""Metrics of validation and test: torchmetrics, updated with every batch, computed once over all processes."""

import warnings
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
    MultilabelAveragePrecision,
    MultilabelConfusionMatrix,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from upright.tables import write_rows
from upright.training.uprightness import Uprightness

TOP_K = 5
BRIEF = ("accuracy", "map", "subset_accuracy", "loss", "uprightness", "four_way", "degrees_median")
"""Metrics to print, in this order, after every epoch; metrics.csv has all of them."""
UPDATE_IMAGES = 4096
"""Number of images per update of the classification metrics: an update takes a millisecond, even for a small batch."""


class StageMetrics(nn.Module):
    """The metrics of one stage.

    ``precision``, ``recall`` and ``f1`` are means over the classes that occur as labels or predictions. ``top5`` exists
    for more than 5 classes. ``calibration_error`` is that of the predicted class, in 15 bins (Guo et al. 2017,
    arXiv:1706.04599). ``confusion`` ``(K, K)`` counts the images of the row's class predicted as the column's class.
    With ``multilabel``, an image has several classes, and a class is predicted from a probability of 0.5. ``map`` is
    the mean average precision of the classes that occur, ``subset_accuracy`` the share of images whose classes are all
    right; ``precision``, ``recall`` and ``f1`` are means over all classes, and ``confusion`` is ``(K, 2, 2)``.

    A network with a transformer also has the measures of `Uprightness`. Further metrics are updated with probabilities
    and labels.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        upright: bool,
        extra: Mapping[str, Metric] | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        # No validation at every update: probabilities and labels are our own.
        common: dict[str, Any] = {"num_labels" if multilabel else "num_classes": num_classes, "validate_args": False}
        metrics: dict[str, Metric | MetricCollection] = (
            {
                "map": MultilabelAveragePrecision(average=None, **common),
                "precision": MultilabelPrecision(average="macro", **common),
                "recall": MultilabelRecall(average="macro", **common),
                "f1": MultilabelF1Score(average="macro", **common),
                "subset_accuracy": MultilabelExactMatch(**common),
                "confusion": MultilabelConfusionMatrix(**common),
            }
            if multilabel
            else {
                "accuracy": MulticlassAccuracy(average="micro", **common),
                "precision": MulticlassPrecision(average="macro", **common),
                "recall": MulticlassRecall(average="macro", **common),
                "f1": MulticlassF1Score(average="macro", **common),
                "calibration_error": MulticlassCalibrationError(n_bins=15, norm="l1", **common),
                "confusion": MulticlassConfusionMatrix(**common),
            }
        )
        if num_classes > TOP_K and not multilabel:
            metrics[f"top{TOP_K}"] = MulticlassAccuracy(average="micro", top_k=TOP_K, **common)
        metrics |= extra or {}
        # Set explicitly: torchmetrics would merge metrics whose states are equal after the first update. If all
        # predictions so far are correct, accuracy and top5 have equal states.
        class_means = ["precision", "recall", "f1"]
        groups = [class_means, *([name] for name in metrics if name not in class_means)]
        self.classification = MetricCollection(metrics, compute_groups=groups)
        self.loss = MeanMetric()
        self.uprightness = Uprightness() if upright else None
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, probabilities: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: probabilities ``(B, K)``, labels ``(B,)`` or ``(B, K)``, and the mean loss of the batch."""
        self.loss.update(loss, len(labels))
        self._batches.append((probabilities, labels))
        if len(self._batches) * len(labels) >= UPDATE_IMAGES:
            self._classify()

    def _classify(self) -> None:
        if self._batches:
            probabilities, labels = zip(*self._batches, strict=True)
            self.classification.update(torch.cat(probabilities), torch.cat(labels).long())
            self._batches = []

    def compute(self) -> dict[str, Tensor]:
        """Return every metric by its name, over all processes; NaN if it cannot be computed."""
        self._classify()
        with warnings.catch_warnings():
            # The average precision of a class without an image is left out below.
            warnings.filterwarnings("ignore", "No positive samples found in target")
            metrics = {"loss": self.loss.compute(), **self.classification.compute()}
        if "map" in metrics:
            metrics["map"] = metrics["map"][metrics["confusion"][:, 1].sum(dim=1) > 0].mean()
        return metrics | (self.uprightness.compute() if self.uprightness is not None else {})

    def reset(self) -> None:
        self._batches = []
        for metrics in (self.classification, self.loss, self.uprightness):
            if metrics is not None:
                metrics.reset()


class Means:
    """Weighted means over an epoch of values from each step."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, value: Tensor, weight: int) -> None:
        """Add a step's value, without waiting for the device."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + weight * value.detach(), count + weight

    def take(self) -> dict[str, Tensor]:
        """Return the means, and reset the sums."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, tuple[Tensor, int]]:
        """Return each sum so far, with its total weight."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, tuple[Tensor, int]]) -> None:
        self._sums = dict(state)


class ClassScores(NamedTuple):
    """Scores of one class; 0 if the class never occurs as label or prediction, as in scikit-learn."""

    precision: float
    recall: float
    f1: float
    support: int


def class_scores(confusion: Tensor) -> list[ClassScores]:
    """Return the scores of each class, from a confusion matrix ``(K, K)``: rows are labels, columns predictions.

    With several classes per image, each has a matrix ``(K, 2, 2)``: without and with the class.
    """
    confusion = confusion.cpu()
    if confusion.dim() == 3:
        right, predicted, support = confusion[:, 1, 1].double(), confusion[:, :, 1].sum(1), confusion[:, 1].sum(1)
    else:
        right, predicted, support = confusion.diag().double(), confusion.sum(dim=0), confusion.sum(dim=1)
    precision, recall = right / predicted.clamp(min=1), right / support.clamp(min=1)
    f1 = 2 * right / (predicted + support).clamp(min=1)
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    return [ClassScores(*row) for row in zip(*columns, strict=True)]


def write_tables(folder: Path, confusion: Tensor, classes: Sequence[str]) -> list[Path]:
    """Write ``test_confusion.csv`` and ``test_classes.csv`` (precision, recall, F1 and support of each class).

    ``confusion`` ``(K, K)`` counts the images of the row's class predicted as the column's class. With several classes
    per image it is ``(K, 2, 2)``, and only the second table is written.
    """
    each = [
        [name, *(f"{score:.6f}" for score in scores[:3]), scores.support]
        for name, scores in zip(classes, class_scores(confusion), strict=True)
    ]
    header = ["class", "precision", "recall", "f1", "support"]
    tables: dict[str, list[Sequence[object]]] = {"test_classes.csv": [header, *each]}
    if confusion.dim() == 2:
        counts = [[name, *row] for name, row in zip(classes, confusion.tolist(), strict=True)]
        tables = {"test_confusion.csv": [["label", *classes], *counts], **tables}
    for name, rows in tables.items():
        write_rows(folder / name, rows)
    return [folder / name for name in tables]
