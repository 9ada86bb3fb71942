"""Test-set access log: each evaluation on the test split is recorded in the run's folder.

A model that is selected by its test results has used the test split as a validation split. No images then remain for an
unbiased estimate of its accuracy. This module forbids no access; it counts them.
"""

import hashlib
import json
from datetime import UTC, datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from torch import Tensor

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import file_hash, write_text
from upright.runs.folder import is_sweep, locked

LOG_FILE = "test_openings.jsonl"
"""File in the run's folder, one line per opening: date (UTC), model and its SHA-256, split, and command."""


def open_test_split(model: Traversable, run: Path, data: ImageDataModule, by: str) -> None:
    """Record that a model is about to be evaluated on the test split, and print how often that has happened.

    With several processes, only the first one calls it. ``model`` is a checkpoint, or a bundle's ONNX file; the folder
    ``run`` holds the log; ``by`` is the command, such as ``upright test``.
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
    with locked(run / f".{LOG_FILE}.lock"):
        path = run / LOG_FILE
        # Written completely or not at all: a truncated line would lose an opening.
        write_text(path, (path.read_text(encoding="utf-8") if path.exists() else "") + json.dumps(opening) + "\n")
    if (times := count(run, split)) > 1:
        print(f"Note: the test split was opened {times} times for run '{run}' ({LOG_FILE}).")
    if len(trials := count_in_sweep(run.parent, split)) > 1:
        counts = ", ".join(f"{name} {times}" for name, times in trials.items())
        print(
            f"Note: over the trials of '{run.parent}' it was opened {sum(trials.values())} times ({counts}); a "
            "trial that is selected by its test accuracy looks better than it is."
        )


def openings(folder: Path) -> list[dict[str, Any]]:
    """Return the openings recorded in a run's folder, the oldest first."""
    path = folder / LOG_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"'{path}' was changed by hand and cannot be read ({error}): fix it, or delete it.") from None


def count(folder: Path, test_split: str) -> int:
    """Return how often a test split was opened for the run in ``folder``."""
    return sum(opening["test_split"] == test_split for opening in openings(folder))


def count_in_sweep(folder: Path, test_split: str) -> dict[str, int]:
    """Return the number of openings for each trial that has any; empty if ``folder`` is not that of a sweep."""
    trials = sorted(folder.iterdir()) if is_sweep(folder) else []
    return {trial.name: times for trial in trials if (times := count(trial, test_split))}


def content_digest(hashes: Tensor) -> str:
    """Return the SHA-256 of a test split's images, which identifies it even if the other splits change.

    ``hashes`` are the sorted content hashes of the images, int64 ``(n,)``.
    """
    return hashlib.sha256(hashes.numpy().astype("<i8").tobytes()).hexdigest()
