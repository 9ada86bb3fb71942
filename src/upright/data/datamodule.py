"""The base of every dataset: read a source, split it, turn it into uint8 batches; and go back to the originals."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from upright.data.augmentation import Augmentation
from upright.data.loader import Batch, BatchLoader, global_seed
from upright.data.split import SPLITS, Indices, SplitManifest, stratified_split
from upright.errors import UprightError
from upright.images import ImageSpec, Pixels, batches_of_one_size
from upright.recipes import Recorded, recipe
from upright.warp import pixel_centres, resize, rotation, sample, transform_points


class Images(Protocol):
    """A list of pictures, an array ``(N, H, W, C)``, or what decodes a file at every access."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Pixels:
        """One, uint8 ``(H, W, C)``; raises `UprightError`, naming the file, if it cannot be decoded."""


@dataclass(frozen=True)
class Source:
    """A dataset as it comes.

    Args:
        images: decoded, uint8 ``(H, W, C)``, each of its own size.
        labels: index into the spec's classes.
        names: short, unique; for messages and files.
        splits: indices of ``train``, ``val`` and ``test`` where the dataset itself defines some of them.
        fingerprint: another one whenever the files are others, so that what was made of them can be kept on disk; none
            where the images are in memory.
    """

    images: Images
    labels: Sequence[int]
    names: Sequence[str]
    splits: Mapping[str, Sequence[int]] | None = None
    fingerprint: str | None = None


class Original(NamedTuple):
    """One image as it goes into a deployed model: uint8 ``(H, W, C)`` at its own size."""

    name: str
    pixels: Pixels
    label: int


