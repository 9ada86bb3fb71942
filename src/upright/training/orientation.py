"""LightningModule that trains any network to estimate the orientation of an image, without labels.

The idea: most pictures are upright. Rotate each by a known angle, and train the network to name that angle. It scores
``turns`` rotations, equal steps around the full circle (RotNet: Gidaris et al. 2018, arXiv:1803.07728, with 4). The
softmax of the scores is a distribution over the angles: its peak is the answer, and the share of the votes around the
peak is the confidence.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.utilities import dim_zero_cat

from upright.architectures.initialisation import Scheme
from upright.architectures.localisers import Network
from upright.data.batch import Batch
from upright.errors import UserError
from upright.images import ImageSpec
from upright.runtime.task import QUARTER
from upright.training.model import orientation
from upright.training.module import ImageModule, as_batch
from upright.training.optimisation import MakeOptimizer
from upright.training.schedules import MakeScheduler, OneCycle
from upright.warp import Padding, pixel_centres, project_points, rotation, rotation_angle, warp

TURNS = 64
"""Default number of rotations that are scored."""
EXACT_SHARE = 0.25
"""Share of the training images that are rotated by quarter turns, which do not resample them."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of this number, modulo 1, are spread evenly."""


class OrientationEstimator(ImageModule):
    """Train, validate, test and predict the angle by which an image is rotated, with any network.

    It rotates the images itself, so it takes batches of any data; see `as_batch`. The images count as upright after the
    augmentation of the datamodule, so this should not rotate them much.

    Args:
        spec: shape and normalisation of a square image, without classes; the command line takes it from the data.
        network: completed with ``(input_shape, turns)``. Its outputs are the scores of the rotations by
            ``k * 360 / turns`` degrees anticlockwise.
        optimizer: completed with parameter groups; see `upright.training.optimisation`.
        scheduler: completed with ``(optimizer, total_steps)``; it steps after every batch.
        init: scheme of the initial weights; by default the network's own.
        turns: number of rotations. With 4, the images are rotated by quarter turns only.
        padding: values beyond the border of a rotated image.
    """

    def __init__(
        self,
        spec: ImageSpec,
        network: Network,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler = OneCycle,
        init: Scheme | None = None,
        turns: int = TURNS,
        padding: Padding = "reflection",
    ) -> None:
        if spec.classes:
            raise UserError(
                f"OrientationEstimator takes pictures without classes, but the data have {len(spec.classes)}: use "
                "upright.data.pictures.Pictures, or train upright.ImageClassifier."
            )
        if spec.height != spec.width or spec.resize in ("stretch", "none"):
            raise UserError(
                f"An orientation needs square images that are not stretched, got {spec.height}x{spec.width} and resize "
                f"{spec.resize}: use resize crop or pad."
            )
        if turns < 4 or turns % 4:
            raise UserError(f"turns must be a multiple of 4, got {turns}: 4 for quarter turns, 64 for any angle.")
        super().__init__(spec, network, turns, optimizer, scheduler, init)
        self.turns, self.padding = turns, padding
        self.metrics = nn.ModuleDict({f"_{stage}": OrientationMetrics() for stage in ("val", "test")})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy between the votes and the angles by which the images were rotated."""
        images = self.seeded(batch, batch_idx).images.float()
        # The generator of the CPU, so that a seed gives the same angles on every device.
        quarters, angles, exact = torch.randint(4, images.shape[:1]), torch.rand(len(images)), torch.rand(len(images))
        chosen = exact < (1.0 if self.turns == 4 else EXACT_SHARE)
        quarters = torch.where(chosen, quarters, 0).to(self.device)
        angles = torch.where(chosen, 0.0, 2 * math.pi * angles).to(self.device)
        if self.turns > 4:
            images = warp(images, rotation(angles), self.padding)
        scores = self.model(turn(images, quarters)).float()
        loss = cross_entropy(scores, votes(angles + math.pi / 2 * quarters, self.turns))
        self._means.add("train/loss", loss, len(scores))
        return loss

    def evaluate(self, batch: Any, stage: str) -> None:
        """Answer each image at a quarter turn and at another angle, which depend only on its position in the split."""
        batch = as_batch(batch)
        metrics: Any = self.metrics[f"_{stage}"]
        images, before = batch.images.float(), initial_angles(batch)
        quarters = batch.position % 4
        exact = self.model(turn(images, quarters)).float()
        metrics.update("quarter", orientation(exact), before + math.pi / 2 * quarters)
        if self.turns == 4:
            metrics.loss.update(cross_entropy(exact, votes(before + math.pi / 2 * quarters, 4)), len(images))
            return
        angles = 2 * math.pi * (batch.position.double() * GOLDEN % 1).to(images.dtype)
        rotated = warp(images, rotation(angles), self.padding)
        scores = self.model(rotated).float()
        metrics.update("", orientation(scores), before + angles)
        metrics.loss.update(cross_entropy(scores, votes(before + angles, self.turns)), len(images))
        if stage == "test" and self.spec.mask != "none":
            whole = self.model.network(self.model.normalise(rotated, masked=False)).float()
            metrics.update("whole", orientation(whole), before + angles)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the angle in degrees and the confidence of each image as it is, ``(B, 2)``."""
        return orientation(self.model(as_batch(batch).images))


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Rotate square images ``(B, C, H, H)`` anticlockwise by ``quarters`` ``(B,)`` of a full turn; no pixel changes."""
    turned = images.clone()
    for number in range(1, 4):
        chosen = quarters == number
        turned[chosen] = torch.rot90(images[chosen], number, (2, 3))
    return turned


def votes(angles: Tensor, turns: int) -> Tensor:
    """Return the distribution over ``turns`` rotations that stands for angles in radians, ``(B, turns)``.

    An angle between two rotations is shared by them in proportion to its distance.
    """
    place = angles / (2 * math.pi) * turns
    lower = place.floor()
    share = (place - lower)[:, None]
    target = torch.zeros(len(angles), turns, device=angles.device)
    lower = lower.long()[:, None]
    target.scatter_add_(1, lower % turns, 1 - share)
    return target.scatter_add_(1, (lower + 1) % turns, share)


def initial_angles(batch: Batch) -> Tensor:
    """Return the angles in radians by which the data have rotated their images already, ``(B,)``."""
    points = pixel_centres(4, 4, device=batch.transforms.device)
    return rotation_angle(project_points(batch.transforms, points), points)


class OrientationMetrics(nn.Module):
    """The metrics of one stage.

    They are computed for images at any angle. With the prefix ``quarter_`` they are for images at exact quarter turns,
    which no resampling betrays; if only these exist, they have no prefix. With the prefix ``whole_`` they are for a
    model with a mask that sees the whole image.

    - ``degrees_median``, ``degrees_mean`` and ``degrees_p95``: errors of the angle, from 0 to 180.
    - ``within_5`` and ``within_10``: share of the errors up to 5 and 10 degrees.
    - ``four_way``: share of the errors below 45 degrees, the answers that choose the right one of four sides.
    - ``confidence``: mean confidence.
    - ``calibration_error``: mean difference between the confidence and the share of right sides, in 15 bins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.errors = nn.ModuleDict({f"_{prefix}": Errors() for prefix in ("", "quarter", "whole")})

    def update(self, prefix: str, answers: Tensor, angles: Tensor) -> None:
        """Add a batch: answers ``(B, 2)`` in degrees with confidences, and the true angles in radians ``(B,)``."""
        errors: Any = self.errors[f"_{prefix}"]
        errors.update(answers, angles)

    def compute(self) -> dict[str, Tensor]:
        """Return every metric by its name, over all processes."""
        parts: dict[str, Any] = {name.removeprefix("_"): part for name, part in self.errors.items()}
        parts = {name: part.compute() for name, part in parts.items() if part.update_called}
        if "" not in parts:
            parts = {"": parts["quarter"]}
        named = {
            f"{prefix}_{name}" if prefix else name: value
            for prefix, values in parts.items()
            for name, value in values.items()
        }
        return {"loss": self.loss.compute()} | named

    def reset(self) -> None:
        metrics: list[Any] = [self.loss, *self.errors.values()]
        for metric in metrics:
            metric.reset()


class Errors(Metric):
    """Errors and confidences of all images; see `OrientationMetrics`."""

    full_state_update = False
    degrees: list[Tensor]
    confidences: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("degrees", "confidences"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, answers: Tensor, angles: Tensor) -> None:
        """Add a batch; see `OrientationMetrics.update`."""
        self.degrees.append(torch.remainder(answers[:, 0] - angles.rad2deg() + 180, 360).sub(180).abs())
        self.confidences.append(answers[:, 1])

    def compute(self) -> dict[str, Tensor]:
        degrees, confidences = dim_zero_cat(self.degrees), dim_zero_cat(self.confidences)
        right = degrees < QUARTER
        calibration = BinaryCalibrationError(n_bins=15, norm="l1", validate_args=False).to(degrees.device)
        return {
            "four_way": right.float().mean(),
            "degrees_median": degrees.quantile(0.5),
            "degrees_mean": degrees.mean(),
            "degrees_p95": degrees.quantile(0.95),
            "within_5": (degrees <= 5).float().mean(),
            "within_10": (degrees <= 10).float().mean(),
            "confidence": confidences.mean(),
            "calibration_error": calibration(confidences, right.long()),
        }
