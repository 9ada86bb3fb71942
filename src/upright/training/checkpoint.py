"""Checkpoints: written whole or not at all, read without running code, and enough to rebuild model and data."""

import os
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from upright.data.datamodule import ImageDataModule
from upright.errors import UprightError, nearest
from upright.files import replacing_file
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.classifier import ImageClassifier

FORMAT = 1
KEY = "upright"
"""Under this key a checkpoint holds Upright's own part; see `contents`."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, sync, rename.

    Lightning's own goes through the temporary folder, which may be another file system, where a rename is a copy that
    can be cut off.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """See Lightning's `CheckpointIO.save_checkpoint`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as aside, open(aside, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch trips over the end that it could not write, and hides why.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def contents(
    classifier: ImageClassifier, data: ImageDataModule | None, run: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Upright's part of a checkpoint, plain data and tensors only."""
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("upright", "torch", "lightning")},
        "git_commit": git_commit(),
        "model": classifier.recipe,
        "spec": classifier.spec.to_dict(),
        "data": data.recipe if data else None,
        "split": data.manifest.to_dict() if data else None,
        "run": dict(run) | ({"start": classifier.start} if classifier.start else {}),
        # Beside those of its split: what the weights that it started from were learnt from.
        "seen": classifier.seen,
        "metrics": dict(metrics),
    }


@cache
def git_commit() -> str | None:
    """The commit of the working directory (with ``+`` when tracked files differ from it), if it is a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file, or the ``best.ckpt`` of a run's folder.

    Raises:
        UprightError: if there is none, with the nearest name beside it.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "best.ckpt").is_file():
            return path / "best.ckpt"
        raise UprightError(f"Folder '{path}' holds no best.ckpt; give the checkpoint file itself.")
    if not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UprightError(
            f"Checkpoint '{path}' does not exist.{nearest(str(path), [str(file) for file in siblings])} "
            "`upright fit` writes them to checkpoints/NAME/best.ckpt."
        )
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU, without running any code in it.

    Raises:
        UprightError: for a file that is missing, cut off, not a checkpoint, a pickle with code, a checkpoint of
            something else, or one of a newer format.
    """
    path = find_checkpoint(path)
    checkpoint: dict[str, Any] = load_file(path, "an Upright checkpoint")
    check_format(checkpoint, path)
    return checkpoint


def check_format(checkpoint: Any, path: str | Path) -> None:
    """Refuse what is no checkpoint of Upright's, or one of a newer format.

    Args:
        checkpoint: what the file held.
        path: of the file, for messages.

    Raises:
        UprightError: if it is.
    """
    ours = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict) or "state_dict" not in checkpoint or not isinstance(ours.get("format"), int):
        raise UprightError(f"'{path}' holds weights, but it is not a checkpoint that `upright fit` wrote.")
    if ours["format"] > FORMAT:
        raise UprightError(
            f"'{path}' has format {ours['format']}, made by Upright {ours['versions'].get('upright')}; "
            f"this version reads up to {FORMAT}. Install a newer Upright."
        )


def load_file(path: Path, kind: str) -> Any:
    """What a file of tensors and plain data holds, on the CPU, without running any code in it.

    Args:
        path: of the file.
        kind: what it should be, for messages.

    Raises:
        UprightError: for a file that is cut off, damaged, or a pickle with code.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch compresses nothing.
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it would unpack to more than it is")
        with warnings.catch_warnings():
            # torch warns of a pickle's protocol before it refuses what is in it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UprightError(
            f"'{path}' is not {kind}: it is damaged, or a pickle that would run code when loaded "
            f"({_first_line(error)})."
        ) from None
    except Exception as error:  # torch's unpickler raises whatever a broken file leads it to
        raise UprightError(
            f"'{path}' is not a whole checkpoint; it is damaged or cut off ({_first_line(error)})."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


class Restored(NamedTuple):
    """What a checkpoint held."""

    classifier: ImageClassifier
    data: ImageDataModule
    contents: dict[str, Any]


def restore(path: str | Path, data: ImageDataModule | None = None) -> Restored:
    """Rebuild the model, in evaluation mode, and the datamodule it was trained with.

    Args:
        path: a checkpoint, or a run's folder.
        data: used instead of the checkpoint's own datamodule.

    Raises:
        UprightError: see `read_checkpoint` and `check_data`; or if its classes cannot be imported.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint[KEY]
    classifier = build(ours["model"])(spec=ImageSpec.from_dict(ours["spec"]))
    own_data = data is None
    if own_data:
        if ours["data"] is None:
            raise UprightError(f"'{path}' does not say what data it was trained with; give them with --data.")
        data = build(ours["data"])()
    assert data is not None
    load_weights(classifier, checkpoint, path)
    check_data(ours, data, path, same_split=own_data)
    return Restored(classifier.eval(), data, ours)


