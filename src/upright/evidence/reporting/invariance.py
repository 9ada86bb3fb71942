"""What a distortion of the images does to the answers, and what a spatial transformer does about it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from tqdm import tqdm

from upright.architectures.spatial_transformer import last_of
from upright.data.augmentation import RandomAffine, RandomCrop
from upright.data.datamodule import ImageDataModule
from upright.data.distorted_mnist import DistortedMNIST, MNISTDistortion
from upright.evidence.intervals import Share, wilson
from upright.evidence.reporting.subjects import Answer, Floats, Subject
from upright.images import Pixels
from upright.recipes import Recipe, recipe
from upright.runs.drawing import pixels_of
from upright.training.uprightness import Uprightness, final_poses
from upright.warp import Padding, identity, pixel_centres, project_points, rotation, rotation_angle, warp

SEED = 0
"""Of the sample of images, and of the noise."""
ROTATION = "rotation"
BORDER = {"zeros": "constant", "border": "replicate", "reflection": "reflect"}
"""Our name for what is beyond the border -> kornia's."""
AT_ONCE = 64
SHOWN = 4
"""Images, of as many classes, of which it is shown what transformers make."""


@dataclass(frozen=True)
class Distortion:
    """One way to change images, by degrees.

    Args:
        name: of it.
        unit: of the strengths.
        strengths: in ascending order; one of them is ``none``.
        none: the strength that changes nothing.
        change: float images ``(B, C, H, W)`` in [0, 255] by a strength.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    none: float
    change: Callable[[Tensor, float], Tensor]

    def __call__(self, images: Tensor, strength: float) -> Tensor:
        """The uint8 ``images`` ``(B, C, H, W)``, distorted; uint8 again, for this is what a model is given."""
        if strength == self.none:
            return images
        return self.change(images.float(), strength).round().clamp(0, 255).to(torch.uint8)


def distortions(height: int, width: int, padding: Padding) -> list[Distortion]:
    """All of them, for images of this size.

    Rotations are anticlockwise; shifts are to the right, up, left or down, image by image in turn, by whole pixels, so
    that they resample nothing; shear is along x; noise is Gaussian, cut off at black and white, and the same at every
    strength but for its size.

    Args:
        height: of the images.
        width: of the images.
        padding: what is seen beyond the border, by all of them.
    """
    aspect, side = width / height, min(height, width)

    def turned(images: Tensor, degrees: float) -> Tensor:
        return warp(images, rotation(torch.tensor([math.radians(degrees)]), aspect).expand(len(images), 3, 3), padding)

    def scaled(images: Tensor, factor: float) -> Tensor:
        matrices = identity(len(images)).clone()
        matrices[:, :2] /= factor
        return warp(images, matrices, padding)

    def shifted(images: Tensor, pixels: float) -> Tensor:
        ways = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
        matrices = identity(len(images)).clone()
        matrices[:, :2, 2] = 2 * pixels * ways[torch.arange(len(images)) % 4] / torch.tensor([width, height])
        return warp(images, matrices, padding)

    def sheared(images: Tensor, degrees: float) -> Tensor:
        matrices = identity(len(images)).clone()
        matrices[:, 0, 1] = math.tan(math.radians(degrees)) / aspect
        return warp(images, matrices, padding)

    def blurred(images: Tensor, sigma: float) -> Tensor:
        size = 2 * math.ceil(3 * sigma) + 1
        found: Tensor = gaussian_blur2d(images, (size, size), (sigma, sigma), BORDER[padding])
        return found

    def noisy(images: Tensor, deviation: float) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return images + 255 * deviation * torch.randn(images.shape, generator=generator)

    shifts = np.unique(np.linspace(0, 0.3 * side, 9).round()).tolist()
    sigmas = (side * np.linspace(0, 0.09, 10)).round(2).tolist()
    return [
        Distortion(ROTATION, "degrees", tuple(range(-180, 181, 15)), 0, turned),
        Distortion("scale", "factor", (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 1.75, 2), 1, scaled),
        Distortion("shift", "pixels", tuple(shifts), 0, shifted),
        Distortion("shear", "degrees", tuple(range(-50, 51, 10)), 0, sheared),
        Distortion("blur", "sigma in pixels", tuple(sigmas), 0, blurred),
        Distortion("noise", "deviation, white is 1", (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5), 0, noisy),
    ]


def trained_ranges(data: Recipe | None, height: int, width: int) -> dict[str, tuple[float, float]]:
    """From where to where a recipe's task and augmentation distort, as far as they say so, in units of `distortions`.

    `RandomAffine` and `RandomCrop` say it; where there are several, they add up.

    Args:
        data: of the datamodule, if it is known.
        height: of the images.
        width: of the images.
    """
    side = min(height, width)
    turn = slant = shift = 0.0
    low = high = 1.0
    for part in _moves(data or {}):
        if isinstance(part, RandomAffine):
            turn, slant, shift = turn + part.rotate, slant + part.shear, shift + part.shift * side
            low, high = low * part.scale[0], high * part.scale[1]
        elif isinstance(part, RandomCrop):
            shift += part.padding
    ranges = {ROTATION: (-min(turn, 180.0), min(turn, 180.0)), "scale": (low, high), "shift": (0.0, shift)}
    ranges["shear"] = (-slant, slant)
    return {name: ends for name, ends in ranges.items() if ends[0] < ends[1]}


def _moves(data: Recipe) -> Iterator[nn.Module]:
    """What of it is ours, without building the data, which may be gone."""
    arguments = data.get("init_args", {})
    if data.get("class_path") == recipe(DistortedMNIST)["class_path"]:
        yield from MNISTDistortion(arguments["task"]).parts
    for part in arguments.get("augment", []):
        for kind in (RandomAffine, RandomCrop):
            if part["class_path"] == recipe(kind)["class_path"]:
                yield kind(**part.get("init_args", {}))


class Sample(NamedTuple):
    """Images that are distorted: one of each source image, in the view that shows it the least distorted.

    Args:
        images: uint8 ``(N, C, H, W)``, as the network sees them.
        labels: ``(N,)``.
        transforms: what the view did, ``(N, 3, 3)``.
    """

    images: Tensor
    labels: npt.NDArray[np.int64]
    transforms: Tensor

    @property
    def distorted(self) -> bool:
        """Whether the data show none of them as it is."""
        return not torch.equal(self.transforms, identity(len(self.transforms)))


def take_sample(data: ImageDataModule, split: str, count: int) -> Sample:
    """So many images of a split, or all, drawn with `SEED`."""
    samples = data.samples(split)
    number, views = samples.transforms.shape[:2]
    chosen = torch.from_numpy(np.sort(np.random.default_rng(SEED).permutation(number)[:count]))
    least = (samples.transforms[chosen] - torch.eye(3)).abs().sum(dim=(2, 3)).argmin(dim=1)
    batches = [samples[part] for part in torch.split(chosen * views + least, AT_ONCE)]
    images, labels, _, _, transforms = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Sample(images, labels.numpy(), transforms)


class Curve(NamedTuple):
    """By strength of a distortion.

    Args:
        strengths: ascending.
        accuracy: share of right answers.
        consistency: share of answers that are what they are without distortion.
    """

    strengths: tuple[float, ...]
    accuracy: list[Share]
    consistency: list[Share]


@dataclass(eq=False)
class Turning:
    """What a spatial transformer does as its input is turned.

    Of several parallel ones each counts as an image of its own.

    Args:
        angles: applied, in degrees.
        residual: that are left after it, beyond what is left without rotation, in degrees from -180 to 180:
            ``(A, N)``.
        uprightness: the measure, over ``within``.
        within: the angles that it is over: those that were trained on, or all.
        strips: of each shown image, what each of the last transformers sees at every angle.
    """

    angles: tuple[float, ...]
    residual: Floats
    uprightness: float
    within: tuple[float, float]
    strips: list[list[list[Pixels]]]

    @property
    def quartiles(self) -> Floats:
        """Lower quartile, median and upper quartile of what is left, ``(3, A)``.

        Taken around the circular mean, and continued from 0 degrees either way, so that nothing jumps by a full turn.
        """
        radians = np.radians(self.residual)
        centre = np.degrees(np.arctan2(np.sin(radians).mean(axis=1), np.cos(radians).mean(axis=1)))
        spread = np.percentile(_wrapped(self.residual - centre[:, None]), (25, 50, 75), axis=1)
        start = self.angles.index(0)
        backwards, forwards = (np.unwrap(part, period=360) for part in (centre[start::-1], centre[start:]))
        found: Floats = np.concatenate([backwards[:0:-1], forwards]) + spread
        return found


@dataclass(eq=False)
class Course:
    """What one model did along all distortions."""

    curves: dict[str, Curve] = field(default_factory=dict)
    turning: Turning | None = None


class Shown(NamedTuple):
    """Images that are shown at every angle: places in the sample, and ``strips[image][angle]``."""

    places: list[int]
    strips: list[list[Pixels]]


def follow(
    subjects: Sequence[Subject], sample: Sample, ways: Sequence[Distortion], ranges: Sequence[tuple[float, float]]
) -> tuple[list[Course], Shown]:
    """Ask all models about the same distorted images.

    Args:
        subjects: the models.
        sample: of undistorted images.
        ways: to distort them.
        ranges: of angles that each model was trained on.

    Returns:
        What each did, and the turned images that are shown.
    """
    courses = [Course() for _ in subjects]
    plain = [_answers(subject, sample.images) for subject in subjects]
    expected = [_first(answers) for answers in plain]
    places = _of_each_class(sample.labels, SHOWN)
    shown = Shown(places, [[] for _ in places])
    turnings = [_Turnings(subject, sample, places, ends) for subject, ends in zip(subjects, ranges, strict=True)]
    steps = [(way, strength) for way in ways for strength in way.strengths]
    found: dict[str, list[list[npt.NDArray[np.int64]]]] = {way.name: [[] for _ in subjects] for way in ways}
    for way, strength in tqdm(steps, desc="distorting", unit="step", disable=None, leave=False):
        images = way(sample.images, strength)
        if way.name == ROTATION:
            for strip, place in zip(shown.strips, places, strict=True):
                strip.append(pixels_of(images[place, None])[0])
        for number, subject in enumerate(subjects):
            answers = plain[number] if strength == way.none else _answers(subject, images)
            found[way.name][number].append(_first(answers))
            if way.name == ROTATION and subject.model is not None:
                turnings[number].add(strength, images, answers)
    for number, course in enumerate(courses):
        for way in ways:
            said = found[way.name][number]
            accuracy = [wilson(float((each == sample.labels).mean()), len(each)) for each in said]
            consistency = [wilson(float((each == expected[number]).mean()), len(each)) for each in said]
            course.curves[way.name] = Curve(way.strengths, accuracy, consistency)
        course.turning = turnings[number].done()
    return courses, shown


def _answers(subject: Subject, images: Tensor) -> list[Answer]:
    return [subject.answer(part) for part in torch.split(images, AT_ONCE)]


def _first(answers: list[Answer]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = np.concatenate([answer.probabilities for answer in answers]).argmax(axis=1)
    return found


def _of_each_class(labels: npt.NDArray[np.int64], count: int) -> list[int]:
    """The first image of each of so many classes, evenly spread over those that there are."""
    classes, firsts = np.unique(labels, return_index=True)
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(count, len(classes))).round().astype(int))
    return [int(firsts[place]) for place in chosen]


class _Turnings:
    """Collects one model's `Turning`, angle by angle."""

    def __init__(self, subject: Subject, sample: Sample, places: list[int], ends: tuple[float, float]) -> None:
        self.subject, self.sample, self.places, self.ends = subject, sample, places, ends
        height, width = sample.images.shape[-2:]
        self.aspect = width / height
        self.measure = Uprightness()
        self.angles: list[float] = []
        self.residual: list[Floats] = []
        self.strips: list[list[list[Pixels]]] = [[] for _ in places]

    def add(self, degrees: float, images: Tensor, answers: list[Answer]) -> None:
        """What was answered to all images, turned by so much."""
        turn = rotation(torch.tensor([math.radians(degrees)]), self.aspect)
        points = pixel_centres(4, 4)
        left, start = [], 0
        for answer in answers:
            some = slice(start, start + len(answer.probabilities))
            start = some.stop
            transforms = self.sample.transforms[some] @ turn
            poses = final_poses(partial(project_points, transforms), answer.seen, points)
            left.append(torch.stack([rotation_angle(pose, points, self.aspect) for pose in poses]))  # (branches, B)
            if self.ends[0] <= degrees <= self.ends[1]:
                groups = torch.arange(some.start, some.stop)
                self.measure.update(groups, transforms, answer.seen, self.aspect)
        self.angles.append(degrees)
        self.residual.append(torch.cat(left, dim=1).flatten().double().numpy())
        for strip, place in zip(self.strips, self.places, strict=True):
            strip.append(list(self._sights(images[place, None])))

    def _sights(self, image: Tensor) -> Iterator[Pixels]:
        model = self.subject.model
        assert model is not None
        normalised = model.normalised(image)
        for last in last_of(self.subject.answer(image).seen):
            yield pixels_of(model.shown(last.view(normalised)))[0]

    def done(self) -> Turning | None:
        """All of it; None if there was nothing to collect."""
        if not self.angles:
            return None
        residual = np.stack(self.residual)
        degrees = _wrapped(np.degrees(residual - residual[self.angles.index(0)]))
        return Turning(tuple(self.angles), degrees, float(self.measure.compute()), self.ends, self.strips)


def _wrapped(degrees: Floats) -> Floats:
    """From -180 to 180."""
    found: Floats = np.remainder(degrees + 180, 360) - 180
    return found
