"""Find candidate runs, and compute their predictions for the validation split."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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

PREDICTIONS_FILE = "val_predictions.npz"
"""File in the folder of a run, with the `ValidationPredictions` of its best checkpoint."""
FINAL_STATES = ("complete", "pruned", "failed")


class Candidate(NamedTuple):
    """A run that `upright select` may choose, with the number of its validated epochs.

    Its state is ``complete``, ``pruned``, ``failed``, or ``elsewhere`` if its checkpoint is not on this machine. Only
    complete runs are ranked.
    """

    name: str
    folder: Path
    state: str
    epochs: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best.ckpt"


def find_candidates(paths: Sequence[str]) -> list[Candidate]:
    """Return the runs in folders of runs and of sweeps.

    Raises:
        UserError: if a folder is neither, or a sweep has no complete trial.
    """
    runs: dict[Path, Candidate] = {}
    for path in map(Path, paths):
        check_exists(path, "folders of runs, or of a sweep")
        if is_sweep(path):
            trials = list(_trials(path))
            if not any(run.state == "complete" for run in trials):
                raise UserError(f"No trial of '{path}' is complete; there is nothing to choose from.")
            runs |= {run.folder.resolve(): run for run in trials}
        elif (path / "best.ckpt").is_file():
            runs[path.resolve()] = Candidate(path.name, path, "complete", max(1, _validated_epochs(path)))
        else:
            raise UserError(f"'{path}' is neither the folder of a run (with best.ckpt) nor of a sweep; give one.")
    names = [run.name for run in runs.values()]
    return [run if names.count(run.name) == 1 else run._replace(name=str(run.folder)) for run in runs.values()]


def _trials(folder: Path) -> Iterator[Candidate]:
    """Yield all trials with a score, including those on other machines. A trial that was resumed counts once."""
    local = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/trial.json"))}
    for name, trial in local.items():
        epochs = _validated_epochs(folder / name)
        if trial["state"] in FINAL_STATES and epochs:
            missing = trial["state"] == "complete" and not (folder / name / "best.ckpt").is_file()
            yield Candidate(name, folder / name, "elsewhere" if missing else trial["state"], epochs)
    for row in read_rows(folder / "trials.csv"):
        name = Path(row["folder"]).name
        if row["state"] in FINAL_STATES and name not in local:
            yield Candidate(name, folder / name, "elsewhere", 1)


def _validated_epochs(folder: Path) -> int:
    rows = read_rows(folder / "metrics.csv")
    return sum(any(value for name, value in row.items() if name.startswith("val/")) for row in rows)


@dataclass(frozen=True, eq=False)
class ValidationPredictions:
    """The predictions of a checkpoint for all images of the validation split, in the order of the loader.

    Args:
        checkpoint: SHA-256 of the checkpoint.
        images: SHA-256 of images and labels, before the images are resized for the network.
        test_split: digest of the test split, see `seal.content_digest`.
        views: number of views of each source image; views of one image follow each other.
        labels: true classes, ``(n,)``.
        predictions: most probable classes, ``(n,)``.
        losses: negative logarithm of the probability of the true class, ``(n,)``.
    """

    checkpoint: str
    images: str
    test_split: str
    views: int
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """True for each correct prediction, ``(n,)``."""
        return np.asarray(self.predictions == self.labels)

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Share of correct predictions over the views of each source image, ``(N,)``."""
        return np.asarray(self.correct.reshape(-1, self.views).mean(axis=1))


