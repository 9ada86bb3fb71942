"""A report on models that estimate the orientation: their errors at all angles, and their confidence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.classification import binary_calibration_error
from tqdm import tqdm

from upright.data.cache import to_tensor
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.evidence.reporting.figures import draw_abstention, draw_circle
from upright.evidence.reporting.measures import BINS
from upright.evidence.reporting.subjects import Floats, Group, Subject
from upright.exporting.parity import Threshold
from upright.intervals import clustered, wilson
from upright.runs.drawing import draw_turns
from upright.runs.plots import COMPASS
from upright.runtime.task import QUARTER, deviation
from upright.warp import resize, rotation, warp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEGREES = tuple(range(-180, 180, 15))
"""Angles of each image, in degrees anticlockwise."""
ENLARGEMENT = 4
"""Largest side of a rotated image, as a multiple of the network's input."""
PICTURES = 6


class Answers(NamedTuple):
    """Answers of one model for ``N`` images at ``A`` angles.

    Args:
        angles: estimated angles in degrees, ``(N, A)``.
        confidences: their confidences, ``(N, A)``.
    """

    angles: Floats
    confidences: Floats

    @property
    def errors(self) -> Floats:
        """Errors in degrees, from 0 to 180, ``(N, A)``."""
        return deviation(self.angles - np.array(DEGREES)).astype(float)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """True for each answer that chooses the right side, ``(N, A)``."""
        right: npt.NDArray[np.bool_] = self.errors < QUARTER
        return right

    def record(self, threshold: float | None) -> dict[str, Any]:
        """Return the measures for ``report.json``.

        Args:
            threshold: threshold of the confidence of a bundle, if it has one.
        """
        errors, right = self.errors, self.right
        groups = np.repeat(np.arange(len(errors)), len(DEGREES))
        quarters = np.array(DEGREES) % 90 == 0
        confidences, sides = (torch.from_numpy(each.ravel()) for each in (self.confidences, right))
        above = self.confidences >= (threshold or 0.0)
        return {
            "right_side": clustered(right.ravel(), groups),
            "quarter_turns": clustered(right[:, quarters].ravel(), np.repeat(np.arange(len(errors)), quarters.sum())),
            "degrees": {
                "median": float(np.median(errors)),
                "mean": float(errors.mean()),
                "p95": float(np.quantile(errors, 0.95)),
            },
            "within_5": float((errors <= 5).mean()),
            "within_10": float((errors <= 10).mean()),
            "confidence": float(self.confidences.mean()),
            "calibration_error": float(binary_calibration_error(confidences, sides.long(), n_bins=BINS)),
            "threshold": None
            if threshold is None
            else Threshold(threshold, float(above.mean()), float((~right[above]).mean()) if above.any() else 0.0),
            "circle": {
                "degrees": DEGREES,
                "right_side": [wilson(float(column.mean()), len(column)) for column in right.T],
                "median": np.median(errors, axis=0).tolist(),
            },
        }

    def abstention(self) -> tuple[Floats, Floats]:
        """Return the share of answers above each confidence, and the share of wrong sides among them."""
        order = np.argsort(-self.confidences.ravel(), kind="stable")
        counts = np.arange(1, len(order) + 1)
        return counts / len(order), np.cumsum(~self.right.ravel()[order]) / counts


def largest_side(data: ImageDataModule) -> int:
    """Return the largest side of the images that are rotated, in pixels."""
    return ENLARGEMENT * data.spec.height


def turned(pixels: Tensor, degrees: Sequence[int]) -> Tensor:
    """Rotate a square image ``(1, C, S, S)`` by each angle anticlockwise, ``(A, C, S, S)``, values 0 to 255."""
    images = warp(pixels.expand(len(degrees), -1, -1, -1), rotation(torch.tensor(degrees).deg2rad()), "reflection")
    for number, angle in enumerate(degrees):
        if angle % 90 == 0:
            images[number] = torch.rot90(pixels[0], angle // 90, (1, 2))
    return images.round().clamp(0, 255)


def square(pixels: npt.NDArray[np.uint8], largest: int) -> Tensor:
    """Return the largest centred square of an image ``(H, W, C)`` as ``(1, C, S, S)``, shrunk to ``largest``."""
    image, side = to_tensor(pixels[None]).float(), min(pixels.shape[:2])
    if side <= largest:
        y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        return image[..., y : y + side, x : x + side]
    # Means of whole pixels first: the exact filter takes long for a large photograph.
    image = avg_pool2d(image, max(1, side // (2 * largest)))
    return resize(image, largest, largest, "crop")


def chosen(data: ImageDataModule, split: str, count: int) -> list[Tensor]:
    """Return evenly spaced originals of a split, see `square`."""
    indices = data.splits[split]
    indices = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]
    return [square(data.source.images[i], largest_side(data)) for i in indices.tolist()]


def measure(subjects: Sequence[Subject], images: Sequence[Tensor]) -> list[Answers]:
    """Return the answers of all models for all images at all angles.

    Raises:
        UserError: if a model answers with NaN or infinity.
    """
    rows: list[list[Floats]] = [[] for _ in subjects]
    for image in tqdm(images, desc="rotating", unit="image", disable=None, leave=False):
        batch = turned(image, DEGREES).to(torch.uint8)
        for subject, answers in zip(subjects, rows, strict=True):
            answers.append(subject.predict(batch).probabilities)
            if not np.isfinite(answers[-1]).all():
                raise UserError(f"'{subject.origin.path}' answers with NaN or infinity; train or export it again.")
    return [Answers(*np.moveaxis(np.stack(answers), 2, 0)) for answers in rows]


def draw(group: Group, answers: Sequence[Answers], images: Sequence[Tensor]) -> dict[str, "Image.Image | Figure"]:
    """Return all figures by name: ``circle``, ``abstention``, and ``pictures-N`` of each model."""
    names = [subject.name for subject in group.subjects]
    figures: dict[str, Image.Image | Figure] = {
        "circle": draw_circle(names, DEGREES, [each.right for each in answers], [each.errors for each in answers]),
        "abstention": draw_abstention(names, [each.abstention() for each in answers]),
    }
    places = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).astype(int).tolist()
    for number, subject in enumerate(group.subjects, start=1):
        blocks = []
        for place in places:
            before = turned(images[place], COMPASS)
            rows = subject.predict(before.to(torch.uint8)).probabilities
            after = warp(before, rotation(-torch.from_numpy(rows[:, 0]).float().deg2rad()), "reflection")
            blocks.append((before, after, rows))
        figures[f"pictures-{number}"] = draw_turns("", COMPASS, blocks)
    return figures
