"""Measure accuracy and consistency under known distortions, and how spatial transformers respond to rotation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from kornia.filters import gaussian_blur2d
from scipy.stats import circmean
from torch import Tensor, nn
from tqdm import tqdm

from upright.architectures.spatial_transformer import Observation
from upright.data.augmentation import RandomAffine, RandomCrop
from upright.data.datamodule import ImageDataModule
from upright.data.distorted_mnist import DistortedMNIST, MNISTDistortion
from upright.evidence.distortions import rotate, shift, zoom
from upright.evidence.reporting.measures import uprightness_values
from upright.evidence.reporting.subjects import BatchOutput, Floats, Subject
from upright.images import Pixels
from upright.intervals import Share, wilson
from upright.recipes import Recipe, recipe
from upright.runs.plots import transformer_images
from upright.training.uprightness import Uprightness, final_points
from upright.warp import Padding, identity, pixel_centres, project_points, rotation_angle, warp

SEED = 0
"""Seed of the sample of images, and of the noise."""
ROTATION = "rotation"
DEFAULT_ROTATION_DEGREES = 180.0
"""Range of angles for the uprightness, in each direction, if the training data declare no rotation."""
MIN_ROTATION_DEGREES = 15.0
"""Smallest range of angles for the uprightness, in each direction."""
KORNIA_BORDERS = {"zeros": "constant", "border": "replicate", "reflection": "reflect"}
CHUNK = 64
"""Images per batch."""


@dataclass(frozen=True)
class DistortionFamily:
    """A distortion of images that has several strengths, such as rotation.

    Args:
        unit: unit of the strengths.
        strengths: strengths in ascending order, including ``none``, which does not change an image.
        change: function that distorts float images ``(B, C, H, W)`` in [0, 255] by a strength.
    """

    unit: str
    strengths: tuple[float, ...]
    none: float
    change: Callable[[Tensor, float], Tensor]

    def __call__(self, images: Tensor, strength: float) -> Tensor:
        """Return distorted ``images`` ``(B, C, H, W)``, uint8 like every input of a model."""
        if strength == self.none:
            return images
        return self.change(images.float(), strength).round().clamp(0, 255).to(torch.uint8)


def distortions(height: int, width: int, padding: Padding) -> dict[str, DistortionFamily]:
    """Return all distortions for images of one size, by name, with a padding beyond the border.

    Rotations are anticlockwise. Successive images are shifted to the right, up, left and down, by complete pixels and
    so without resampling. Shear is along x. Noise is Gaussian and clipped at black and white. Every strength scales the
    same noise.
    """
    aspect, side = width / height, min(height, width)

    def warped(matrix: Tensor, images: Tensor) -> Tensor:
        return warp(images, matrix.expand(len(images), 3, 3), padding)

    def shifted(images: Tensor, pixels: float) -> Tensor:
        directions = ((pixels, 0), (0, -pixels), (-pixels, 0), (0, pixels))
        matrices = torch.stack([shift(right, down, height, width) for right, down in directions])
        return warp(images, matrices[torch.arange(len(images)) % 4], padding)

    def sheared(images: Tensor, degrees: float) -> Tensor:
        matrix = identity(1)[0].clone()
        matrix[0, 1] = math.tan(math.radians(degrees)) / aspect
        return warped(matrix, images)

    def blurred(images: Tensor, sigma: float) -> Tensor:
        size = 2 * math.ceil(3 * sigma) + 1
        blurry: Tensor = gaussian_blur2d(images, (size, size), (sigma, sigma), KORNIA_BORDERS[padding])
        return blurry

    def noisy(images: Tensor, deviation: float) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return images + 255 * deviation * torch.randn(images.shape, generator=generator)

    shifts = np.unique(np.linspace(0, 0.3 * side, 9).round()).tolist()
    sigmas = (side * np.linspace(0, 0.09, 10)).round(2).tolist()
    angles = tuple(range(-180, 181, 15))
    scales = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 1.75, 2)
    deviations = (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    return {
        ROTATION: DistortionFamily("degrees", angles, 0, lambda x, angle: warped(rotate(angle, aspect), x)),
        "scale": DistortionFamily("factor", scales, 1, lambda x, factor: warped(zoom(factor), x)),
        "shift": DistortionFamily("pixels", tuple(shifts), 0, shifted),
        "shear": DistortionFamily("degrees", tuple(range(-50, 51, 10)), 0, sheared),
        "blur": DistortionFamily("sigma in pixels", tuple(sigmas), 0, blurred),
        "noise": DistortionFamily("deviation, white is 1", deviations, 0, noisy),
    }


def trained_ranges(data: Recipe | None, height: int, width: int) -> dict[str, tuple[float, float]]:
    """Return the range of each distortion in training, in units of `distortions`, as far as the recipe declares it.

    A distorted MNIST counts as an augmentation. Angles and shifts of several augmentations are added; their scales are
    multiplied.
    """
    angle = slant = offset = 0.0
    low = high = 1.0
    for augmentation in _geometric_augmentations(data or {}):
        if isinstance(augmentation, RandomAffine):
            angle, slant = angle + augmentation.rotate, slant + augmentation.shear
            offset += augmentation.shift * min(height, width)
            low, high = low * augmentation.scale[0], high * augmentation.scale[1]
        elif isinstance(augmentation, RandomCrop):
            offset += augmentation.padding
    angle = min(angle, 180.0)
    ranges = {ROTATION: (-angle, angle), "scale": (low, high), "shift": (0.0, offset), "shear": (-slant, slant)}
    return {name: ends for name, ends in ranges.items() if ends[0] < ends[1]}


def _geometric_augmentations(data: Recipe) -> Iterator[nn.Module]:
    """Yield each `RandomAffine` and `RandomCrop` of a recipe.

    The datamodule is not built, because its images may be deleted.
    """
    arguments = data.get("init_args", {})
    if data.get("class_path") == recipe(DistortedMNIST)["class_path"]:
        yield from MNISTDistortion(arguments["task"]).parts
    for augmentation in arguments.get("augment", []):
        for kind in (RandomAffine, RandomCrop):
            if augmentation["class_path"] == recipe(kind)["class_path"]:
                yield kind(**augmentation.get("init_args", {}))


class Sample(NamedTuple):
    """Images to distort, uint8 ``(N, C, H, W)`` at the size of the network, with labels and transforms ``(N, 3, 3)``.

    Each source image occurs once, in its least distorted view.
    """

    images: Tensor
    labels: npt.NDArray[np.int64]
    transforms: Tensor

    @property
    def distorted(self) -> bool:
        """True if some images are already distorted."""
        return not torch.equal(self.transforms, identity(len(self.transforms)))


def take_sample(data: ImageDataModule, split: str, count: int) -> Sample:
    """Choose at most ``count`` images of a split at random, with `SEED`."""
    samples = data.samples(split)
    total, views = samples.transforms.shape[:2]
    indices = torch.from_numpy(np.sort(np.random.default_rng(SEED).permutation(total)[:count]))
    least_distorted = (samples.transforms[indices] - torch.eye(3)).abs().sum(dim=(2, 3)).argmin(dim=1)
    batches = [samples[part] for part in torch.split(indices * views + least_distorted, CHUNK)]
    images, labels, transforms = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "transforms")
    )
    return Sample(images, labels.numpy(), transforms)


def measure_invariance(
    subject: Subject,
    sample: Sample,
    families: Mapping[str, DistortionFamily],
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """Return the entries ``invariance``, ``uprightness`` and ``identity`` of a model in ``report.json``.

    The consistency is the share of predictions that equal the prediction for the undistorted image. ``ranges`` are
    those of training. Uprightness covers the angles of the training rotation, and at least `MIN_ROTATION_DEGREES` in
    each direction. It covers all angles if the training data declare no rotation. ``identity`` is the accuracy at the
    angles of `ROTATION` without the action of the transformers, or None.
    """
    undistorted = _outputs(subject, sample.images)
    curves: dict[str, Any] = {}
    uprightness: dict[str, Any] = {"silent": subject.unobserved_reason}
    for name, family in tqdm(families.items(), f"distorting for {subject.name}", disable=None, leave=False):
        outputs = [
            undistorted if strength == family.none else _outputs(subject, family(sample.images, strength))
            for strength in family.strengths
        ]
        shares = {
            measure: [wilson(float((_classes(each) == target).mean()), len(target)) for each in outputs]
            for measure, target in (("accuracy", sample.labels), ("consistency", _classes(undistorted)))
        }
        changed = [index for index, strength in enumerate(family.strengths) if strength != family.none]
        means = {measure: fmean(each[index].value for index in changed) for measure, each in shares.items()}
        form = {"unit": family.unit, "none": family.none, "trained": ranges.get(name), "strengths": family.strengths}
        curves[name] = form | shares | {"mean": means}
        if name == ROTATION and subject.model:
            end = max(ranges.get(ROTATION, (0.0, DEFAULT_ROTATION_DEGREES))[1], MIN_ROTATION_DEGREES)
            observations = [[output.observations for output in each] for each in outputs]
            uprightness = _rotation_response(dict(zip(family.strengths, observations, strict=True)), sample, end)
    return {"invariance": curves, "uprightness": uprightness, "identity": _identity(subject, sample, families)}


def _identity(subject: Subject, sample: Sample, families: Mapping[str, DistortionFamily]) -> list[Share] | None:
    if subject.identity is None or ROTATION not in families:
        return None
    family, accuracies = families[ROTATION], []
    for angle in family.strengths:
        parts = [subject.identity(part) for part in torch.split(family(sample.images, angle), CHUNK)]
        right = np.concatenate(parts).argmax(axis=1) == sample.labels
        accuracies.append(wilson(float(right.mean()), len(right)))
    return accuracies


def _outputs(subject: Subject, images: Tensor) -> list[BatchOutput]:
    return [subject.predict(part) for part in torch.split(images, CHUNK)]


def _classes(outputs: list[BatchOutput]) -> npt.NDArray[np.int64]:
    return np.asarray(np.concatenate([output.probabilities for output in outputs]).argmax(axis=1))


def _rotation_response(
    observations: Mapping[float, Sequence[list[Observation]]], sample: Sample, end: float
) -> dict[str, Any]:
    """Measure the response to rotation, from the observations of all batches at each angle.

    The measures of `Uprightness` cover the angles up to ``end`` in both directions. The residual angle is that after
    the transformer, minus its value without rotation. Every output of parallel transformers counts.
    """
    height, width = sample.images.shape[-2:]
    aspect, points, measure = width / height, pixel_centres(4, 4), Uprightness()
    indices = torch.split(torch.arange(len(sample.labels)), CHUNK)
    residual = []
    for degrees, batches in observations.items():
        batch_angles = []
        for groups, batch in zip(indices, batches, strict=True):
            transforms = sample.transforms[groups] @ rotate(degrees, aspect)
            sampling_points = final_points(partial(project_points, transforms), batch, points)
            rotations = [rotation_angle(each, points, aspect) for each in sampling_points]
            batch_angles.append(torch.stack(rotations))  # (branches, B)
            if abs(degrees) <= end:
                measure.update(groups, transforms, batch, aspect)
        residual.append(torch.cat(batch_angles, dim=1).flatten().double().numpy())
    angles = tuple(observations)
    quartiles = residual_quartiles(angles, np.degrees(np.stack(residual) - residual[angles.index(0)])).tolist()
    left = dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True))
    return {"within": (-end, end), "in_range": uprightness_values(measure), "angles": angles, "left": left}


def residual_quartiles(angles: Sequence[float], residual: Floats) -> Floats:
    """Return lower quartile, median and upper quartile ``(3, A)`` of residual angles ``(A, N)``, in degrees.

    They are computed around the circular mean. Both directions are unwrapped from 0 degrees, so that curves do not
    jump by 360 degrees.
    """
    centre = circmean(residual, low=-180, high=180, axis=1)
    spread = np.percentile(np.remainder(residual - centre[:, None] + 180, 360) - 180, (25, 50, 75), axis=1)
    start = angles.index(0)
    backwards, forwards = (np.unwrap(part, period=360) for part in (centre[start::-1], centre[start:]))
    return np.asarray(np.concatenate([backwards[:0:-1], forwards]) + spread)


def transformer_views(subject: Subject, image: Tensor) -> list[Pixels]:
    """Return the output of each last transformer of a model for an image ``(1, C, H, W)``."""
    assert subject.model is not None
    _, *outputs = transformer_images(subject.model, image, subject.predict(image).observations)
    return [pixels for (pixels,) in outputs]
