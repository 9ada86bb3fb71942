"""A spatial transformer that abstains: the harm and the gain of its rotation, and the threshold in the graph.

It is the counterpart of `upright attach` for a checkpoint with a transformer of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from upright.architectures.spatial_transformer import SpatialTransformer, observing
from upright.data.cache import to_tensor
from upright.data.datamodule import ImageDataModule
from upright.data.views import Angles
from upright.errors import UserError
from upright.exporting.apart import ANGLES, rotated_views
from upright.exporting.harm import Answers
from upright.exporting.parity import MAX_BATCH, NEVER, fitted
from upright.images import Pixels, batches_of_one_size
from upright.training.model import Model


class _View(NamedTuple):
    pixels: Pixels
    label: int
    group: int
    angle: int


def voting_transformer(model: Model, option: str) -> SpatialTransformer:
    """Return the spatial transformer of a network. For an ``option``, refuse several ones, and one without votes."""
    transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
    if len(transformers) != 1 or not transformers[0].voting:
        kind = (
            "with a localiser that votes"
            if len(transformers) == 1
            else f"of the network, which has {len(transformers)}"
        )
        raise UserError(
            f"{option} needs the confidence of one spatial transformer {kind}; the localisers of "
            "upright.architectures.voting vote."
        )
    return transformers[0]


@contextmanager
def abstaining(model: Model, threshold: float = NEVER) -> Iterator[None]:
    """Set the threshold of all transformers that vote; by default they rotate no image."""
    transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
    before = [transformer.threshold for transformer in transformers]
    for transformer in transformers:
        transformer.threshold = threshold
    try:
        yield
    finally:
        for transformer, own in zip(transformers, before, strict=True):
            transformer.threshold = own


def _views(data: ImageDataModule, size: tuple[int, int] | None) -> Iterator[_View]:
    for group, index in enumerate(tqdm(data.splits["val"].tolist(), unit="image", disable=None, leave=False)):
        views = rotated_views(data.source.images[index], data.augmentation.padding)
        for angle, pixels in zip(ANGLES, views, strict=True):
            yield _View(fitted(pixels, size, data.spec), int(data.source.labels[index]), group, angle)


@torch.no_grad()
def measure(model: Model, data: ImageDataModule, option: str, size: tuple[int, int] | None = None) -> Answers:
    """Return the answers for the stored images of the validation split, in all rotations of `ANGLES`.

    They are those of the network at the identity pose, and at the pose of its transformer, which never abstains. Every
    image has the ``size`` of the graph's input. Without a rotation, the images count as upright.

    Raises:
        UserError: for the ``option``, if the transformer does not vote, or the data have no upright images.
    """
    voting_transformer(model, option)
    if not isinstance(data.views("val"), Angles):
        raise UserError(f"{option} needs upright images, but {type(data).__name__} distorts those of its split 'val'.")
    parts = []
    for batch in batches_of_one_size(_views(data, size), lambda view: view.pixels, MAX_BATCH):
        images = to_tensor(np.stack([view.pixels for view in batch]))
        labels = torch.tensor([view.label for view in batch])
        right = []
        for threshold in (NEVER, 0.0):
            with abstaining(model, threshold), observing() as observations:
                right.append((model(images).argmax(dim=1) == labels).numpy())
        confidence = observations[0].confidence
        assert confidence is not None
        parts.append((*right, confidence.numpy(), [not view.angle for view in batch], [view.group for view in batch]))
    return Answers(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
