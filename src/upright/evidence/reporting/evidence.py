"""Gather the measurements of a report, and convert them to plain data."""

import platform
from collections.abc import Sequence
from dataclasses import is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from upright.evidence.reporting import orientation
from upright.evidence.reporting.invariance import (
    ROTATION,
    SEED,
    DistortionFamily,
    Invariance,
    InvarianceCurve,
    Sample,
    distortions,
    measure_invariance,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.measures import Calibration, Predictions, calibrate, difference, evaluate
from upright.evidence.reporting.subjects import Group, Subject
from upright.files import file_hash
from upright.intervals import Share
from upright.runs.seal import content_digest, count, count_in_sweep

FORMAT = 2
PACKAGES = ("upright", "torch", "onnxruntime", "numpy", "kornia")
DEFAULT_ROTATION_DEGREES = 180.0
"""Range of angles for the uprightness, in each direction, if the training data declare no rotation."""
MIN_ROTATION_DEGREES = 15.0
"""Smallest range of angles for the uprightness, in each direction."""


class Evidence(NamedTuple):
    """All measurements of a report. Lists have one entry per model.

    Args:
        group: the models and the data.
        split: split of the data.
        predictions: predictions for the split.
        calibrations: calibration of the confidence.
        sample: the images that were distorted.
        families: the distortions.
        training_ranges: range of each distortion in training, see `trained_ranges`.
        invariances: invariance to the distortions.
    """

    group: Group
    split: str
    predictions: list[Predictions]
    calibrations: list[Calibration]
    sample: Sample
    families: list[DistortionFamily]
    training_ranges: list[dict[str, tuple[float, float]]]
    invariances: list[Invariance]


def gather(group: Group, split: str, images: int) -> Evidence:
    """Evaluate all models.

    Uprightness covers the angles of the training rotation, and at least `MIN_ROTATION_DEGREES` in each direction. It
    covers all angles if the training data declare no rotation.

    Args:
        group: models and data.
        split: split to evaluate.
        images: number of images to distort.
    """
    subjects, data = group
    print(f"Evaluating {', '.join(subject.name for subject in subjects)} ...", flush=True)
    predictions = evaluate(subjects, data, split)
    validations = evaluate(subjects, data, "val") if split != "val" else [None] * len(subjects)
    size = (data.spec.height, data.spec.width)
    sample, families = take_sample(data, split, images), distortions(*size, data.augmentation.padding)
    training_ranges = [trained_ranges(subject.origin.data, *size) for subject in subjects]
    rotations = [ranges.get(ROTATION, (0.0, DEFAULT_ROTATION_DEGREES))[1] for ranges in training_ranges]
    ends = [max(rotation, MIN_ROTATION_DEGREES) for rotation in rotations]
    print(f"Distorting {len(sample.labels)} images ...", flush=True)
    invariances = measure_invariance(subjects, sample, families, [(-end, end) for end in ends])
    calibrations = [calibrate(*pair) for pair in zip(predictions, validations, strict=True)]
    return Evidence(group, split, predictions, calibrations, sample, families, training_ranges, invariances)


def to_record(evidence: Evidence, data_yaml: str | None) -> dict[str, Any]:
    """Return the content of ``report.json``.

    Args:
        evidence: all measurements.
        data_yaml: path of the YAML of data, if the user gave one.
    """
    data, first = evidence.group.data, evidence.predictions[0]
    spec, views = data.spec, data.views(evidence.split)
    record = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "class_path": data.recipe["class_path"],
            "chosen": data_yaml,
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
        "versions": _versions(),
        "models": [_model_record(evidence, index) for index in range(len(evidence.predictions))],
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def orientation_record(
    group: Group, answers: Sequence[orientation.Answers], split: str, data_yaml: str | None
) -> dict[str, Any]:
    """Return the content of ``report.json`` for models that estimate the orientation.

    Args:
        group: the models and the data.
        answers: answers of each model.
        split: split of the data.
        data_yaml: path of the YAML of data, if the user gave one.
    """
    data, spec = group.data, group.data.spec
    record = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "class_path": data.recipe["class_path"],
            "chosen": data_yaml,
            "split": split,
            "digest": data.manifest.digest,
            "sources": len(answers[0].angles),
            "angles": len(orientation.DEGREES),
            "largest": orientation.largest_side(data),
            "size": [spec.channels, spec.height, spec.width],
        },
        "versions": _versions(),
        "models": [
            _file_record(subject) | each.record(_threshold(subject))
            for subject, each in zip(group.subjects, answers, strict=True)
        ],
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def _threshold(subject: Subject) -> float | None:
    bundle = subject.origin.bundle
    return bundle.manifest.get("orientation", {}).get("threshold") if bundle else None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _file_record(subject: Subject) -> dict[str, Any]:
    origin = subject.origin
    return {
        "name": subject.name,
        "kind": subject.kind,
        "path": origin.path,
        "bytes": len(subject.file.read_bytes()),
        "sha256": file_hash(subject.file),
        "network": origin.network["class_path"] if origin.network else "unknown",
        "run": origin.run,
        "git_commit": origin.git_commit,
        "unseen": subject.unseen,
    }


def _model_record(evidence: Evidence, index: int) -> dict[str, Any]:
    subjects, data = evidence.group
    subject, predictions, invariance = subjects[index], evidence.predictions[index], evidence.invariances[index]
    training_ranges = evidence.training_ranges[index]
    return _file_record(subject) | {
        "test_openings": _openings(subject, evidence),
        **predictions.accuracy_record(data.spec.classes, list(data.names(evidence.split))),
        "difference": difference(evidence.predictions[0], predictions) if index else None,
        "calibration": evidence.calibrations[index],
        "invariance": {
            family.name: _curve_record(family, invariance.curves[family.name], training_ranges.get(family.name))
            for family in evidence.families
        },
        "uprightness": _uprightness_record(subject, invariance, predictions),
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
    """Count the evaluations on the test split. Return None for another split, or if the run's folder is missing."""
    if evidence.split != "test" or subject.folder is None:
        return None
    split = content_digest(evidence.group.data.manifest.hashes["test"])
    return {"run": count(subject.folder, split), "sweep": count_in_sweep(subject.folder.parent, split)}


def _curve_record(
    family: DistortionFamily, curve: InvarianceCurve, training_range: tuple[float, float] | None
) -> dict[str, Any]:
    def mean(shares: list[Share]) -> float:
        pairs = zip(curve.strengths, shares, strict=True)
        return float(np.mean([share.value for strength, share in pairs if strength != family.none]))

    means = {"accuracy": mean(curve.accuracy), "consistency": mean(curve.consistency)}
    return {"unit": family.unit, "none": family.none, "trained": training_range, **curve._asdict(), "mean": means}


def _uprightness_record(subject: Subject, invariance: Invariance, predictions: Predictions) -> dict[str, Any]:
    response = invariance.rotation_response
    if response is None:
        return {"silent": subject.unobserved_reason}
    low, middle, high = response.quartiles.tolist()
    return {
        "within": response.within,
        "in_range": response.uprightness,
        "on_split": predictions.uprightness,
        "votes_confidence": predictions.votes_confidence,
        "angles": response.angles,
        "left": {"lower_quartile": low, "median": middle, "upper_quartile": high},
    }