def load_weights(classifier: ImageClassifier, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Put the checkpoint's weights into the classifier, and what is known of where they started from.

    Raises:
        UprightError: if they are of another network.
    """
    try:
        classifier.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reasons = "; ".join(f"{line.strip():.160}" for line in str(error).splitlines()[1:4])
        raise UprightError(f"'{path}' holds the weights of another network: {reasons}") from None
    ours = checkpoint[KEY]
    classifier.start, classifier.seen = ours["run"].get("start"), ours.get("seen")


def check_data(
    ours: Mapping[str, Any],
    data: ImageDataModule,
    path: str | Path,
    *,
    same_split: bool,
    judged_by: Sequence[str] = ("val", "test"),
) -> None:
    """Refuse data that do not fit the checkpoint.

    Args:
        ours: Upright's part of the checkpoint.
        data: the datamodule.
        path: of the checkpoint, for messages.
        same_split: whether they must be the very images it was trained and selected on, in the same splits.
        judged_by: splits in which there must be no image that it was trained on.

    Raises:
        UprightError: if classes or channels differ; if the split does; or, with data of the user's choice, if the
            images it was trained on are among those it would be judged by.
    """
    check_task(ImageSpec.from_dict(ours["spec"]), data, path)
    if same_split and ours["split"] and data.manifest.digest != ours["split"]["digest"]:
        raise UprightError(
            f"The data of '{path}' have changed since it was trained: other images, or other splits. "
            "Restore them, or say with --data what to use."
        )
    check_unseen(ours, data, path, judged_by)


def check_task(spec: ImageSpec, data: ImageDataModule, path: str | Path) -> None:
    """Refuse data of other classes or channels than a model of ``spec``, from ``path``, was made for."""
    if (data.spec.classes, data.spec.channels) != (spec.classes, spec.channels):
        raise UprightError(f"'{path}' knows {spec.task}; the data have {data.spec.task}.")


def learnt_from(ours: Mapping[str, Any]) -> torch.Tensor | None:
    """Content hashes of the images that a checkpoint was trained on, its start's included; None if it had no data.

    Args:
        ours: Upright's part of the checkpoint.
    """
    parts = (ours["split"] and ours["split"]["hashes"]["train"], ours.get("seen"))
    known = [part for part in parts if part is not None]
    return torch.unique(torch.cat(known)) if known else None


def check_unseen(
    ours: Mapping[str, Any], data: ImageDataModule, path: str | Path, splits: Sequence[str] = ("val", "test")
) -> None:
    """Refuse data whose validation or test images the checkpoint was trained on; its own splits are as they are.

    Args:
        ours: Upright's part of the checkpoint.
        data: the datamodule.
        path: of the checkpoint, for messages.
        splits: that it would be judged by.

    Raises:
        UprightError: if there is one.
    """
    if not ours["split"] or data.manifest.digest == ours["split"]["digest"]:
        return
    seen = learnt_from(ours)
    assert seen is not None
    for split in splits:
        trained_on = torch.isin(data.manifest.hashes[split], seen)
        if trained_on.any():
            raise UprightError(
                f"{int(trained_on.sum())} of {len(trained_on)} images in split '{split}' of these data are images that "
                f"'{path}' was trained on, so its accuracy there would mean nothing; give others (fit, "
                "validate, test and predict go on with --allow_seen_images)."
            )
