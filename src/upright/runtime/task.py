"""Tasks: what the main output of a bundle's graph holds, and how two such outputs are compared."""

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from upright.images import ImageSpec, TaskName

Rows = npt.NDArray[np.floating[Any]]  # the main output of a graph for `N` images, `(N, columns)`


class Prediction(NamedTuple):
    """The prediction for one image.

    Args:
        label: the most probable class.
        probability: probability of that class.
        probabilities: probabilities of all classes, in the order of the spec.
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the ``count`` most probable classes with their probabilities, the most probable first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


class LabelSet(NamedTuple):
    """The classes of one image.

    Args:
        labels: probability of each class that reaches its threshold, the most probable first. It may be empty.
        probabilities: probabilities of all classes, in the order of the spec.
    """

    labels: dict[str, float]
    probabilities: dict[str, float]


class Orientation(NamedTuple):
    """The orientation of one image.

    Args:
        angle: rotation of the image in degrees anticlockwise, from -180 to 180. A rotation by the same angle clockwise
            makes the image upright.
        confidence: concentration of the votes for the angle, from 0 to 1.
    """

    angle: float
    confidence: float


QUARTER = 45.0  # error in degrees from which an angle chooses a wrong one of four sides
NEAR = 10.0  # largest error of a right angle in degrees
JOIN = ";"  # between the classes of one image, in text
THRESHOLD = 0.5  # probability from which an image has a class, if a bundle has no threshold of its own


class Classification:
    """The output ``probabilities`` has one column per class.

    Args:
        classes: names of the classes.
    """

    name: TaskName = "classification"
    output = "probabilities"  # Name of the main output. It has `columns`.
    answer = "the first class"  # name of what `changed` compares, for messages
    score = "accuracy"  # name of the share of right answers, for messages

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes, self.columns = classes, len(classes)

    def result(self, row: Rows) -> Prediction:
        """Return the result for one image, from one row of the main output ``(columns,)``."""
        by_class = dict(zip(self.classes, map(float, row), strict=True))
        label = max(by_class, key=by_class.__getitem__)
        return Prediction(label, by_class[label], by_class)

    def differences(self, expected: Rows, actual: Rows) -> Rows:
        """Return the largest difference of a probability for each image, ``(N,)``."""
        differences: Rows = np.abs(actual - expected).max(axis=1)
        return differences

    def right(self, rows: Rows, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether the first class of each image is its label, ``(N,)``."""
        right: npt.NDArray[np.bool_] = rows.argmax(axis=1) == labels
        return right

    def text(self, row: Rows) -> str:
        """Return the answer for one image as text."""
        return self.classes[int(row.argmax())]

    def label(self, number: int) -> str:
        """Return a label as text."""
        return self.classes[number]

    def changed(self, expected: Rows, actual: Rows, tolerance: float = 0.0) -> npt.NDArray[np.bool_]:
        """Return whether each image has another first class, ``(N,)``. Classes closer than ``tolerance`` may swap."""
        second, first = np.sort(expected, axis=1)[:, -2:].T
        other: npt.NDArray[np.bool_] = actual.argmax(axis=1) != expected.argmax(axis=1)
        return other & (first - second > tolerance) if tolerance else other


