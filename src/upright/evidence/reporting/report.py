"""``upright report``: compare models on one self-contained page."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from upright.errors import UserError
from upright.evidence.reporting import evidence as classification
from upright.evidence.reporting import orientation
from upright.evidence.reporting.page import PAGE, write_page
from upright.evidence.reporting.subjects import Subject, open_subjects
from upright.files import check_replaceable, file_hash, replacing_folder
from upright.runs.folder import ROOT
from upright.runs.seal import open_test_split

RECORD = "report.json"
FORMAT = 2
PACKAGES = ("upright", "torch", "onnxruntime", "numpy", "kornia")


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

    The arguments are the options of the command, see `upright.options.Report`.

    Raises:
        UserError: if a model or the data cannot be used (see `open_subjects`), or the report exists.
    """
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}.")
    group = open_subjects(models, data, precision)
    if group.data.spec.task == "multilabel":
        raise UserError(
            f"'{models[0]}' finds several classes per image, and report compares models with one class per image; "
            "`upright test` writes the scores of each class."
        )
    target = Path(to) if to else ROOT / f"report-{_folder_name(group.subjects)}"
    check_replaceable(target, "a report", RECORD)
    if not force and target.exists() and any(target.iterdir()):
        raise UserError(f"Report '{target}' exists: --force replaces it, --to writes to another folder.")
    for subject in group.subjects:
        if split == "test" and subject.folder:
            open_test_split(subject.file, subject.folder, group.data, "upright report")
    evidence = (classification if group.data.spec.classes else orientation).gather(group, split, images)
    record = _record(evidence, data)
    print("Drawing figures ...", flush=True)
    with replacing_folder(target) as folder:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        write_page(folder, evidence.template, record, evidence.draw(record["models"]), vector)
    for model in record["models"]:
        print(evidence.summary(model))
    print(f"Page: {target / PAGE}")
    return 0


def _folder_name(subjects: Sequence[Subject]) -> str:
    names = list(dict.fromkeys(subject.origin.name for subject in subjects))
    name = "-".join(names) if len(names) <= 3 else f"{names[0]}-and-{len(names) - 1}-more"
    if Path(name).name != name:
        raise UserError(f"'{name}' cannot be part of a folder's name; give the folder of the report with --to.")
    return name


def _record(evidence: classification.Evidence | orientation.Evidence, data_yaml: str | None) -> dict[str, Any]:
    """Return the content of ``report.json``. ``data_yaml`` is the YAML of data, if the user gave one."""
    subjects, data = evidence.group
    spec, own = data.spec, evidence.record()
    common = {
        "class_path": data.recipe["class_path"],
        "chosen": data_yaml,
        "split": evidence.split,
        "digest": data.manifest.digest,
        "size": [spec.channels, spec.height, spec.width],
    }
    plain: dict[str, Any] = _plain(
        {
            "format": FORMAT,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **own,
            "data": common | own["data"],
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "models": [_file_record(*pair) for pair in zip(subjects, own["models"], strict=True)],
        }
    )
    return plain


def _file_record(subject: Subject, measures: dict[str, Any]) -> dict[str, Any]:
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
        **measures,
    }


def _plain(value: Any) -> Any:
    """Return named tuples as dicts, recursively."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
