"""``upright report``: what models are worth, on one page that needs nothing else."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from upright.errors import UserError
from upright.evidence.reporting.gathering import Evidence, gather
from upright.evidence.intervals import Share
from upright.evidence.reporting.invariance import SEED, Course, Curve, Distortion, Turning
from upright.evidence.reporting.judging import Judged, difference
from upright.evidence.reporting.page import draw_all, write_page
from upright.evidence.reporting.subjects import Subject, open_subjects
from upright.files import check_replaceable, file_hash, replacing_folder
from upright.runs.folder import ROOT
from upright.runs.seal import content_digest, count, count_in_sweep, open_test_split

FORMAT = 1
PAGE, FIGURES = "report.html", "report.json"
PACKAGES = ("upright", "torch", "onnxruntime", "numpy", "kornia")


def report(
    models: Sequence[str],
    data: str | None = None,
    split: str = "test",
    images: int = 500,
    precision: Sequence[str] = ("fp32",),
    to: str | None = None,
    force: bool = False,
) -> int:
    """Judge models by the same images, and write ``report.html``, its pictures, and ``report.json``.

    Args:
        models: checkpoints, folders of runs, bundles; the others are compared with the first.
        data: a YAML of data, in place of those of the first model.
        split: of the data, ``test`` or ``val``.
        images: how many are distorted for the curves, drawn at random, always the same.
        precision: of bundles.
        to: the report's folder; ``checkpoints/report-NAME`` by default.
        force: replace an existing report.

    Raises:
        UserError: if a model or the data cannot be used (see `open_subjects`), or the report exists.
    """
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}.")
    group = open_subjects(models, data, precision)
    target = Path(to) if to else ROOT / f"report-{_folder_name(group.subjects)}"
    _check_target(target, force)
    for subject in group.subjects:
        if split == "test" and subject.folder:
            open_test_split(subject.file, subject.folder, group.data, "upright report")
    evidence = gather(group, split, images)
    figures = _figures(evidence, data)
    print("Writing ...", flush=True)
    with replacing_folder(target) as folder:
        text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FIGURES).write_text(text + "\n", encoding="utf-8")
        write_page(folder / PAGE, figures, draw_all(evidence, folder))
    for line in _summary(figures):
        print(line)
    print(f"Page: {target / PAGE}")
    return 0


def _folder_name(subjects: Sequence[Subject]) -> str:
    names = list(dict.fromkeys(subject.called for subject in subjects))
    name = "-".join(names) if len(names) <= 3 else f"{names[0]}-and-{len(names) - 1}-more"
    if Path(name).name != name:
        raise UserError(f"'{name}' cannot be part of a folder's name; --to says where to write the report.")
    return name


def _check_target(target: Path, force: bool) -> None:
    check_replaceable(target, "a report", FIGURES)
    if not force and target.exists() and any(target.iterdir()):
        raise UserError(f"Report '{target}' exists: --force replaces it, --to puts this one elsewhere.")


def _figures(evidence: Evidence, data: str | None) -> dict[str, Any]:
    """Every number, as plain data."""
    subjects, shown = evidence.group
    first, spec = evidence.judged[0], shown.spec
    names = list(shown.names(evidence.split))
    models = []
    for number, (subject, judged) in enumerate(zip(subjects, evidence.judged, strict=True)):
        course, trained = evidence.courses[number], evidence.trained[number]
        models.append(
            {
                "name": subject.name,
                "kind": subject.kind,
                "path": subject.path,
                "bytes": subject.file.stat().st_size,
                "sha256": file_hash(subject.file),
                "network": subject.network,
                "run": subject.run,
                "git_commit": subject.git_commit,
                "unseen": subject.unseen,
                "test_openings": _openings(subject, evidence),
                **judged.figures(spec.classes, names),
                "difference": difference(first, judged) if number else None,
                "calibration": evidence.calibrated[number].figures(),
                "invariance": {way.name: _curve(way, course, trained.get(way.name)) for way in evidence.ways},
                "uprightness": _turning(course.turning, judged, subject),
            }
        )
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "class_path": shown.recipe["class_path"],
            "chosen": data,
            "split": evidence.split,
            "digest": shown.manifest.digest,
            "answers": len(first.labels),
            "sources": len(np.unique(first.groups)),
            "views": [f"{name}{shown.views(evidence.split).unit}" for name in shown.views(evidence.split).names],
            "classes": list(spec.classes),
            "size": [spec.channels, spec.height, spec.width],
        },
        "curves": {
            "images": len(evidence.sample.labels),
            "seed": SEED,
            "padding": shown.augmentation.padding,
            "already_distorted": evidence.sample.distorted,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "models": models,
    }


def _openings(subject: Subject, evidence: Evidence) -> dict[str, Any] | None:
    """How often the test split was opened; None where it was not, or where the run is gone that would know."""
    if evidence.split != "test" or subject.folder is None:
        return None
    split = content_digest(evidence.group.data.manifest.hashes["test"])
    return {"run": count(subject.folder, split), "sweep": count_in_sweep(subject.folder.parent, split)}


def _curve(way: Distortion, course: Course, trained: tuple[float, float] | None) -> dict[str, Any]:
    curve = course.curves[way.name]
    return {
        "unit": way.unit,
        "none": way.none,
        "trained": trained,
        "strengths": list(curve.strengths),
        "accuracy": [share._asdict() for share in curve.accuracy],
        "consistency": [share._asdict() for share in curve.consistency],
        "mean": {"accuracy": _mean(way, curve, curve.accuracy), "consistency": _mean(way, curve, curve.consistency)},
    }


def _mean(way: Distortion, curve: Curve, shares: Sequence[Share]) -> float:
    """Over what is distorted."""
    pairs = zip(curve.strengths, shares, strict=True)
    return float(np.mean([share.value for strength, share in pairs if strength != way.none]))


def _turning(turning: Turning | None, judged: Judged, subject: Subject) -> dict[str, Any]:
    if turning is None:
        return {"silent": subject.silent}
    low, middle, high = turning.quartiles.tolist()
    inside = [turning.within[0] <= angle <= turning.within[1] for angle in turning.angles]
    return {
        "value": None if math.isnan(turning.uprightness) else turning.uprightness,
        "within": turning.within,
        "on_split": judged.uprightness,
        "mean_left": float(np.abs(turning.residual[inside]).mean()),
        "angles": list(turning.angles),
        "left": {"lower_quartile": low, "median": middle, "upper_quartile": high},
    }


def _summary(figures: Mapping[str, Any]) -> list[str]:
    """A line for each model."""
    lines = []
    for model in figures["models"]:
        share, calibration = model["accuracy"], model["calibration"]
        line = (
            f"{model['name']}: accuracy {share['value']:.4f} (95 %: {share['low']:.4f} to {share['high']:.4f}), "
            f"calibration error {calibration['error']:.4f}"
        )
        if calibration["temperature"]:
            line += f", {calibration['error_after']:.4f} at temperature {calibration['temperature']:.3f}"
        if model["uprightness"].get("value") is not None:
            line += f", uprightness {model['uprightness']['value']:.3f}"
        if change := model["difference"]:
            line += f"; {change['points']:+.2f} points from the first ({change['low']:+.2f} to {change['high']:+.2f})"
        lines.append(f"{line}.")
    return lines
