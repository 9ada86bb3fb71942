"""Which runs a choice was made among, and how each of them answers the validation split that it was made by."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from upright.checkpoint import KEY, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import check_exists, file_hash, replacing_file
from upright.runs.folder import is_sweep, locked
from upright.runs.seal import content_digest
from upright.tables import read_rows
from upright.training.restoring import Restored, check_data, restore

ANSWERS = "val_predictions.npz"
"""In a run's folder: its best checkpoint's answers to the validation split, see `Answers`."""
HOW = ("batch_size", "augment", "padding", "cache", "num_workers")
"""Options of a datamodule that do not change what validation shows."""
ENDED = ("complete", "pruned", "failed")


class Run(NamedTuple):
    """One that was looked at.

    Args:
        name: that it is told by.
        folder: its own.
        state: ``complete``, ``pruned`` or ``failed``; only those that are complete may be chosen.
        epochs: that were validated: of so many models it is the best.
    """

    name: str
    folder: Path
    state: str
    epochs: int

    @property
    def checkpoint(self) -> Path:
        """Its best one."""
        return self.folder / "best.ckpt"


def find_runs(paths: Sequence[str]) -> list[Run]:
    """The runs of folders that each are a run or a sweep.

    Raises:
        UserError: if one of them is neither, or there is none that has ended.
    """
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        check_exists(path, "folders of runs, or of a sweep")
        if is_sweep(path):
            runs = list(_trials(path))
            if not any(run.state == "complete" for run in runs):
                raise UserError(f"No trial of '{path}' has ended; there is nothing to choose among.")
        elif (path / "best.ckpt").is_file():
            runs = [Run(path.name, path, "complete", max(1, _validated(path)))]
        else:
            raise UserError(f"'{path}' is not the folder of a run (with its best.ckpt), nor of a sweep; give these.")
        found |= {run.folder.resolve(): run for run in runs}
    names = [run.name for run in found.values()]
    return [run if names.count(run.name) == 1 else run._replace(name=str(run.folder)) for run in found.values()]


def _trials(folder: Path) -> Iterator[Run]:
    """All that gave a score, on whatever machine; what was stopped and tried again counts once."""
    here = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/trial.json"))}
    for name, trial in here.items():
        epochs = _validated(folder / name)
        if trial["state"] in ENDED and epochs:
            gone = trial["state"] == "complete" and not (folder / name / "best.ckpt").is_file()
            yield Run(name, folder / name, "elsewhere" if gone else trial["state"], epochs)
    for row in read_rows(folder / "trials.csv"):
        name = Path(row["folder"]).name
        if row["state"] in ENDED and name not in here:
            yield Run(name, folder / name, "elsewhere", 1)


def _validated(folder: Path) -> int:
    rows = read_rows(folder / "metrics.csv")
    return sum(any(value for name, value in row.items() if name.startswith("val/")) for row in rows)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a checkpoint says of every image of the validation split, in the order of the loader.

    Args:
        checkpoint: its SHA-256.
        shown: SHA-256 of the images, before they are fitted to the network, and their labels.
        test_split: of its data, see `seal.content_digest`.
        views: of each source image, one after the other.
        labels: ``(n,)``.
        predictions: the most probable classes, ``(n,)``.
        losses: negative logarithm of the true class's probability, ``(n,)``.
    """

    checkpoint: str
    shown: str
    test_split: str
    views: int
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """The share of right answers to each source image, over its views: ``(N,)``."""
        right: npt.NDArray[np.float64] = (self.predictions == self.labels).reshape(-1, self.views).mean(axis=1)
        return right


def answers_of(runs: Sequence[Run], data: ImageDataModule | None = None) -> list[Answers]:
    """Each one's answers, kept beside it, and made if there are none of this very checkpoint.

    Args:
        runs: with a checkpoint each.
        data: in place of their own, if these are not where they were.

    Raises:
        UserError: for a checkpoint that cannot be restored, or one of another validation split, or of other classes,
            than the first one's.
    """
    contents = [read_checkpoint(run.checkpoint)[KEY] for run in runs]
    _check_alike(runs, contents)
    # Runs of one sweep mostly read the same data.
    shared: dict[str, tuple[ImageDataModule, str]] = {}
    found = []
    progress = tqdm(runs, desc="validating", unit="run", disable=None, leave=False)
    for run, ours in zip(progress, contents, strict=True):
        if data:
            check_data(ours, data, run.checkpoint, same_split=True)
        checkpoint = file_hash(run.checkpoint)
        # Several processes of one sweep may end at once.
        with locked(run.folder / f".{ANSWERS}.lock"):
            if kept := _kept(run.folder / ANSWERS, checkpoint):
                found.append(kept)
                continue
            key = json.dumps([ours["data"]["class_path"], _visible(ours["data"].get("init_args", {}))], sort_keys=True)
            known = data or (shared[key][0] if key in shared else None)
            if known and not data:
                check_data(ours, known, run.checkpoint, same_split=True)
            restored = restore(run.checkpoint, known)
            shared[key] = shared.get(key) or (restored.data, _shown(restored.data))
            answers = _answers(restored, checkpoint, shared[key][1])
            with replacing_file(run.folder / ANSWERS) as aside, open(aside, "wb") as file:
                np.savez(file, **vars(answers))
            found.append(answers)
    for run, answers in zip(runs, found, strict=True):
        if answers.shown != found[0].shown:
            raise UserError(
                f"'{runs[0].name}' and '{run.name}' were shown other pictures of the validation split (angles, draws "
                "or task of their data): choose among runs that were shown the same."
            )
    return found


def _check_alike(runs: Sequence[Run], contents: Sequence[Mapping[str, Any]]) -> None:
    for run, ours in zip(runs, contents, strict=True):
        if not ours["data"] or not ours["split"]:
            raise UserError(f"'{run.checkpoint}' does not say what data it was trained with.")
    first = contents[0]
    for what, differ in (
        ("other classes", lambda ours: ours["spec"]["classes"] != first["spec"]["classes"]),
        ("other validation images", lambda ours: not _same_validation(ours, first)),
    ):
        others = [run.name for run, ours in zip(runs, contents, strict=True) if differ(ours)]
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise UserError(
                f"With {what} than {runs[0].name}: {', '.join(others[:3])}{more}; only runs of one validation split "
                "can be chosen among."
            )


def _same_validation(ours: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return torch.equal(ours["split"]["hashes"]["val"], others["split"]["hashes"]["val"])


def _visible(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in HOW}


def _shown(data: ImageDataModule) -> str:
    digest = sha256()
    for original in data.originals("val"):
        digest.update(f"{original.label} {original.pixels.shape}".encode())
        digest.update(original.pixels.tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _answers(restored: Restored, checkpoint: str, shown: str) -> Answers:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, data = restored.classifier.to(device), restored.data
    labels, predictions, losses = [], [], []
    for batch in data.loader("val"):
        logits = classifier(batch.images.to(device)).float().cpu()
        labels.append(batch.labels)
        predictions.append(logits.argmax(dim=1))
        losses.append(cross_entropy(logits, batch.labels, reduction="none"))
    columns = [torch.cat(parts).numpy() for parts in (labels, predictions, losses)]
    return Answers(
        checkpoint, shown, content_digest(data.manifest.hashes["test"]), len(data.views("val").names), *columns
    )


def _kept(path: Path, checkpoint: str) -> Answers | None:
    """What is there, if it is of this checkpoint."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            kept = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        answers = Answers(**kept)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return answers if answers.checkpoint == checkpoint else None
