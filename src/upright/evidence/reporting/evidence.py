"""All measurements of a report, and their conversion to plain data."""

import math
import platform
from dataclasses import is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from upright.evidence.intervals import Share
from upright.evidence.reporting.invariance import (
    ROTATION,
    SEED,
    Course,
    Curve,
    Distortion,
    Sample,
    distortions,
    follow,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.measures import Calibration, Result, calibrate, difference, evaluate
from upright.evidence.reporting.subjects import Group, Subject
from upright.files import file_hash
from upright.runs.seal import content_digest, count, count_in_sweep

FORMAT = 1
PACKAGES = ("upright", "torch", "onnxruntime", "numpy", "kornia")
FULL_TURN, STEP = 180.0, 15.0
"""Degrees in each direction: the range of uprightness if the training rotation is unknown, and the smallest range."""


class Evidence(NamedTuple):
    """All measurements. Lists have one entry per model.

    Args:
        group: the models and the data.
        split: split of the data.
        results: answers of each model to the split.
        calibrations: calibration of the confidence.
        sample: the images that were distorted.
        ways: the distortions.
        trained: ranges of the distortions in training, by distortion, if the recipe declares them.
        courses: curves, and the response to rotation.
    """

    group: Group
    split: str
    results: list[Result]
    calibrations: list[Calibration]
    sample: Sample
    ways: list[Distortion]
    trained: list[dict[str, tuple[float, float]]]
    courses: list[Course]


def gather(group: Group, split: str, images: int) -> Evidence:
    """Measure everything.

    Args:
        group: models and data.
        split: split to evaluate.
        images: number of images to distort.
    """
    subjects, data = group
    print(f"Evaluating {', '.join(subject.name for subject in subjects)} ...", flush=True)
    results = evaluate(subjects, data, split)
    validations = evaluate(subjects, data, "val") if split != "val" else [None] * len(subjects)
    size = (data.spec.height, data.spec.width)
    sample, ways = take_sample(data, split, images), distortions(*size, data.augmentation.padding)
    trained = [trained_ranges(subject.origin.data, *size) for subject in subjects]
    ends = [max(ranges.get(ROTATION, (0.0, FULL_TURN))[1], STEP) for ranges in trained]
    print(f"Distorting {len(sample.labels)} images ...", flush=True)
    courses = follow(subjects, sample, ways, [(-end, end) for end in ends])
    calibrations = [calibrate(*pair) for pair in zip(results, validations, strict=True)]
    return Evidence(group, split, results, calibrations, sample, ways, trained, courses)


def figures(evidence: Evidence, chosen: str | None) -> dict[str, Any]:
    """Return every number as plain data; ``chosen`` is the YAML of other data, if the user gave one."""
    data, first = evidence.group.data, evidence.results[0]
    spec, views = data.spec, data.views(evidence.split)
    record = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "class_path": data.recipe["class_path"],
            "chosen": chosen,
            "split": evidence.split,
            "digest": data.manifest.digest,
            "answers": len(first.labels),
            "sources": len(np.unique(first.groups)),
            "views": [f"{name}{views.unit}" for name in views.names],
            "classes": spec.classes,
            "size": [spec.channels, spec.height, spec.width],
        },
        "curves": {
            "images": len(evidence.sample.labels),
            "seed": SEED,
            "padding": data.augmentation.padding,
            "already_distorted": evidence.sample.distorted,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "models": [_model(evidence, number) for number in range(len(evidence.results))],
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def _model(evidence: Evidence, number: int) -> dict[str, Any]:
    subjects, data = evidence.group
    subject, result, course = subjects[number], evidence.results[number], evidence.courses[number]
    origin, trained = subject.origin, evidence.trained[number]
    return {
        "name": subject.name,
        "kind": subject.kind,
        "path": origin.path,
        "bytes": subject.file.stat().st_size,
        "sha256": file_hash(subject.file),
        "network": origin.network["class_path"] if origin.network else "unknown",
        "run": origin.run,
        "git_commit": origin.git_commit,
        "unseen": subject.unseen,
        "test_openings": _openings(subject, evidence),
        **result.accuracy(data.spec.classes, list(data.names(evidence.split))),
        "difference": difference(evidence.results[0], result) if number else None,
        "calibration": evidence.calibrations[number],
        "invariance": {way.name: _curve(way, course.curves[way.name], trained.get(way.name)) for way in evidence.ways},
        "uprightness": _uprightness(subject, course, result),
    }


def _plain(value: Any) -> Any:
    """Return named tuples and dataclasses as dicts, recursively."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _openings(subject: Subject, evidence: Evidence) -> dict[str, Any] | None:
    """Count accesses to the test split; None for another split, or if the run is gone."""
    if evidence.split != "test" or subject.folder is None:
        return None
    split = content_digest(evidence.group.data.manifest.hashes["test"])
    return {"run": count(subject.folder, split), "sweep": count_in_sweep(subject.folder.parent, split)}


def _curve(way: Distortion, curve: Curve, trained: tuple[float, float] | None) -> dict[str, Any]:
    def mean(shares: list[Share]) -> float:
        pairs = zip(curve.strengths, shares, strict=True)
        return float(np.mean([share.value for strength, share in pairs if strength != way.none]))

    means = {"accuracy": mean(curve.accuracy), "consistency": mean(curve.consistency)}
    return {"unit": way.unit, "none": way.none, "trained": trained, **curve._asdict(), "mean": means}


def _uprightness(subject: Subject, course: Course, result: Result) -> dict[str, Any]:
    turning = course.turning
    if turning is None:
        return {"silent": subject.silent}
    low, middle, high = turning.quartiles.tolist()
    inside = [turning.within[0] <= angle <= turning.within[1] for angle in turning.angles]
    return {
        "value": None if math.isnan(turning.uprightness) else turning.uprightness,
        "within": turning.within,
        "on_split": result.uprightness,
        "mean_left": float(np.abs(turning.residual[inside]).mean()),
        "angles": turning.angles,
        "left": {"lower_quartile": low, "median": middle, "upper_quartile": high},
    }
