"""The base of every dataset: read a source, split it, yield uint8 batches, augment them; and the originals."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, get_args

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from upright.data.augmentation import Augmentation
from upright.data.batch import Batch
from upright.data.cache import Cache, Decoder, Where, to_tensor
from upright.data.loader import BatchLoader, Samples, global_seed
from upright.data.source import Original, Source
from upright.data.split import (
    SPLITS,
    Indices,
    SplitManifest,
    copies,
    first_copies,
    stratified_part,
    stratified_split,
)
from upright.data.views import Angles, Views
from upright.errors import UprightError, UserError
from upright.images import ImageSpec
from upright.recipes import Recipe, Recorded, recipe
from upright.warp import Padding


class ImageDataModule(Recorded, L.LightningDataModule):
    """Splits, views, cache and loaders for any `Source`. A dataset implements `spec` and `read`.

    Args:
        batch_size: per process.
        val_fraction: of all images, for validation; of the training images where only the test split is given.
        test_fraction: of all images, for test; of the training images where only validation is given.
        split_seed: of the split; does not change with the seed of a run.
        folds: cross-validation: ``val`` is one of so many equal parts of all but the test images, instead of
            ``val_fraction`` of them; 0 does without.
        fold: which part, from 0.
        train_fraction: of the training images, for learning curves; what a smaller fraction takes, a larger one does.
        angles: validation and test show every image turned anticlockwise by each of these degrees, as uint8.
        augment: what training does to a batch, in order: each `Geometric`, `Mixing`, or any ``nn.Module`` on a float
            batch in [0, 1], kornia's among them.
        padding: what `Geometric` ones see beyond the border: ``zeros``, ``border`` or ``reflection``.
        cache: where decoded pictures are kept: ``memory``, ``disk`` (`cache_folder`), or ``none``, which decodes files
            whenever they are wanted; ``auto`` is disk for what takes more than 64 MiB.
        num_workers: processes that decode files; by default one per core, at most 8.
        max_unreadable: so many pictures that cannot be read are left out, and reported.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        folds: int = 0,
        fold: int = 0,
        train_fraction: float = 1.0,
        angles: Sequence[float] = (0.0,),
        augment: Sequence[Callable[[], nn.Module]] = (),
        padding: Padding = "zeros",
        cache: Where = "auto",
        num_workers: int | None = None,
        max_unreadable: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        if not angles:
            raise UserError("angles needs at least one angle; [0] shows every image as it is.")
        if (folds or fold) and not (folds > 1 and 0 <= fold < folds):
            raise UserError(f"folds needs at least 2 and fold one of 0 to folds - 1, got folds {folds}, fold {fold}.")
        if not 0 < train_fraction <= 1:
            raise UserError(f"train_fraction must be above 0 and at most 1, got {train_fraction}.")
        if cache not in get_args(Where):
            raise UserError(f"cache must be one of {', '.join(get_args(Where))}; got '{cache}'.")
        if max_unreadable < 0 or (num_workers is not None and num_workers < 0):
            raise UserError(
                f"num_workers and max_unreadable cannot be negative, got {num_workers} and {max_unreadable}."
            )
        self.batch_size = self._initial_batch_size = batch_size
        self.split_seed, self.angles = split_seed, tuple(angles)
        self.val_fraction, self.test_fraction, self.train_fraction = val_fraction, test_fraction, train_fraction
        self.folds, self.fold = folds, fold
        self.cache, self.num_workers, self.max_unreadable = cache, num_workers, max_unreadable
        self.augmentation = Augmentation((part() for part in augment), padding=padding)
        self._arguments: dict[str, Any] = recipe(self.arguments)  # refused here, not when a checkpoint is written
        self._samples: dict[str, Samples] = {}
        self._resume_from: dict[str, Any] = {}
        self._train_loader: BatchLoader | None = None

    @property
    @abstractmethod
    def spec(self) -> ImageSpec:
        """Declared without reading the images, so that a network can be built on any machine."""

    @abstractmethod
    def read(self) -> Source:
        """The whole dataset; called once, when it is first needed."""

    @property
    def recipe(self) -> Recipe:
        """The class and its arguments as plain data. ``batch_size`` is the current one, which a tuner may change."""
        current = {"batch_size": self.batch_size} if self.batch_size != self._initial_batch_size else {}
        own: Recipe = recipe(type(self))
        return own | {"init_args": self._arguments | current}

    def prepare_data(self) -> None:
        """Read and decode all images. Lightning calls it in one process; the others read its cache on disk."""
        _ = self.images

    def setup(self, stage: str | None = None) -> None:
        """Split the images. It costs nothing the second time, and loaders do it on demand."""
        _ = self.splits

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed on demand: another process computes it again, or maps the cache on disk."""
        computed = {name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)}
        return {name: value for name, value in vars(self).items() if name not in computed} | {"_samples": {}}

    @cached_property
    def source(self) -> Source:
        """What `read` gave."""
        return self.read()

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width at which training images are kept, before augmentation: what the network sees."""
        return self.spec.height, self.spec.width

    @cached_property
    def images(self) -> Cache:
        """Every image of the source, as training gets it."""
        source = self.source
        every = np.arange(len(source.labels))
        return self._cache(Decoder(source.images, every, self.spec, self.stored_size), self.max_unreadable)

    def _cache(self, decoder: Decoder, max_unreadable: int = 0) -> Cache:
        return Cache(decoder, self.source.files, self.cache, workers=self.num_workers, max_unreadable=max_unreadable)

    @cached_property
    def _labels(self) -> Indices:
        return np.asarray(self.source.labels, dtype=np.int64)

    @cached_property
    def splits(self) -> dict[str, Indices]:
        """Indices into the source, by split: those that it defines, the others split off its training images.

        Of several copies of one image, what we split puts all into the same split.
        """
        readable = np.flatnonzero(self.images.readable)
        given = {
            name: np.intersect1d(np.asarray(part, dtype=np.int64), readable)
            for name, part in (self.source.splits or {}).items()
        }
        taken = np.concatenate([np.empty(0, np.int64), *given.values()])
        if len(np.unique(taken)) < len(taken):
            raise UserError("The source has an image in more than one split.")
        if self.folds and "val" in given:
            raise UserError(f"folds {self.folds}: these data define their own validation split; use folds 0.")
        for name, part in given.items():
            if not len(part):
                raise UserError(f"No picture of split '{name}' can be read.")
        pool = given.pop("train", np.setdiff1d(readable, taken))
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        for name in [*given, *(["val"] if self.folds else [])]:
            del fractions[name]
        if fractions or self.folds:
            first, place = first_copies(self.images.facts["hash"][pool])
            labels = self._labels[pool][first]
            try:
                parts = stratified_split(labels, fractions, self.split_seed, folds=self.folds, fold=self.fold)
            except UprightError as error:
                more = len(pool) - len(first)
                raise UserError(f"{error}{f' {more} copies of them count for nothing.' if more else ''}") from None
            given |= {name: pool[np.isin(place, part)] for name, part in parts.items()}
        else:
            given["train"] = pool
        if self.train_fraction < 1:
            train = given["train"]
            given["train"] = train[stratified_part(self._labels[train], self.train_fraction, self.split_seed)]
        return {split: given[split] for split in SPLITS}

    @cached_property
    def manifest(self) -> SplitManifest:
        """What is in each split, by content."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return SplitManifest.of(name, self.splits, self._labels, self.images.facts["hash"], self.spec.classes)

    @cached_property
    def remarks(self) -> list[str]:
        """What a user should know of these data, in sentences: copies, and pictures that were left out."""
        found = copies(self.splits, self._labels, self.images.facts["hash"], self.spec.classes, self.source.names)
        if len(left_out := np.flatnonzero(~self.images.readable)):
            found.append(
                f"{len(left_out)} of {len(self._labels)} pictures cannot be read and are left out, for example "
                f"'{self.source.names[left_out[0]]}'."
            )
        return found

    def views(self, split: str) -> Views:
        """What every image of ``split`` is shown as."""
        return Angles((0.0,) if split == "train" else self.angles)

    def originals(self, split: str) -> Iterator[Original]:
        """Decoded images at their own sizes, in the order of the loader; never the cache."""
        names, views = self.names(split), self.views(split)
        for i in self.splits[split].tolist():
            (shown,) = views.show(to_tensor(self.source.images[i][None]), torch.tensor([i]))
            for pixels in shown.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy():
                yield Original(next(names), pixels, int(self._labels[i]))

    def names(self, split: str) -> Iterator[str]:
        """The names of the originals, without decoding them."""
        views = self.views(split)
        for i in self.splits[split].tolist():
            for view in views.names:
                yield self.source.names[i] + (f"_{view}" if view else "")

    def samples(self, split: str) -> Samples:
        """Return the samples of ``split``: training images as stored, others as the network sees them, as uint8."""
        if split not in self._samples:
            self._samples[split] = self._read_samples(split)
        return self._samples[split]

    def _read_samples(self, split: str) -> Samples:
        spec, views, indices = self.spec, self.views(split), self.splits[split]
        pixels, positions = self.images.pixels, indices
        size = (spec.height, spec.width)
        if split != "train" and not (views.plain and size == self.stored_size):
            decoder = Decoder(self.source.images, indices, spec, size, views)
            streamed = self.cache == "none" and self.source.files is not None
            pixels, positions = decoder if streamed else self._cache(decoder).pixels, np.arange(len(indices))
        aspects = torch.full((len(indices),), spec.width / spec.height)
        if spec.resize == "stretch":
            # Stretching keeps normalised coordinates, in which a turn depends on the original's own aspect.
            facts = self.images.facts[indices]
            aspects = torch.from_numpy(facts["width"] / facts["height"]).float()
        transforms = views.transforms(torch.from_numpy(indices), aspects)
        return Samples(pixels, positions, torch.from_numpy(self._labels[indices]), transforms)

    def loader(self, split: str, *, shuffle: bool = False) -> BatchLoader:
        """Batches of one split, this process's share."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        samples = self.samples(split)
        return BatchLoader(
            samples,
            self.batch_size,
            shuffle=shuffle,
            seed=global_seed(),
            rank=rank,
            world_size=world_size,
            workers=self.images.workers if isinstance(samples.pixels, Decoder) else 0,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch, whatever LightningModule it is for; see `augment`.

        A module with an attribute ``views = 2`` gets two augmented views of each image, with their transforms.
        """
        if not (self.trainer and self.trainer.training and isinstance(batch, Batch)):
            return batch
        return self.augment(batch, getattr(self.trainer.lightning_module, "views", 1))

    def augment(self, batch: Batch, views: int = 1) -> Batch:
        """Augment a batch on its device. Trainer or not, the result is a function of the batch and its seed.

        Args:
            batch: of the training loader. Its ``seed`` seeds torch's global generators, so that what the module draws
                afterwards, such as dropout, is a function of it too.
            views: how many augmented views to draw; ``images`` and ``labels`` are those of the first.
        """
        seed_generators(batch.seed, batch.images.device)
        labels = batch.labels
        if self.augmentation.mixes:
            labels = one_hot(labels, len(self.spec.classes)).float()
        augmentation = self.augmentation.to(batch.images.device)
        first = augmentation(batch.images, labels)
        others = [augmentation(batch.images) for _ in range(views - 1)]
        return batch._replace(images=first.images, labels=first.targets, views=(first, *others))

    def train_dataloader(self) -> BatchLoader:
        """Return the training split, in a new order every epoch; always the same one with ``overfit_batches``."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._train_loader = loader = self.loader("train", shuffle=not overfits)
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


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``.

    `torch.manual_seed` prepares every kind of device, which takes a tenth of LeNet's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