class ImageDataModule(Recorded, L.LightningDataModule):
    """Splits, views, cache and loaders for any `Source`. A dataset implements `spec` and `read`.

    Args:
        batch_size: per process.
        val_fraction: of all images, for validation; of the training images where only the test split is given.
        test_fraction: of all images, for test.
        split_seed: of the split; does not change with the seed of a run.
        angles: validation and test show every image turned anticlockwise by each of these degrees, as uint8.
        augment: what training does to a batch, in order: each `Geometric` or any ``nn.Module`` on a float batch.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        angles: Sequence[float] = (0.0,),
        augment: Sequence[Callable[[], nn.Module]] = (),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UprightError(f"batch_size must be at least 1, got {batch_size}.")
        if not angles:
            raise UprightError("angles needs at least one angle; [0] shows every image as it is.")
        self.batch_size, self.split_seed, self.angles = batch_size, split_seed, tuple(angles)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.augmentation = Augmentation(part() for part in augment)
        self.recipe: dict[str, Any] = recipe(type(self)) | {"init_args": recipe(self.arguments)}
        self.samples = cache(self._samples)
        self._resume_from: dict[str, Any] = {}
        self._train_loader: BatchLoader | None = None

    @property
    @abstractmethod
    def spec(self) -> ImageSpec:
        """Declared without reading the images, so that a network can be built on any machine."""

    @abstractmethod
    def read(self) -> Source:
        """The whole dataset; called once, when it is first needed."""

    @cached_property
    def source(self) -> Source:
        """What `read` gave."""
        return self.read()

    @cached_property
    def splits(self) -> dict[str, Indices]:
        """Indices into the source: those that it defines, the others split off its training images."""
        given = {name: np.asarray(part, dtype=np.int64) for name, part in (self.source.splits or {}).items()}
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        fractions = {name: fraction for name, fraction in fractions.items() if name not in given}
        labels = np.asarray(self.source.labels)
        taken = np.concatenate([np.empty(0, np.int64), *given.values()])
        if len(np.unique(taken)) < len(taken):
            raise UprightError("The source has an image in more than one split.")
        pool = given.pop("train", np.setdiff1d(np.arange(len(labels)), taken))
        if fractions:
            parts = stratified_split(labels[pool], fractions, self.split_seed)
            return given | {name: pool[part] for name, part in parts.items()}
        return given | {"train": pool}

    @cached_property
    def manifest(self) -> SplitManifest:
        """What is in each split, by content."""
        classes, source = self.spec.classes, self.source
        return SplitManifest.of(
            {
                name: ((source.images[i], classes[source.labels[i]]) for i in self.splits[name].tolist())
                for name in SPLITS
            }
        )

    def views(self, split: str) -> tuple[float, ...]:
        """The angles, in degrees, at which every image of ``split`` is shown."""
        return (0.0,) if split == "train" else self.angles

    def originals(self, split: str) -> Iterator[Original]:
        """Decoded images at their own sizes, in the order of the loader; never the cache."""
        names = self.names(split)
        for i in self.splits[split].tolist():
            pixels = self.source.images[i]
            for angle in self.views(split):
                (turned,) = _turn(to_tensor(pixels[None]), angle).to(torch.uint8).permute(0, 2, 3, 1)
                yield Original(next(names), turned.contiguous().numpy(), int(self.source.labels[i]))

    def names(self, split: str) -> Iterator[str]:
        """The names of the originals, without decoding them."""
        views = self.views(split)
        for i in self.splits[split].tolist():
            for angle in views:
                yield self.source.names[i] + (f"_{angle:+g}" if len(views) > 1 else "")

    def _samples(self, split: str) -> Batch:
        """The cache: every original of the split at the network's size, rounded to uint8."""
        spec, views, indices = self.spec, self.views(split), self.splits[split]
        count = len(indices) * len(views)
        images = torch.empty(count, *spec.input_shape, dtype=torch.uint8)
        aspects = torch.empty(count)
        done = 0
        sources = (self.source.images[i] for i in indices.tolist())
        for batch in batches_of_one_size(sources, lambda pixels: pixels, 256):
            pixels, end = to_tensor(np.stack(batch)), done + len(batch) * len(views)
            for view, angle in enumerate(views):
                images[done + view : end : len(views)] = _fit(_turn(pixels, angle), spec)
            # Stretching keeps normalised coordinates, in which a turn depends on the original's own aspect.
            shape = pixels.shape[-2:] if spec.resize == "stretch" else (spec.height, spec.width)
            aspects[done:end] = shape[1] / shape[0]
            done = end
        labels = torch.tensor([int(self.source.labels[i]) for i in indices.tolist()])
        position = torch.arange(count)
        angles = torch.tensor(views).deg2rad().repeat(len(indices))
        return Batch(
            images, labels.repeat_interleave(len(views)), position, position // len(views), rotation(angles, aspects)
        )

    def loader(self, split: str, *, shuffle: bool = False) -> BatchLoader:
        """Batches of one split, this process's share."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchLoader(
            self.samples(split),
            self.batch_size,
            shuffle=shuffle,
            seed=global_seed(),
            rank=rank,
            world_size=world_size,
        )

    def train_dataloader(self) -> BatchLoader:
        """The training split, in a new order every epoch."""
        self._train_loader = loader = self.loader("train", shuffle=True)
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
            self._resume_from = {}
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch training stands."""
        # Lightning restores a loader's state only if nobody asked for the number of batches before, and every schedule
        # over all steps does.
        return self._train_loader.state_dict() if self._train_loader else self._resume_from

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next training loader goes on from there."""
        self._resume_from = state_dict

    def val_dataloader(self) -> BatchLoader:
        """The validation split."""
        return self.loader("val")

    def test_dataloader(self) -> BatchLoader:
        """The test split."""
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The test split."""
        return self.loader("test")


def to_tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 ``(B, H, W, C)`` to float ``(B, C, H, W)`` in [0, 255]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float()


def _turn(images: Tensor, angle: float) -> Tensor:
    """``(B, C, H, W)`` turned anticlockwise by ``angle`` degrees, rounded; the same bits whatever the batch."""
    if angle == 0:
        return images
    height, width = images.shape[-2:]
    points = transform_points(
        rotation(torch.tensor([math.radians(angle)]), width / height), pixel_centres(height, width)
    )
    return sample(images, points.expand(len(images), -1, -1), height, width).round().clamp(0, 255)


def _fit(images: Tensor, spec: ImageSpec) -> Tensor:
    if images.shape[-2:] != (spec.height, spec.width):
        if spec.resize == "none":
            raise UprightError(
                f"With resize none the images of a batch must have one size, {spec.height}x{spec.width}; "
                f"one has {images.shape[-2]}x{images.shape[-1]}. Use stretch or crop."
            )
        images = resize(images, spec.height, spec.width, spec.resize).round().clamp(0, 255)
    return images.to(torch.uint8)
