"""The test split is opened when somebody looks at a model's answers to it; each time is written down in the run.

Whoever chooses by these answers has made a validation split of it, and no image is left to say what the chosen model is
worth. Nothing is forbidden here: it is counted.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import file_hash, write_text
from upright.runs.folder import is_sweep, locked

FILE = "test_openings.jsonl"
"""In the run's folder: a line per opening, with date (UTC), model and its SHA-256, split, and what opened it."""


def open_test_split(model: Path, run: Path, data: ImageDataModule, by: str) -> None:
    """Write down that a model's answers to the test split are about to be seen, and say how often that was.

    Of several processes the first one calls it.

    Args:
        model: a checkpoint, or a bundle's ONNX file.
        run: the folder that it was trained in, for the record.
        data: whose test split it is.
        by: what opens it, as it is typed: ``upright test``.
    """
    split = content_digest(data.manifest.hashes["test"])
    opening = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.name,
        "sha256": file_hash(model),
        "test_split": split,
        "split_digest": data.manifest.digest,
        "by": by,
    }
    with locked(run / f".{FILE}.lock"):
        path = run / FILE
        # Whole or not at all: half a line would be one opening less.
        write_text(path, (path.read_text(encoding="utf-8") if path.exists() else "") + json.dumps(opening) + "\n")
    if (times := count(run, split)) > 1:
        print(f"Note: the test split was opened {times} times for run '{run}' ({FILE}).")
    if len(trials := count_in_sweep(run.parent, split)) > 1:
        told = ", ".join(f"{name} {times}" for name, times in trials.items())
        print(
            f"Note: over the trials of '{run.parent}' it was opened {sum(trials.values())} times ({told}); one "
            "that is chosen by it looks better there than it is."
        )


def openings(folder: Path) -> list[dict[str, Any]]:
    """What is written down in a run's folder, the oldest first.

    Raises:
        UserError: if somebody else wrote there.
    """
    path = folder / FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"'{path}' was changed by hand and cannot be read ({error}); mend it, or remove it.") from None


def count(folder: Path, test_split: str) -> int:
    """How often that split was opened for the run in ``folder``."""
    return sum(opening["test_split"] == test_split for opening in openings(folder))


def count_in_sweep(folder: Path, test_split: str) -> dict[str, int]:
    """How often it was opened, by trial, for those for which it was; empty if ``folder`` is no sweep's."""
    trials = sorted(folder.iterdir()) if is_sweep(folder) else []
    return {trial.name: times for trial in trials if (times := count(trial, test_split))}


def content_digest(hashes: Tensor) -> str:
    """SHA-256 of a test split's images; what it is told by, whatever became of the other splits.

    Args:
        hashes: of their contents, sorted, int64 ``(n,)``.
    """
    return hashlib.sha256(hashes.numpy().astype("<i8").tobytes()).hexdigest()
