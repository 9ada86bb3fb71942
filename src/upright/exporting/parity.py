"""Compare an ONNX graph with PyTorch on all originals of the validation split, and measure the loss of accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from tqdm import tqdm

from upright.data.datamodule import ImageDataModule
from upright.data.source import Original
from upright.exporting.graph import Form, Graph
from upright.exporting.harm import MARGIN
from upright.images import ImageSpec, Pixels, batches_of_one_size
from upright.runtime.predictor import run_batch
from upright.runtime.task import QUARTER, THRESHOLD, MultiLabel, OrientationEstimation, Task, task_of
from upright.training.model import Model, orientation
from upright.warp import resize_pixels

Floats = npt.NDArray[np.float64]

OTHER_TOLERANCES = {
    "theta": 1e-3,
    "warped": 0.5,
    "votes": 1e-3,
    "confidence": 1e-3,
    "logits": 1e-2,
    "features": 1e-2,
}
"""Largest allowed difference of each other output. The units are: half the image size, or the length of a direction,
for ``theta``, grey levels for ``warped``, and a share of the largest value for ``logits`` and ``features``."""
PERTURBATIONS, PERTURBATION, JUMP = 4, 1e-3, 0.01
"""Number and standard deviation of the changes of the scores that tell whether an answer is stable, and the difference
from which it jumps."""
CALIBRATION_IMAGES = 512
MAX_BATCH = 64
"""Images per batch of a graph with a free batch size."""


def fitted(pixels: Pixels, size: tuple[int, int] | None, spec: ImageSpec) -> Pixels:
    """Resize ``pixels`` ``(H, W, C)`` to the input size of a graph. If ``size`` is None, return them unchanged."""
    if size is None or pixels.shape[:2] == size:
        return pixels
    rule = "stretch" if spec.resize == "none" else spec.resize
    (resized,) = resize_pixels(torch.tensor(pixels[None]), *size, rule, spec.background, spec.interpolation)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def fitted_originals(data: ImageDataModule, form: Form) -> Iterator[Original]:
    """Yield the originals of the validation split at the input size of a graph. For an orientation, they are turned."""
    for turns, original in zip(cycle(range(4)), data.originals("val"), strict=False):
        if not data.spec.classes:
            # The label is the number of quarter turns, which change no pixel.
            original = original._replace(pixels=np.rot90(original.pixels, turns), label=turns)
        yield original._replace(pixels=fitted(original.pixels, form.size, data.spec))


def calibration_batches(
    data: ImageDataModule, excluded: torch.Tensor, form: Form, count: int = CALIBRATION_IMAGES
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield batches of evenly spaced training images, without duplicates of validation and test images.

    These are the validation and test images of ``data``, and those of the checkpoint, whose hashes are ``excluded``.
    """
    hashes = torch.cat([excluded, *(data.manifest.hashes[split] for split in ("val", "test"))]).numpy()
    train = data.splits["train"]
    train = train[~np.isin(data.images.facts["hash"][train], hashes)]
    indices = train[np.linspace(0, len(train) - 1, min(count, len(train))).astype(int)]
    images = (fitted(pixels, form.size, data.spec) for pixels in data.shown(indices, "train"))
    for batch in batches_of_one_size(images, lambda image: image, form.batch or MAX_BATCH):
        # Repeat images to fill a batch of fixed size.
        yield np.stack(batch)[np.arange(form.batch or len(batch)) % len(batch)]


