"""Rebuild the model and the data of a checkpoint, and refuse data that do not fit it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from upright.checkpoint import FORMAT, KEY, git_commit, learnt_from, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.classifier import ImageClassifier


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
        UserError: see `read_checkpoint` and `check_data`; or if its classes cannot be imported.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint[KEY]
    classifier = build(ours["model"])(spec=ImageSpec.from_dict(ours["spec"]))
    own_data = data is None
    if own_data:
        if ours["data"] is None:
            raise UserError(f"'{path}' does not say what data it was trained with; give them with --data.")
        data = build(ours["data"])()
    assert data is not None
    load_weights(classifier, checkpoint, path)
    check_data(ours, data, path, same_split=own_data)
    return Restored(classifier.eval(), data, ours)


def load_weights(classifier: ImageClassifier, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Put the checkpoint's weights into the classifier, and what is known of where they started from.

    Raises:
        UserError: if they are of another network.
    """
    try:
        classifier.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reasons = "; ".join(f"{line.strip():.160}" for line in str(error).splitlines()[1:4])
        raise UserError(f"'{path}' holds the weights of another network: {reasons}") from None
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
        UserError: if classes or channels differ; if the split does; or, with data of the user's choice, if the
            images it was trained on are among those it would be judged by.
    """
    check_task(ImageSpec.from_dict(ours["spec"]), data, path)
    if same_split and ours["split"] and data.manifest.digest != ours["split"]["digest"]:
        raise UserError(
            f"The data of '{path}' have changed since it was trained: other images, or other splits. "
            "Restore them, or say with --data what to use."
        )
    check_unseen(ours, data, path, judged_by)


def check_task(spec: ImageSpec, data: ImageDataModule, path: str | Path) -> None:
    """Refuse data of other classes or channels than a model of ``spec``, from ``path``, was made for."""
    if (data.spec.classes, data.spec.channels) != (spec.classes, spec.channels):
        raise UserError(f"'{path}' knows {spec.task}; the data have {data.spec.task}.")


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
        UserError: if there is one.
    """
    if not ours["split"] or data.manifest.digest == ours["split"]["digest"]:
        return
    seen = learnt_from(ours)
    assert seen is not None
    for split in splits:
        trained_on = torch.isin(data.manifest.hashes[split], seen)
        if trained_on.any():
            raise UserError(
                f"{int(trained_on.sum())} of {len(trained_on)} images in split '{split}' of these data are images that "
                f"'{path}' was trained on, so its accuracy there would mean nothing; give others (fit, "
                "validate, test and predict go on with --allow_seen_images)."
            )