def predictions_of(runs: Sequence[Candidate], data: ImageDataModule | None = None) -> list[ValidationPredictions]:
    """Return the predictions of each run. Read them from its folder if they belong to its current checkpoint.

    ``data`` replace the data of the checkpoints, if these have moved.

    Raises:
        UserError: if a checkpoint cannot be restored, or its validation split or classes differ from those of the
            first one.
    """
    contents = [read_checkpoint(run.checkpoint)[KEY] for run in runs]
    _check_alike(runs, contents)
    # The runs of a sweep usually share their data, so reuse the data of the previous run.
    reuse, reuse_recipe = data, None
    predictions: list[ValidationPredictions] = []
    for run, record in zip(tqdm(runs, "validating", unit="run", disable=None, leave=False), contents, strict=True):
        if data:
            check_data(record, data, run.checkpoint, same_split=True)
        checkpoint = file_hash(run.checkpoint)
        # Several processes of one sweep may end at the same time.
        with locked(run.folder / f".{PREDICTIONS_FILE}.lock"):
            if cached := _cached(run.folder / PREDICTIONS_FILE, checkpoint):
                predictions.append(cached)
                continue
            if not data and record["data"] != reuse_recipe:
                reuse = None
            restored = restore(run.checkpoint, reuse, same_split=True)
            reuse, reuse_recipe = restored.data, record["data"]
            predictions.append(_predict(restored, checkpoint))
            with replacing_file(run.folder / PREDICTIONS_FILE) as temporary, open(temporary, "wb") as file:
                np.savez(file, **vars(predictions[-1]))
    for run, each in zip(runs, predictions, strict=True):
        if each.images != predictions[0].images:
            raise UserError(
                f"'{runs[0].name}' and '{run.name}' were validated on different images (angles, draws or task of "
                "their data); give runs with the same images."
            )
    return predictions


def _check_alike(runs: Sequence[Candidate], contents: Sequence[Mapping[str, Any]]) -> None:
    first = contents[0]
    if not first["spec"]["classes"]:
        raise UserError(f"'{runs[0].checkpoint}' estimates the orientation, and select compares classifiers.")
    if first["spec"].get("multilabel"):
        raise UserError(
            f"'{runs[0].checkpoint}' finds several classes per image, and select compares single classes; "
            "`upright test` writes the metrics of a run to test.json."
        )
    for run, record in zip(runs, contents, strict=True):
        if not record["data"] or not record["split"]:
            raise UserError(
                f"'{run.checkpoint}' does not record the data it was trained with; give runs on an ImageDataModule."
            )
        images, images_of_first = (each["split"]["hashes"]["val"] for each in (record, first))
        same = {
            "classes": record["spec"]["classes"] == first["spec"]["classes"],
            "validation images": torch.equal(images, images_of_first),
        }
        if different := [part for part, equal in same.items() if not equal]:
            raise UserError(
                f"'{run.name}' and '{runs[0].name}' have different {different[0]}; give runs with the same "
                f"{different[0]}."
            )


@cache
def _digest(data: ImageDataModule) -> str:
    digest = sha256()
    for original in data.originals("val"):
        digest.update(f"{original.label} {original.pixels.shape}".encode())
        digest.update(original.pixels.tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _predict(restored: Restored, checkpoint: str) -> ValidationPredictions:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = restored.classifier.to(device)
    data = restored.image_data("A selection compares predictions for the same images")
    labels, predictions, losses = [], [], []
    for batch in data.loader("val"):
        logits = classifier(batch.images.to(device)).float().cpu()
        labels.append(batch.labels)
        predictions.append(logits.argmax(dim=1))
        losses.append(cross_entropy(logits, batch.labels, reduction="none"))
    columns = [torch.cat(parts).numpy() for parts in (labels, predictions, losses)]
    test_split = content_digest(data.manifest.hashes["test"])
    return ValidationPredictions(checkpoint, _digest(data), test_split, len(data.views("val").names), *columns)


def _cached(path: Path, checkpoint: str) -> ValidationPredictions | None:
    """Return the predictions in a file, or None if it cannot be read or belongs to another checkpoint."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            predictions = ValidationPredictions(
                **{name: array if array.ndim else array.item() for name, array in arrays.items()}
            )
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return predictions if predictions.checkpoint == checkpoint else None