class Drop(NamedTuple):
    """Loss of accuracy in points, with its 95 % interval."""

    points: float
    low: float
    high: float
    resolution: float
    """Upper end of the interval if no prediction changed: the smallest drop that a split of this size can detect."""

    @classmethod
    def of(
        cls, was_right: npt.NDArray[np.bool_], is_right: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]
    ) -> "Drop":
        """Compare two predictions for each of the same images.

        The interval is the adjusted Wald interval of Bonett and Price (2012, "Adjusted Wald confidence interval for a
        difference of binomial proportions based on paired data"; recommended by Fagerland, Lydersen and Laake 2014):
        add one lost and one gained image to the differences, then compute the normal interval of their mean. The views
        of a source image, whose index is in ``groups``, count as one image, with the mean of their differences.
        """
        lost = was_right.astype(float) - is_right.astype(float)
        by_group = np.bincount(groups, lost) / np.bincount(groups)
        adjusted = np.append(by_group, [1.0, -1.0])
        mean, count = adjusted.mean(), len(adjusted)
        half = 1.96 * adjusted.std() / sqrt(count)
        points = 100 * np.array([lost.mean(), mean - half, mean + half, 1.96 * sqrt(2) / count])
        return cls(*points.tolist())

    def is_within(self, limit: float) -> bool:
        """Return whether the drop is at most ``limit`` points.

        The upper end of the interval must be within the limit. If the split is too small, the estimate must be.
        """
        return (self.points if self.is_split_too_small(limit) else self.high) <= limit

    def is_split_too_small(self, limit: float) -> bool:
        """Return whether the split is too small to detect a drop of ``limit`` points."""
        return self.resolution > limit


