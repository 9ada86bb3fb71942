"""All that a report is made of, measured once."""

from dataclasses import dataclass

from upright.evidence.reporting.invariance import (
    ROTATION,
    Course,
    Distortion,
    Sample,
    Shown,
    distortions,
    follow,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.judging import Calibrated, Judged, judge
from upright.evidence.reporting.subjects import Group

EVERY = 180.0
"""Degrees either way that uprightness is measured over where no rotation is known from training."""
STEP = 15.0
"""The least."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that was measured.

    Args:
        group: the models and the data.
        split: that was judged by.
        judged: what each model said of it.
        calibrated: how far each can be believed.
        sample: the images that were distorted.
        ways: how.
        trained: on what of that each model was trained, as far as it is known.
        courses: what each did along the way.
        shown: the turned images that are shown.
    """

    group: Group
    split: str
    judged: list[Judged]
    calibrated: list[Calibrated]
    sample: Sample
    ways: list[Distortion]
    trained: list[dict[str, tuple[float, float]]]
    courses: list[Course]
    shown: Shown


def gather(group: Group, split: str, images: int) -> Evidence:
    """Measure all.

    Args:
        group: models and data.
        split: by which to judge.
        images: how many to distort.
    """
    subjects, data = group
    print(f"Asking {', '.join(subject.name for subject in subjects)} ...", flush=True)
    judged = judge(subjects, data, split)
    validated: list[Judged | None] = [None] * len(subjects)
    if split != "val":
        validated = list(judge(subjects, data, "val"))
    size = (data.spec.height, data.spec.width)
    sample, ways = take_sample(data, split, images), distortions(*size, data.augmentation.padding)
    trained = [trained_ranges(subject.trained_on, *size) for subject in subjects]
    ends = [max(ranges.get(ROTATION, (0.0, EVERY))[1], STEP) for ranges in trained]
    print(f"Distorting {len(sample.labels)} images ...", flush=True)
    courses, shown = follow(subjects, sample, ways, [(-end, end) for end in ends])
    calibrated = [Calibrated.of(*pair) for pair in zip(judged, validated, strict=True)]
    return Evidence(group, split, judged, calibrated, sample, ways, trained, courses, shown)
