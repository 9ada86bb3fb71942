"""Rebuild the model and the data of a checkpoint, and refuse data that do not fit it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from upright.checkpoint import KEY, read_checkpoint, training_hashes
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.module import ImageModule


class Restored(NamedTuple):
    """A checkpoint's model and data."""

    classifier: ImageModule
    data: Any
    """The datamodule; None if the checkpoint does not record one."""
    contents: dict[str, Any]
    """Upright's part of the checkpoint; see `ImageModule.on_save_checkpoint`."""
    epoch: int
    """Number of epochs that the weights were trained for."""

    def image_data(self, reason: str) -> ImageDataModule:
        """Return the datamodule. For the ``reason``, refuse one that is not an `ImageDataModule`."""
        if isinstance(self.data, ImageDataModule):
            return self.data
        kind = type(self.data).__name__
        source = "without a datamodule" if self.data is None else f"on a {kind}, which is not an ImageDataModule"
        raise UserError(
            f"{reason}, but the checkpoint was trained {source}; "
            "give --data with the YAML of an ImageDataModule, such as configs/data/folder.yaml."
        )


def restore(
    path: str | Path,
    data: L.LightningDataModule | None = None,
    *,
    same_split: bool | None = None,
    evaluated_on: Sequence[str] = ("val", "test"),
    content: Mapping[str, Any] | None = None,
) -> Restored:
    """Rebuild the model, in evaluation mode, and the datamodule that it was trained with.

    Args:
        path: a checkpoint, or a run's folder.
        data: a datamodule in place of the checkpoint's own.
        same_split: whether the data must have the splits of training; by default without ``data``; see `check_data`.
        evaluated_on: splits of other data, which must not hold an image of the model's training set.
        content: content of the checkpoint, if it has been read before.

    Raises:
        UserError: if the data do not fit (see `check_data`), or a class cannot be imported.
        CheckpointError: if the checkpoint cannot be used.
    """
    checkpoint = read_checkpoint(path) if content is None else content
    ours = checkpoint[KEY]
    classifier = ImageModule.rebuild(checkpoint, path)
    same_split = data is None if same_split is None else same_split
    if data is None and ours["data"] is not None:
        data = build(ours["data"])()
    if isinstance(data, ImageDataModule):
        check_data(ours, data, path, same_split=same_split, evaluated_on=evaluated_on)
    return Restored(classifier, data, ours, checkpoint["epoch"] + 1)


def check_data(
    ours: Mapping[str, Any],
    data: ImageDataModule,
    path: str | Path,
    *,
    same_split: bool,
    evaluated_on: Sequence[str] = ("val", "test"),
) -> None:
    """Refuse data that do not fit the checkpoint ``path``. Its part that Upright wrote is ``ours``.

    Classes and channels must be the same. With ``same_split``, the data must be the images of training and model
    selection, in the same splits. The splits ``evaluated_on`` must not hold an image of the model's training set.
    """
    check_task(ImageSpec.from_dict(ours["spec"]), data, path)
    if same_split and ours["split"] and data.manifest.digest != ours["split"]["digest"]:
        raise UserError(
            f"The data of '{path}' have changed since it was trained: other images, or other splits. "
            "Restore them, or name other data with --data."
        )
    check_unseen(ours, data, path, evaluated_on)


def check_task(spec: ImageSpec, data: ImageDataModule, path: str | Path) -> None:
    """Refuse data whose task, classes or channels differ from those of a model with ``spec``, from ``path``."""
    theirs = data.spec
    if (theirs.task, theirs.classes, theirs.channels) != (spec.task, spec.classes, spec.channels):
        raise UserError(f"'{path}' was trained on {spec.summary}; the data have {data.spec.summary}.")


def check_unseen(
    ours: Mapping[str, Any], data: ImageDataModule, path: str | Path, splits: Sequence[str] = ("val", "test")
) -> None:
    """Refuse data whose ``splits`` hold images that the checkpoint was trained on. Its own splits are not checked."""
    if not ours["split"] or data.manifest.digest == ours["split"]["digest"]:
        return
    hashes = training_hashes(ours)
    assert hashes is not None
    for split in splits:
        trained_on = torch.isin(data.manifest.hashes[split], hashes)
        if trained_on.any():
            raise UserError(
                f"{int(trained_on.sum())} of {len(trained_on)} images in split '{split}' of these data are images that "
                f"'{path}' was trained on, so the accuracy would be too high: give other data. fit, validate, test and "
                "predict accept them with --allow_seen_images."
            )