@dataclass(frozen=True, eq=False)
class Comparison:
    """Main outputs by PyTorch and by a graph for all originals of the validation split.

    Args:
        names: names of the images.
        labels: true answers, see the method ``right`` of the task, ``(N,)`` or ``(N, K)``.
        groups: index of the source image of each image, ``(N,)``.
        expected: main output by PyTorch, ``(N, columns)``.
        actual: main output by the graph, ``(N, columns)``.
        others: largest difference of each other output, in the unit of `OTHER_TOLERANCES`.
        task: task of the model.
        stable: False for each image whose answer jumps with a small change of the scores, ``(N,)``: two angles have
            equal votes, or the confidence is at the threshold of a transformer. A different rounding may exchange them.
    """

    names: list[str]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    expected: Floats
    actual: Floats
    others: dict[str, float]
    task: Task
    stable: npt.NDArray[np.bool_]

    @property
    def differences(self) -> Floats:
        """Difference for each image, see `Classification.differences`; 0 if the answer is not stable, ``(N,)``."""
        return np.where(self.stable, self.task.differences(self.expected, self.actual), 0.0)

    @property
    def others_agree(self) -> bool:
        """True if all other outputs are within `OTHER_TOLERANCES`."""
        return all(value <= OTHER_TOLERANCES[name.partition("_")[0]] for name, value in self.others.items())

    @property
    def drop(self) -> Drop:
        """Loss of accuracy from PyTorch to the graph."""
        was_right, is_right = (self.task.right(each, self.labels) for each in (self.expected, self.actual))
        return Drop.of(was_right, is_right, self.groups)

    def accuracy(self, rows: Floats) -> float:
        """Return the share of right answers in ``expected`` or in ``actual``."""
        return float(self.task.right(rows, self.labels).mean())

    def image_records(self, images: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return name, label, both answers and the difference for each of these images."""
        differences = self.differences
        return [
            {
                "name": self.names[i],
                "label": self.task.label(self.labels[i]),
                "pytorch": self.task.text(self.expected[i]),
                "onnxruntime": self.task.text(self.actual[i]),
                "difference": float(differences[i]),
            }
            for i in images.tolist()
        ]

    def metrics(self) -> dict[str, Any]:
        """Return the entry of one precision in ``parity.json``."""
        drop, differences = self.drop, self.differences
        flips = np.flatnonzero(self.task.changed(self.expected, self.actual) & self.stable)
        metrics: dict[str, Any] = {
            "agreement": 1 - len(flips) / len(self.names),
            "largest_difference": float(differences.max()),
            "mean_difference": float(differences.mean()),
            "accuracy": self.accuracy(self.actual),
            "drop": drop.points,
            "drop_interval": [drop.low, drop.high],
            "flipped": self.image_records(flips),
        }
        if isinstance(self.task, OrientationEstimation):
            errors = self.task.errors(self.actual, self.labels)
            metrics |= {
                "unstable": int((~self.stable).sum()),
                "largest_difference_degrees": float(self.task.degrees(self.expected, self.actual)[self.stable].max())
                if self.stable.any()
                else 0.0,
                "error_degrees_median": float(np.median(errors)),
                "four_way": float((errors < QUARTER).mean()),
            }
        if isinstance(self.task, MultiLabel):
            metrics["f1"] = float(f1_scores(self.task.decide(self.actual), self.labels).mean())
        return metrics | ({"other_outputs": self.others} if self.others else {})


class Reference:
    """Answers of a model for all originals of the validation split, with which all graphs of one form are compared.

    The model is in evaluation mode, on the CPU. If its transformer has a ``threshold`` above 0, the graph needs the
    output ``confidence``.
    """

    def __init__(self, model: Model, data: ImageDataModule, form: Form, threshold: float = 0.0) -> None:
        self.graph, self.data, self.form, self.threshold = Graph(model, form).eval(), data, form, threshold
        self.task = task_of(data.spec)
        self.answers: list[npt.NDArray[np.float32]] = []
        """Main output by PyTorch for each batch; empty before the first comparison."""
        self.stable: list[npt.NDArray[np.bool_]] = []
        """See `Comparison.stable`, for each batch."""

    def compare(self, session: onnxruntime.InferenceSession) -> Comparison:
        """Run all originals with a graph, at their own size or at the fixed size of the graph.

        For the first graph, also run PyTorch, compare the other outputs, and choose the thresholds of `MultiLabel`.
        """
        is_first = not self.answers
        names: list[str] = []
        labels: list[Any] = []
        actual, others = [], dict.fromkeys(self.graph.names[1:] if is_first else [], 0.0)
        outputs = [self.task.output, *others]
        batches = batches_of_one_size(
            fitted_originals(self.data, self.form), lambda original: original.pixels, self.form.batch or MAX_BATCH
        )
        total = len(list(self.data.names("val")))
        with tqdm(total=total, desc="comparing", unit="image", disable=None, leave=False) as progress:
            for number, batch in enumerate(batches):
                pixels = np.stack([original.pixels for original in batch])
                results = run_batch(session, pixels, outputs)
                if number == len(self.answers):
                    expected = self._run_pytorch(pixels)
                    # Where a transformer may abstain or not, the other outputs differ, too.
                    compared = self.stable[-1] if self.threshold else slice(None)
                    for name, *pair in zip(others, expected[1:], results[1:], strict=True):
                        one, other = (rows[compared] for rows in pair)
                        scale = max(1.0, float(np.abs(one).max(initial=0.0))) if name in ("logits", "features") else 1.0
                        difference = float(np.abs(one - other).max(initial=0.0)) / scale
                        others[name] = float(np.maximum(others[name], difference))  # NaN remains
                actual.append(results[0])
                names += [original.name for original in batch]
                labels += [original.label for original in batch]
                progress.update(len(batch))
        expected_rows = np.concatenate(self.answers).astype(float)
        if is_first and isinstance(self.task, MultiLabel):
            self.task = MultiLabel(self.task.classes, best_thresholds(expected_rows, np.array(labels)))
        return Comparison(
            names,
            np.array(labels),
            np.arange(len(names)) // len(self.data.views("val").names),
            expected_rows,
            np.concatenate(actual).astype(float),
            others,
            self.task,
            np.concatenate(self.stable),
        )

    @torch.no_grad()
    def _run_pytorch(self, pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Return all outputs for the next batch, and store its answers."""
        outputs = [output.numpy() for output in self.graph(torch.from_numpy(pixels))]
        self.answers.append(outputs[0])
        is_stable = np.ones(len(pixels), bool)
        if isinstance(self.task, OrientationEstimation):
            is_stable = are_stable(outputs[self.graph.names.index("logits")])
        elif self.threshold:
            confidence = outputs[self.graph.names.index("confidence")][:, 0]
            is_stable = np.abs(confidence - np.float32(self.threshold)) > MARGIN / 2
        self.stable.append(is_stable)
        return outputs


def are_stable(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return whether the orientation hardly changes with a small change of the scores ``(N, turns)``, ``(N,)``."""
    noise = PERTURBATION * np.random.default_rng(0).standard_normal((PERTURBATIONS, *scores.shape)).astype(np.float32)
    answers, *others = (orientation(torch.from_numpy(scores + change)).numpy() for change in (0 * noise[0], *noise))
    largest = np.max([OrientationEstimation().differences(answers, other) for other in others], axis=0)
    stable: npt.NDArray[np.bool_] = largest <= JUMP
    return stable


@torch.no_grad()
def cached_accuracy(model: Model, data: ImageDataModule, task: Task) -> float:
    """Return the share of right answers for the cached validation images, rounded to uint8 at the network's size.

    This value is only reported. As a gate, it would reject a correct graph because of the rounding.
    """
    right = [
        task.right(model.answers(model(batch.images)).numpy(), batch.labels.numpy()) for batch in data.loader("val")
    ]
    return float(np.concatenate(right).mean())


def f1_scores(answers: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> Floats:
    """Return the F1 score of each class, ``(K,)``, from answers and labels ``(N, K)``; 0 for a class of neither."""
    right, total = (answers & (labels == 1)).sum(axis=0), answers.sum(axis=0) + labels.sum(axis=0)
    scores: Floats = 2 * right / np.maximum(total, 1)
    return scores


def best_thresholds(rows: Floats, labels: npt.NDArray[np.int64]) -> list[float]:
    """Return for each class the threshold with the largest F1 score, from probabilities and labels ``(N, K)``.

    It lies midway between two probabilities, so that rounding moves none of them across it. It is 0.5 for a class
    without an image.
    """
    thresholds = []
    for values, truth in zip(rows.T, labels.T, strict=True):
        order = np.argsort(-values, kind="stable")
        values, right = values[order], np.cumsum(truth[order])
        scores = 2 * right / (np.arange(1, len(values) + 1) + truth.sum())
        following = np.append(values[1:], 0.0)
        best = int(np.where(values > following, scores, -1.0).argmax())
        thresholds.append(float((values[best] + following[best]) / 2) if truth.any() else THRESHOLD)
    return thresholds


NEVER = 2.0
"""Threshold that no confidence reaches. A confidence may be exactly 1."""


class Threshold(NamedTuple):
    """Confidence from which the angles of a model are used, chosen on the validation split."""

    threshold: float
    share: float
    """Share of the images with at least this confidence."""
    wrong: float
    """Share of the answers for them that choose a wrong side: errors of 45 degrees and more."""


def choose_threshold(comparison: Comparison, max_wrong: float) -> Threshold:
    """Return the smallest threshold above which at most ``max_wrong`` percent of the answers choose a wrong side.

    If there is none, the threshold is `NEVER`.
    """
    task, rows = comparison.task, comparison.actual
    assert isinstance(task, OrientationEstimation)
    order = np.argsort(-rows[:, 1], kind="stable")
    confidences, wrong = rows[order, 1], task.errors(rows, comparison.labels)[order] >= QUARTER
    shares = np.cumsum(wrong) / np.arange(1, len(rows) + 1)
    # Images of equal confidence are used together.
    last = np.append(confidences[1:] < confidences[:-1], True)
    allowed = np.flatnonzero(last & (100 * shares <= max_wrong))
    if not len(allowed):
        return Threshold(NEVER, 0.0, 0.0)
    count = int(allowed[-1]) + 1
    return Threshold(float(confidences[count - 1]), count / len(rows), float(shares[count - 1]))
