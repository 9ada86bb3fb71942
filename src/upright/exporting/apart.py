"""The parts of an attached graph run apart: orientation bundle, rotation, preprocessing, foreign model.

The rotation and the preprocessing are those of `warp`, so they share no code with the graph.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from scipy.special import softmax
from torch import Tensor
from tqdm import tqdm

from upright.data.cache import to_tensor
from upright.errors import GateError
from upright.exporting.foreign import Foreign, Outputs
from upright.exporting.front import ORIENTATION, PROBABILITIES, STRAIGHTENED, Decision, model_outputs
from upright.exporting.harm import MARGIN, Answers, Flags
from upright.images import ImageSpec, Pixels, decode
from upright.runtime.predictor import OrientationPredictor, run_batch, session_batches
from upright.runtime.task import Classification, OrientationEstimation, Rows
from upright.warp import Padding, rotation, warp

ANGLES = (0, 45, 90, 135, 180, 225, 270, 315)
"""Rotations of each image in the comparison, in degrees anticlockwise."""
TOLERANCE = 1e-4
"""Largest difference of an output, relative to its largest value; of ``orientation``, the length of a direction."""
ALLOWED = {STRAIGHTENED: 0.1}
"""Other limits: grey levels. Where the sampling points of the two differ by a thousandth of a pixel, edges differ."""
CLEAR_DEGREES = 1e-3
"""Distance of the angle of a sample from the smallest one. Rounding changes an angle by less."""


def straighten(images: Tensor, angle: float, padding: Padding) -> Tensor:
    """Rotate images ``(B, C, H, W)`` clockwise, in the frame of the nearest quarter turn: ``(B, C, H', W')``.

    Height and width are exchanged if ``angle``, in degrees, is nearer to a quarter turn than to a half one.
    """
    quarters = round(angle / 90)
    images = torch.rot90(images, -quarters, (2, 3))
    height, width = images.shape[-2:]
    rest = rotation(torch.tensor([90.0 * quarters - angle]).deg2rad(), width / height)
    return warp(images, rest.expand(len(images), 3, 3), padding)


class Photograph(NamedTuple):
    """An image of the comparison: its path, its file or the content of it, and the index of its class."""

    name: str
    source: Path | bytes
    label: int | None

    def views(self, spec: ImageSpec, padding: Padding) -> list[Pixels]:
        """Return the image in all rotations of `ANGLES`, uint8 ``(H, W, C)``."""
        return rotated_views(decode(self.source, spec), padding)


def rotated_views(pixels: Pixels, padding: Padding) -> list[Pixels]:
    """Return an image ``(H, W, C)`` in all rotations of `ANGLES`, uint8."""
    images = to_tensor(pixels[None])
    rotated = [straighten(images, -angle, padding).round().clamp(0, 255) for angle in ANGLES]
    return [each[0].permute(1, 2, 0).numpy().astype(np.uint8) for each in rotated]


def fit(foreign: Foreign, images: Iterable[Pixels], angles: Iterable[float], padding: Padding) -> Tensor:
    """Straighten images by these angles, and resize them for a foreign model: ``(N, C, h, w)``. Angle 0 is exact."""
    tensors = (to_tensor(pixels[None]) for pixels in images)
    upright = (straighten(each, angle, padding) if angle else each for each, angle in zip(tensors, angles, strict=True))
    return torch.cat([foreign.preprocessing.fit(each) for each in upright])


def measure(
    estimator: OrientationPredictor,
    foreign: Foreign,
    photographs: Sequence[Photograph],
    min_angle: float,
    padding: Padding,
) -> Answers:
    """Return the answers of a foreign model for all views, alone and behind a transformer that never abstains.

    Without a rotation, the images count as upright. The transformer corrects angles from ``min_angle`` degrees on.
    """
    right, confidences = [], []
    for photograph in tqdm(photographs, unit="image", disable=None, leave=False):
        views = photograph.views(foreign.spec, padding)
        angles, confidence = np.stack(list(estimator.rows(views))).T
        oblique = np.abs(angles) >= np.float32(min_angle)
        corrections = np.zeros_like(angles), np.where(oblique, angles, 0)
        fitted = [fit(foreign, views, each.tolist(), padding) for each in corrections]
        right.append([foreign(each)[foreign.scores].argmax(axis=1) == photograph.label for each in fitted])
        confidences.append(np.where(oblique, confidence, np.float32(-1)))
    bare, straightened = np.concatenate(right, axis=1)
    groups = np.repeat(np.arange(len(photographs)), len(ANGLES))
    upright = np.tile(np.array(ANGLES) == 0, len(photographs))
    return Answers(bare, straightened, np.concatenate(confidences), upright, groups)


@dataclass(eq=False)
class Comparison:
    """The graph against its parts run apart, each on what the graph's part before it returns.

    A rounding error of the first part can change the answer of the last one, above all of a quantized model. So every
    part is compared by itself: the orientation, the straightened images, and the outputs of the foreign model.

    Args:
        session: the attached graph, with the output ``straightened``.
        estimator: the orientation bundle.
        foreign: the foreign model.
        decision: when and how the graph rotates an image.
        are_logits: True if the graph applies softmax to the scores.
    """

    session: onnxruntime.InferenceSession
    estimator: OrientationPredictor
    foreign: Foreign
    decision: Decision
    are_logits: bool

    def __post_init__(self) -> None:
        self.names = [output.name for output in self.session.get_outputs()]
        self.differences = dict.fromkeys(self.names, 0.0)
        """Largest difference of each output: of a direction, in grey levels, or relative to the largest value."""
        self.views = self.agreeing = self.acting = 0
        self.offending: list[str] = []
        """Views outside of the tolerances, or with another first class."""

    def add(self, name: str, views: Sequence[Pixels]) -> Flags:
        """Run the graph on the views of one image, and compare its outputs.

        Returns:
            True for each view that is so far from the threshold that rounding does not change the decision.
        """
        runs: list[tuple[Outputs, Outputs]] = []
        for batch in session_batches(self.session, views, lambda image: image, len(views)):
            outputs = dict(zip(self.names, run_batch(self.session, np.stack(batch), self.names), strict=True))
            # In the same batches, because dynamic quantization takes its scale from all images of a batch.
            images = np.ascontiguousarray(outputs[STRAIGHTENED].transpose(0, 3, 1, 2))
            runs.append((outputs, self.foreign(torch.from_numpy(images))))
        actual, expected = (_joined(parts) for parts in zip(*runs, strict=True))
        angles, confidence = actual[ORIENTATION].T
        threshold, min_angle = np.float32(self.decision.threshold), np.float32(self.decision.min_angle)
        acts = (confidence >= threshold) & (np.abs(angles) >= min_angle)
        fitted = fit(self.foreign, views, np.where(acts, angles, 0).tolist(), self.decision.padding).numpy()
        straightened = actual[STRAIGHTENED].transpose(0, 3, 1, 2)
        scores = expected[self.foreign.scores]
        expected = {new: expected[old] for old, new in model_outputs(self.foreign).items()}
        expected[PROBABILITIES] = softmax(scores.astype(float), axis=1) if self.are_logits else scores
        orientation = np.stack(list(self.estimator.rows(views, batch_size=1)))
        differences: dict[str, Rows] = {
            ORIENTATION: OrientationEstimation().differences(orientation, actual[ORIENTATION]),
            STRAIGHTENED: np.abs(straightened - fitted).max(axis=(1, 2, 3)),
            **{output: relative_differences(rows, actual[output]) for output, rows in expected.items()},
        }

        task = Classification(self.foreign.spec.classes)
        agrees = ~task.changed(expected[PROBABILITIES], actual[PROBABILITIES], TOLERANCE)
        self.views += len(acts)
        self.acting += int(acts.sum())
        self.agreeing += int(agrees.sum())
        for output, values in differences.items():
            self.differences[output] = float(np.maximum(self.differences[output], values.max()))  # NaN remains
            agrees &= values <= ALLOWED.get(output, TOLERANCE)
        self.offending += [f"'{name}' at {angle}" for angle in np.array(ANGLES)[~agrees].tolist()]
        distances = np.abs(confidence - threshold), np.abs(np.abs(angles) - min_angle)
        decided: Flags = (distances[0] > MARGIN / 2) & (distances[1] > CLEAR_DEGREES)
        return decided

    def metrics(self) -> dict[str, Any]:
        """Return the results for ``parity.json``. Raise a `GateError` if the graph differs from its parts."""
        allowed = {name: ALLOWED.get(name, TOLERANCE) for name in self.names}
        if self.offending:
            largest = [f"{name} {n:.1e} (allowed {allowed[name]:.0e})" for name, n in self.differences.items()]
            raise GateError(
                f"The graph and its parts disagree on {len(self.offending)} of {self.views} views, for example "
                f"{self.offending[0]} degrees. Largest differences: {', '.join(largest)}. No bundle was written."
            )
        return {
            "views": self.views,
            "straightened": self.acting,
            "agreement": self.agreeing / self.views,
            "largest_differences": self.differences,
            "allowed_differences": allowed,
        }


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def relative_differences(expected: Rows, actual: Rows) -> Rows:
    """Return the largest difference of each row, relative to the largest value of all rows, ``(N,)``."""
    expected, actual = (each.reshape(len(each), -1).astype(float) for each in (expected, actual))
    scale = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    differences: Rows = np.abs(actual - expected).max(axis=1) / scale
    return differences


def kind_of_scores(scores: Rows) -> str:
    """Return ``probabilities`` if scores ``(..., K)`` are not negative and sum to 1, else ``logits``."""
    sums = scores.astype(float).sum(axis=-1)
    return "probabilities" if scores.min() >= 0 and np.abs(sums - 1).max() < 1e-2 else "logits"
