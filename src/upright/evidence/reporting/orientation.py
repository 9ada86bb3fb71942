"""A report on models that estimate the orientation: their errors at all angles, and their confidence."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.classification import binary_calibration_error
from tqdm import tqdm

from upright.data.cache import to_tensor
from upright.evidence.reporting.figures import Models, draw_abstention, draw_circle
from upright.evidence.reporting.measures import BINS
from upright.evidence.reporting.page import Figures
from upright.evidence.reporting.subjects import Floats, Group, Subject
from upright.exporting.parity import Threshold
from upright.intervals import Share, clustered, wilson
from upright.runs.drawing import evenly_spread
from upright.runs.plots import EXAMPLES, draw_turns, turned
from upright.runtime.task import QUARTER, deviation
from upright.warp import resize

DEGREES = tuple(range(-180, 180, 15))
"""Angles of each image, in degrees anticlockwise."""
ENLARGEMENT = 4
"""Largest side of a rotated image, as a multiple of the network's input."""


@dataclass(frozen=True)
class Evidence:
    """The content of a report on models that estimate the orientation.

    Args:
        group: the models and the data.
        split: split of the data.
        originals: the images that were rotated, each ``(1, C, S, S)``.
        models: measures of each model for ``report.json``.
        abstentions: curves of each model, see `abstention`.
    """

    group: Group
    split: str
    originals: list[Tensor]
    models: list[dict[str, Any]]
    abstentions: list[tuple[Floats, Floats]]
    template = "orientation.html"

    def record(self) -> dict[str, Any]:
        """Return the entries of ``report.json`` that only these models have."""
        largest = ENLARGEMENT * self.group.data.spec.height
        data = {"sources": len(self.originals), "angles": len(DEGREES), "largest": largest}
        return {"data": data, "models": self.models}

    def draw(self, models: Models) -> Figures:
        """Return all figures by name: ``circle``, ``abstention``, and ``pictures-N`` of each model."""
        figures: Figures = {"circle": draw_circle(models), "abstention": draw_abstention(models, self.abstentions)}
        images = [self.originals[place] for place in evenly_spread(len(self.originals), EXAMPLES)]
        for number, subject in enumerate(self.group.subjects, start=1):
            figures[f"pictures-{number}"] = draw_turns("", images, partial(_answers, subject))
        return figures

    @staticmethod
    def summary(model: dict[str, Any]) -> str:
        """Return a line about a model of the record."""
        share = model["right_side"]
        return (
            f"{model['name']}: right side {share['value']:.4f} (95 %: {share['low']:.4f} to {share['high']:.4f}), "
            f"{model['quarter_turns']['value']:.4f} at exact quarter turns, median error "
            f"{model['degrees']['median']:.1f} degrees, calibration error {model['calibration_error']:.4f}."
        )


def gather(group: Group, split: str, images: int) -> Evidence:
    """Compute the answers of all models for evenly spaced originals of a split, at all angles.

    Raises:
        UserError: if a model answers with NaN or infinity.
    """
    subjects, data = group
    indices = data.splits[split]
    chosen = indices[np.linspace(0, len(indices) - 1, min(images, len(indices))).astype(int)]
    originals = [square(data.source.images[i], ENLARGEMENT * data.spec.height) for i in chosen.tolist()]
    rows: list[list[Floats]] = [[] for _ in subjects]
    for image in tqdm(originals, desc="rotating", unit="image", disable=None, leave=False):
        batch = turned(image, DEGREES)
        for subject, answers in zip(subjects, rows, strict=True):
            answers.append(_answers(subject, batch))
    evidence = Evidence(group, split, originals, [], [])
    for subject, answers in zip(subjects, rows, strict=True):
        angles, confidences = np.moveaxis(np.stack(answers), 2, 0)
        errors = deviation(angles - np.array(DEGREES)).astype(float)
        evidence.models.append(_measures(errors, confidences, _threshold(subject)))
        evidence.abstentions.append(abstention(confidences, errors < QUARTER))
    return evidence


def _measures(errors: Floats, confidences: Floats, threshold: float | None) -> dict[str, Any]:
    """Return the measures of ``N`` images at ``A`` angles ``(N, A)``, with errors in degrees from 0 to 180."""
    right = errors < QUARTER
    confidence, sides = (torch.from_numpy(each.ravel()) for each in (confidences, right))
    above = confidences >= (threshold or 0.0)
    return {
        "right_side": _share(right),
        "quarter_turns": _share(right[:, np.array(DEGREES) % 90 == 0]),
        "degrees": {
            "median": float(np.median(errors)),
            "mean": float(errors.mean()),
            "p95": float(np.quantile(errors, 0.95)),
        },
        "within_5": float((errors <= 5).mean()),
        "within_10": float((errors <= 10).mean()),
        "confidence": float(confidences.mean()),
        "calibration_error": float(binary_calibration_error(confidence, sides.long(), n_bins=BINS)),
        "threshold": None
        if threshold is None
        else Threshold(threshold, float(above.mean()), float((~right[above]).mean()) if above.any() else 0.0),
        "circle": {
            "degrees": DEGREES,
            "right_side": [wilson(float(column.mean()), len(column)) for column in right.T],
            "median": np.median(errors, axis=0).tolist(),
        },
    }


def abstention(confidences: Floats, right: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the share of answers above each confidence, and the share of wrong sides among them."""
    order = np.argsort(-confidences.ravel(), kind="stable")
    counts = np.arange(1, len(order) + 1)
    return counts / len(order), np.cumsum(~right.ravel()[order]) / counts


def _answers(subject: Subject, images: Tensor) -> Floats:
    return subject.output(images).probabilities


def _share(right: npt.NDArray[np.bool_]) -> Share:
    """Return the share of right answers ``(N, A)``; those for one image are not independent."""
    return clustered(right.ravel(), np.repeat(np.arange(len(right)), right.shape[1]))


def _threshold(subject: Subject) -> float | None:
    bundle = subject.origin.bundle
    return bundle.manifest.get("orientation", {}).get("threshold") if bundle else None


def square(pixels: npt.NDArray[np.uint8], largest: int) -> Tensor:
    """Return the largest centred square of an image ``(H, W, C)`` as ``(1, C, S, S)``, shrunk to ``largest``."""
    image, side = to_tensor(pixels[None]).float(), min(pixels.shape[:2])
    if side <= largest:
        y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        return image[..., y : y + side, x : x + side]
    # Means of whole pixels first: the exact filter takes long for a large photograph.
    image = avg_pool2d(image, max(1, side // (2 * largest)))
    return resize(image, largest, largest, "crop")
