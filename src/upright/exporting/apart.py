"""The parts of an attached graph run apart: orientation bundle, rotation, preprocessing, foreign model.

The rotation and the preprocessing are those of `warp`, so they share no code with the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from tqdm import tqdm

from upright.data.cache import to_tensor
from upright.errors import GateError
from upright.exporting.foreign import Foreign, Outputs
from upright.exporting.front import ORIENTATION, PROBABILITIES, STRAIGHTENED, Decision, model_outputs
from upright.exporting.harm import MARGIN, Answers
from upright.images import Pixels, decode
from upright.runtime.predictor import OrientationPredictor, run_batch, session_batches
from upright.runtime.task import Classification, OrientationEstimation, Rows
from upright.warp import Padding, grid_points, sample

ANGLES = (0, 45, 90, 135, 180, 225, 270, 315)
"""Rotations of each image in the comparison, in degrees anticlockwise."""
ORIENTATION_TOLERANCE = 1e-4
"""Largest difference of the orientation from that of its bundle, see `OrientationEstimation.differences`."""
GREY_LEVELS = 0.5
"""Largest difference of the output ``straightened``."""
CLEAR_DEGREES = 1e-3
"""Distance of the angle of a sample from the smallest one. Rounding changes an angle by less."""


def straighten(images: Tensor, angle: float, padding: Padding) -> Tensor:
    """Rotate images ``(B, C, H, W)`` clockwise, in the frame of the nearest quarter turn: ``(B, C, H', W')``.

    Args:
        images: float images.
        angle: angle in degrees. Height and width are exchanged if it is nearer to a quarter turn than to a half one.
        padding: values beyond the border.
    """
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    size = images.shape[-2:]
    height, width = size[::-1] if abs(sin) > abs(cos) else size
    # From coordinates of the result to pixels around its centre, to pixels of the image, to its coordinates.
    matrix = np.diag([1 / size[1], 1 / size[0]]) @ [[cos, sin], [-sin, cos]] @ np.diag([width, height])
    points = grid_points(torch.tensor(np.pad(matrix, ((0, 0), (0, 1)))[None], dtype=torch.float32), height, width)
    return sample(images, points.expand(len(images), -1, -1), height, width, padding)


@dataclass(frozen=True)
class Photograph:
    """An image of the comparison.

    Args:
        name: its path, or that of a sample.
        source: its file or the content of its file.
        label: index of its class, or None.
    """

    name: str
    source: Path | bytes
    label: int | None


@dataclass(frozen=True)
class Views:
    """One image in all rotations, with the results of the parts run apart.

    Args:
        photograph: the image.
        images: its rotations, uint8 ``(H, W, C)``.
        orientation: output of the orientation bundle, ``(N, 2)``.
        fitted: inputs of the foreign model before the normalisation, first of the images, then of the straightened
            ones, ``(2, N, C, h, w)``.
        outputs: outputs of the foreign model for them, each ``(2, N, ...)``.
    """

    photograph: Photograph
    images: list[Pixels]
    orientation: npt.NDArray[np.float32]
    fitted: npt.NDArray[np.float32]
    outputs: Outputs


class Apart:
    """The orientation bundle and the foreign model, run one after the other without the graph.

    Args:
        estimator: the orientation bundle.
        foreign: the foreign model.
        photographs: images of the comparison.
        padding: values beyond the border of a rotated image.
    """

    def __init__(
        self, estimator: OrientationPredictor, foreign: Foreign, photographs: list[Photograph], padding: Padding
    ) -> None:
        self.estimator, self.foreign, self.photographs, self.padding = estimator, foreign, photographs, padding

    def views(self, photograph: Photograph) -> Views:
        """Rotate an image, and return the results for its views.

        Raises:
            ImageError: if it cannot be decoded.
        """
        preprocessing = self.foreign.preprocessing
        pixels = to_tensor(decode(photograph.source, preprocessing.spec)[None])
        rotated = [straighten(pixels, -angle, self.padding).round().clamp(0, 255) for angle in ANGLES]
        images = [each[0].permute(1, 2, 0).numpy().astype(np.uint8) for each in rotated]
        orientation = np.stack(list(self.estimator.rows(images)))
        upright = [straighten(*each, self.padding) for each in zip(rotated, orientation[:, 0].tolist(), strict=True)]
        fitted = torch.cat([preprocessing.fit(each) for each in (*rotated, *upright)]).numpy()
        outputs = {name: rows.reshape(2, -1, *rows.shape[1:]) for name, rows in self.foreign(fitted).items()}
        return Views(photograph, images, orientation, fitted.reshape(2, -1, *fitted.shape[1:]), outputs)

    def __iter__(self) -> Iterator[Views]:
        return map(self.views, tqdm(self.photographs, unit="image", disable=None, leave=False))


@dataclass
class Measurement:
    """Answers of the foreign model for all views, alone and behind a transformer that straightens each of them.

    Args:
        scores: the output with the scores.
        min_angle: smallest angle in degrees that the transformer corrects.
    """

    scores: str
    min_angle: float
    columns: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)

    def add(self, views: Views) -> None:
        """Add the answers for the views of one image."""
        bare, straightened = views.outputs[self.scores].argmax(axis=2) == views.photograph.label
        angle, confidence = views.orientation.T
        oblique = np.abs(angle) >= np.float32(self.min_angle)
        self.columns.append((bare, np.where(oblique, straightened, bare), confidence, np.array(ANGLES) == 0))

    def answers(self) -> Answers:
        """Return the answers. The images without rotation count as upright."""
        groups = np.repeat(np.arange(len(self.columns)), len(ANGLES))
        bare, straightened, confidence, upright = map(np.concatenate, zip(*self.columns, strict=True))
        return Answers(bare, straightened, confidence, upright, groups)

    def of(self, apart: Apart) -> Answers:
        """Add all images, and return the answers."""
        for views in apart:
            self.add(views)
        return self.answers()


class Comparison:
    """The graph against its parts run apart.

    Args:
        session: onnxruntime session of the graph.
        foreign: the foreign model.
        decision: when the graph rotates an image.
        are_logits: True if the graph applies softmax to the scores.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, foreign: Foreign, decision: Decision, are_logits: bool
    ) -> None:
        self.session, self.foreign, self.decision, self.are_logits = session, foreign, decision, are_logits
        self.task = Classification(foreign.preprocessing.spec.classes)
        self.names = [output.name for output in session.get_outputs()]
        special = {ORIENTATION: ORIENTATION_TOLERANCE, STRAIGHTENED: GREY_LEVELS}
        self.tolerances = {name: special.get(name, foreign.tolerance) for name in self.names}
        self.differences = dict.fromkeys(self.names, 0.0)
        """Largest difference of each output: of a direction, in grey levels, or relative to the largest value."""
        self.views = self.agreeing = self.acting = 0
        self.offending: list[str] = []
        """Views outside of the tolerances, or with another first class."""

    def add(self, views: Views) -> npt.NDArray[np.bool_]:
        """Run the graph on all views of one image, and compare its outputs.

        Returns:
            True for each view that is so far from the threshold that rounding does not change the decision.
        """
        batches = session_batches(self.session, views.images, lambda image: image, len(views.images))
        parts = [run_batch(self.session, np.stack(batch), self.names) for batch in batches]
        actual = {name: np.concatenate(rows) for name, *rows in zip(self.names, *parts, strict=True)}
        # The decision follows the orientation that the graph returns. This is compared as well.
        angle, confidence = actual[ORIENTATION].T
        threshold, min_angle = np.float32(self.decision.threshold), np.float32(self.decision.min_angle)
        acts = (confidence >= threshold) & (np.abs(angle) >= min_angle)

        def chosen(both: npt.NDArray[Any]) -> npt.NDArray[Any]:
            rows: npt.NDArray[Any] = both[acts.astype(int), np.arange(len(acts))]
            return rows

        expected = {new: chosen(views.outputs[old]) for old, new in model_outputs(self.foreign).items()}
        scores = chosen(views.outputs[self.foreign.scores])
        expected[PROBABILITIES] = softmax(scores) if self.are_logits else scores.astype(np.float32)
        differences: dict[str, Rows] = {
            name: relative_differences(rows, actual[name]) for name, rows in expected.items() if name in actual
        }
        differences[ORIENTATION] = OrientationEstimation().differences(views.orientation, actual[ORIENTATION])
        if STRAIGHTENED in actual:
            levels = np.abs(chosen(views.fitted).transpose(0, 2, 3, 1) - actual[STRAIGHTENED])
            differences[STRAIGHTENED] = levels.max(axis=(1, 2, 3))
        agrees = ~self.task.changed(expected[PROBABILITIES], actual[PROBABILITIES], self.foreign.tolerance)
        self.views += len(acts)
        self.acting += int(acts.sum())
        self.agreeing += int(agrees.sum())
        for name, values in differences.items():
            self.differences[name] = float(np.maximum(self.differences[name], values.max()))  # NaN remains
            agrees &= values <= self.tolerances[name]
        self.offending += [f"'{views.photograph.name}' at {each}" for each in np.array(ANGLES)[~agrees].tolist()]
        decided: npt.NDArray[np.bool_] = np.abs(confidence - threshold) > MARGIN / 2
        decided &= np.abs(np.abs(angle) - min_angle) > CLEAR_DEGREES
        return decided

    def metrics(self) -> dict[str, Any]:
        """Return the results for ``parity.json``."""
        return {
            "views": self.views,
            "straightened": self.acting,
            "agreement": self.agreeing / self.views,
            "largest_differences": self.differences,
            "allowed_differences": self.tolerances,
        }

    def check(self) -> None:
        """Refuse a graph that differs from its parts.

        Raises:
            GateError: with the views and the outputs that differ.
        """
        if self.offending:
            largest = [f"{name} {n:.1e} (allowed {self.tolerances[name]:.0e})" for name, n in self.differences.items()]
            raise GateError(
                f"The graph and its parts disagree on {len(self.offending)} of {self.views} views, for example "
                f"{self.offending[0]} degrees. Largest differences: {', '.join(largest)}. No bundle was written."
            )


def relative_differences(expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the largest difference of each row, relative to the largest value of all rows, ``(N,)``."""
    expected, actual = (each.reshape(len(each), -1).astype(float) for each in (expected, actual))
    scale = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    differences: npt.NDArray[np.float64] = np.abs(actual - expected).max(axis=1) / scale
    return differences


def softmax(scores: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the probabilities of logits ``(N, K)``."""
    powers = np.exp(scores.astype(float) - scores.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def kind_of_scores(scores: npt.NDArray[Any]) -> str:
    """Return ``probabilities`` if scores ``(..., K)`` are not negative and sum to 1, else ``logits``."""
    sums = scores.astype(float).sum(axis=-1)
    return "probabilities" if scores.min() >= 0 and np.abs(sums - 1).max() < 1e-2 else "logits"
