"""``upright report``: compare models on one self-contained page."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from upright.errors import UserError
from upright.evidence.reporting import orientation
from upright.evidence.reporting.evidence import gather, orientation_record, to_record
from upright.evidence.reporting.page import Figures, draw_all, embed, write_page
from upright.evidence.reporting.subjects import Subject, open_subjects
from upright.files import check_replaceable, replacing_folder
from upright.runs.folder import ROOT
from upright.runs.seal import open_test_split

PAGE, RECORD = "report.html", "report.json"


def report(
    models: Sequence[str],
    data: str | None = None,
    split: str = "test",
    images: int = 500,
    precision: Sequence[str] = ("fp32",),
    to: str | None = None,
    force: bool = False,
    vector: Literal["pdf", "svg"] | None = None,
) -> int:
    """Evaluate models on the same images, and write ``report.html``, its figures and tables, and ``report.json``.

    Args:
        models: checkpoints, folders of runs, and bundles. Each one is compared with the first one.
        data: a YAML of data that replaces the data of the first model.
        split: split of the data, ``test`` or ``val``.
        images: number of images to distort for the curves, or to rotate.
        precision: precisions of bundles.
        to: folder of the report; by default ``checkpoints/report-NAME``.
        force: replace an existing report.
        vector: also write the plots in this format.

    Raises:
        UserError: if a model or the data cannot be used (see `open_subjects`), or the report exists.
    """
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}.")
    group = open_subjects(models, data, precision)
    target = Path(to) if to else ROOT / f"report-{_folder_name(group.subjects)}"
    check_replaceable(target, "a report", RECORD)
    if not force and target.exists() and any(target.iterdir()):
        raise UserError(f"Report '{target}' exists: --force replaces it, --to writes to another folder.")
    for subject in group.subjects:
        if split == "test" and subject.folder:
            open_test_split(subject.file, subject.folder, group.data, "upright report")
    if group.data.spec.classes:
        evidence = gather(group, split, images)
        template, record, summary = "report.html", to_record(evidence, data), _summary
        draw: Callable[[], Figures] = partial(draw_all, evidence)
    else:
        originals = orientation.chosen(group.data, split, images)
        answers = orientation.measure(group.subjects, originals)
        template, record = "orientation.html", orientation_record(group, answers, split, data)
        draw, summary = partial(orientation.draw, group, answers, originals), _orientation_summary
    print("Drawing figures ...", flush=True)
    with replacing_folder(target) as folder:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        write_page(folder / PAGE, template, record, embed(draw(), folder, vector))
    for model in record["models"]:
        print(summary(model))
    print(f"Page: {target / PAGE}")
    return 0


def _folder_name(subjects: Sequence[Subject]) -> str:
    names = list(dict.fromkeys(subject.origin.name for subject in subjects))
    name = "-".join(names) if len(names) <= 3 else f"{names[0]}-and-{len(names) - 1}-more"
    if Path(name).name != name:
        raise UserError(f"'{name}' cannot be part of a folder's name; give the folder of the report with --to.")
    return name


def _orientation_summary(model: dict[str, Any]) -> str:
    share, degrees = model["right_side"], model["degrees"]
    return (
        f"{model['name']}: right side {share['value']:.4f} (95 %: {share['low']:.4f} to {share['high']:.4f}), "
        f"{model['quarter_turns']['value']:.4f} at exact quarter turns, median error {degrees['median']:.1f} degrees, "
        f"calibration error {model['calibration_error']:.4f}."
    )


def _summary(model: dict[str, Any]) -> str:
    share, calibration = model["accuracy"], model["calibration"]
    line = (
        f"{model['name']}: accuracy {share['value']:.4f} (95 %: {share['low']:.4f} to {share['high']:.4f}), "
        f"calibration error {calibration['error']:.4f}"
    )
    if calibration["temperature"]:
        line += f", {calibration['error_after']:.4f} at temperature {calibration['temperature']:.3f}"
    if upright := model["uprightness"].get("in_range"):
        line += (
            f", uprightness {upright['uprightness']:.3f}, median deviation "
            f"{upright['relative_degrees_median']:.1f} degrees relative and "
            f"{upright['absolute_degrees_median']:.1f} absolute"
        )
    if change := model["difference"]:
        line += f"; {change['points']:+.2f} points to the first model ({change['low']:+.2f} to {change['high']:+.2f})"
    return f"{line}."