class MultiLabel(Classification):
    """Several classes per image: the output ``probabilities`` has one column per class, and they do not sum to 1.

    Args:
        classes: names of the classes.
        thresholds: probability from which an image has a class, one per class; by default 0.5.
    """

    name = "multilabel"
    answer = "the classes"
    score = "subset accuracy"

    def __init__(self, classes: tuple[str, ...], thresholds: Sequence[float] = ()) -> None:
        super().__init__(classes)
        self.thresholds = dict(zip(classes, thresholds or [THRESHOLD] * len(classes), strict=True))
        self._limits = np.array(list(self.thresholds.values()))

    def result(self, row: Rows) -> LabelSet:  # type: ignore[override]  # the result of another task
        by_class = dict(zip(self.classes, map(float, row), strict=True))
        ranked = sorted(by_class.items(), key=lambda item: -item[1])
        return LabelSet({name: value for name, value in ranked if value >= self.thresholds[name]}, by_class)

    def decide(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return whether each image has each class, ``(N, K)``."""
        decisions: npt.NDArray[np.bool_] = rows >= self._limits
        return decisions

    def right(self, rows: Rows, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether all classes of each image are right, ``(N,)``. ``labels`` are 0 and 1, ``(N, K)``."""
        right: npt.NDArray[np.bool_] = (self.decide(rows) == labels).all(axis=1)
        return right

    def text(self, row: Rows) -> str:
        return JOIN.join(compress(self.classes, self.decide(row)))

    def label(self, number: Sequence[int]) -> str:  # type: ignore[override]  # 0 and 1 of each class
        return JOIN.join(compress(self.classes, number))

    def changed(self, expected: Rows, actual: Rows, tolerance: float = 0.0) -> npt.NDArray[np.bool_]:
        """Return whether each image has other classes, ``(N,)``, besides those within ``tolerance`` of a threshold."""
        other = self.decide(expected) != self.decide(actual)
        if tolerance:
            other &= np.abs(expected - self._limits) > tolerance
        changed: npt.NDArray[np.bool_] = other.any(axis=1)
        return changed


class OrientationEstimation:
    """The output ``orientation`` has two columns: the angle in degrees, and the confidence; see `Orientation`.

    It has the methods of `Classification`. A label is a number of quarter turns anticlockwise.
    """

    name: TaskName = "orientation"
    output = "orientation"
    columns = 2
    answer = "the angle"
    score = f"share within {NEAR:g} degrees"

    def result(self, row: Rows) -> Orientation:
        return Orientation(*map(float, row))

    def differences(self, expected: Rows, actual: Rows) -> Rows:
        """Return the distance of the mean directions, whose lengths are the confidences, ``(N,)``.

        An angle counts as little as its confidence: without any, the angle is a matter of rounding.
        """
        distances: Rows = np.linalg.norm(_directions(actual) - _directions(expected), axis=1)
        return distances

    def right(self, rows: Rows, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether the angle is at most 10 degrees from the label's, ``(N,)``."""
        return self.errors(rows, labels) <= NEAR

    def errors(self, rows: Rows, labels: npt.NDArray[np.int64]) -> Rows:
        """Return the error of each angle in degrees, from 0 to 180, ``(N,)``."""
        return deviation(rows[:, 0] - 90 * labels)

    def text(self, row: Rows) -> str:
        return f"{row[0]:+.2f}°"

    def label(self, number: int) -> str:
        return f"{90 * number}°"

    def degrees(self, expected: Rows, actual: Rows) -> Rows:
        """Return the difference of the angles in degrees, from 0 to 180, ``(N,)``."""
        return deviation(actual[:, 0] - expected[:, 0])

    def changed(self, expected: Rows, actual: Rows, tolerance: float = 0.0) -> npt.NDArray[np.bool_]:
        """Return whether the angles lie more than 1 degree apart, for images whose direction is longer than this."""
        certain = np.minimum(expected[:, 1], actual[:, 1]) > tolerance
        changed: npt.NDArray[np.bool_] = certain & (self.degrees(expected, actual) > 1)
        return changed


Task: TypeAlias = Classification | OrientationEstimation  # the meaning of the main output of a graph


def task_of(spec: ImageSpec, thresholds: Sequence[float] = ()) -> Task:
    """Return the task of a spec; ``thresholds`` are those of `MultiLabel`."""
    if spec.task == "multilabel":
        return MultiLabel(spec.classes, thresholds)
    return Classification(spec.classes) if spec.classes else OrientationEstimation()


def deviation(degrees: Rows) -> Rows:
    """Return the size of an angle in degrees, from 0 to 180, whatever its number of turns."""
    sizes: Rows = np.abs((degrees + 180) % 360 - 180)
    return sizes


def _directions(rows: Rows) -> Rows:
    angles = np.deg2rad(rows[:, 0])
    directions: Rows = rows[:, 1, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return directions
