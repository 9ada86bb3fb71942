"""The base of every dataset: it reads a source, splits it, yields uint8 batches and originals, and augments."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from upright.data.augmentation import Augmentation
from upright.data.batch import Batch
from upright.data.cache import Cache, Decoder, Storage, to_tensor
from upright.data.image_transforms import ImageTransforms, MakeTransform
from upright.data.loader import BatchLoader, Samples, global_seed
from upright.data.source import Original, Source
from upright.data.split import (
    SPLITS,
    Indices,
    SplitManifest,
    describe_duplicates,
    first_occurrences,
    stratified_part,
    stratified_split,
)
from upright.data.views import Angles, Views
from upright.errors import UprightError, UserError
from upright.images import ImageSpec, Mask, Pixels
from upright.recipes import Recipe, Recorded, recipe
from upright.warp import Padding


class ImageDataModule(Recorded, L.LightningDataModule):
    """Splits, views, cache and loaders for any `Source`. A dataset implements `spec` and `read`.

    Args:
        batch_size: images per process and batch.
        val_fraction: fraction of all images for validation, or of the training images if the source defines only the
            test split.
        test_fraction: fraction of all images for test, or of the training images if the source defines only the
            validation split.
        split_seed: seed of the split; it does not change with the seed of a run.
        folds: number of folds of a cross-validation: ``val`` is one of this many equal parts of all images but the test
            images, and ``val_fraction`` is not used; 0 turns it off.
        fold: number of that part, from 0.
        train_fraction: fraction of the training images to use, for learning curves. A larger fraction contains a
            smaller one.
        angles: rotations of every validation and test image, in degrees anticlockwise, as uint8.
        augment: augmentation of a training batch, in order: each part is `Geometric`, `Mixing`, or any ``nn.Module`` on
            a float batch in [0, 1], for example kornia's.
        image_transforms: transforms of single training images by other packages, before ``augment``, in the processes
            of ``num_workers``: ``class_path`` and ``init_args`` of each; see `ImageTransforms`.
        padding: values beyond the border, for `Geometric` parts and for ``angles``, so that validation and test show
            what training shows: ``zeros``, ``border`` or ``reflection``.
        mask: ``disc`` shows the network only the largest centred disc of every image, in training, evaluation and
            export; see `ImageSpec`.
        cache: place of the decoded images: ``memory``, ``disk`` (`cache_folder`), or ``none``, which decodes images on
            access; ``auto`` is disk for lazy images that take more than 64 MiB. A dataset in memory allows only
            ``auto`` and ``memory``.
        num_workers: processes that decode files or apply ``image_transforms``; by default one per core, at most 8, for
            more than 1,000 images.
        max_unreadable: number of images that may be unreadable; they are left out, and reported.
    """

    _mask: Mask = "none"

    def __init_subclass__(cls, **options: Any) -> None:
        """Add the option `mask` to the ``spec`` that a subclass declares, so that no dataset repeats it."""
        super().__init_subclass__(**options)
        declared: Any = vars(cls).get("spec")

        def spec(self: ImageDataModule) -> ImageSpec:
            own: ImageSpec = declared.__get__(self, cls) if hasattr(declared, "__get__") else declared
            return own if self._mask == "none" else replace(own, mask=self._mask)

        if declared:
            cls.spec = property(spec, doc=declared.__doc__)  # type: ignore[assignment,method-assign]

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
        image_transforms: Sequence[MakeTransform] = (),
        padding: Padding = "zeros",
        mask: Mask = "none",
        cache: Storage = "auto",
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
        if cache not in get_args(Storage):
            raise UserError(f"cache must be one of {', '.join(get_args(Storage))}; got '{cache}'.")
        if max_unreadable < 0 or (num_workers is not None and num_workers < 0):
            raise UserError(
                f"num_workers and max_unreadable cannot be negative, got {num_workers} and {max_unreadable}."
            )
        self.batch_size = self._initial_batch_size = batch_size
        self.split_seed, self.angles = split_seed, tuple(angles)
        self.val_fraction, self.test_fraction, self.train_fraction = val_fraction, test_fraction, train_fraction
        self.folds, self.fold = folds, fold
        self._mask = mask
        self.cache, self.num_workers, self.max_unreadable = cache, num_workers, max_unreadable
        self.augmentation = Augmentation((part() for part in augment), padding=padding)
        self.image_transforms = ImageTransforms(image_transforms)
        self._arguments: dict[str, Any] = recipe(self.arguments)  # raises here, not when a checkpoint is written
        self._samples: dict[str, Samples] = {}
        self._resume_from: dict[str, Any] = {}
        self._train_loader: BatchLoader | None = None

    @property
    @abstractmethod
    def spec(self) -> ImageSpec:
        """Size, channels and classes, declared without reading the images, so that any machine can build a network."""

    @abstractmethod
    def read(self) -> Source:
        """Return all images of the dataset. It is called once, on first use."""

    @property
    def recipe(self) -> Recipe:
        """The class and its arguments as plain data, with the current ``batch_size``, which a tuner may change."""
        current = {"batch_size": self.batch_size} if self.batch_size != self._initial_batch_size else {}
        own: Recipe = recipe(type(self))
        return own | {"init_args": self._arguments | current}

    def prepare_data(self) -> None:
        """Read and decode all images. Lightning calls it in one process; the others read its cache on disk."""
        _ = self.images

    def setup(self, stage: str | None = None) -> None:
        """Split the images. A second call costs nothing, and loaders split on demand."""
        _ = self.splits

    def __getstate__(self) -> dict[str, Any]:
        """Leave out computed properties: another process computes them again, or maps the cache on disk."""
        computed = {name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)}
        return {name: value for name, value in vars(self).items() if name not in computed} | {"_samples": {}}

    @cached_property
    def source(self) -> Source:
        """The result of `read`."""
        return self.read()

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of stored training images, before augmentation; by default those of the network's input."""
        return self.spec.height, self.spec.width

    @cached_property
    def images(self) -> Cache:
        """The cache of all images of the source, as training uses them."""
        source = self.source
        indices = np.arange(len(source.labels))
        return self._cache(Decoder(source.images, indices, self.spec, self.stored_size), self.max_unreadable)

    def _cache(self, decoder: Decoder, max_unreadable: int = 0) -> Cache:
        return Cache(decoder, self.source, self.cache, workers=self.num_workers, max_unreadable=max_unreadable)

    @cached_property
    def _labels(self) -> Indices:
        labels = np.asarray(self.source.labels, dtype=np.int64)
        if labels.ndim != 1 + self.spec.multilabel:
            raise UserError(f"A spec with multilabel {self.spec.multilabel} does not fit labels {labels.shape}.")
        return labels

    @property
    def _strata(self) -> tuple[Indices, tuple[str, ...]]:
        """The labels that splits are stratified by, and their names. With several classes per image, all are equal."""
        several = self.spec.multilabel
        return (np.zeros_like(self._labels[:, 0]), ("images",)) if several else (self._labels, self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the labels. Without classes, every label is 0."""
        return self.spec.classes or ("images",)

    @cached_property
    def splits(self) -> dict[str, Indices]:
        """Indices into the source, by split. Splits that the source does not define are taken from its training images.

        All duplicates of an image are put into the same split, except in splits that the source defines.
        """
        readable = np.flatnonzero(self.images.readable)
        parts = {
            name: np.intersect1d(np.asarray(part, dtype=np.int64), readable)
            for name, part in (self.source.splits or {}).items()
        }
        used = np.concatenate([np.empty(0, np.int64), *parts.values()])
        if len(np.unique(used)) < len(used):
            raise UserError("The source has an image in more than one split.")
        if self.folds and "val" in parts:
            raise UserError(f"folds {self.folds}: these data define their own validation split; use folds 0.")
        for name, part in parts.items():
            if not len(part):
                raise UserError(f"No image of split '{name}' can be read.")
        pool = parts.pop("train", np.setdiff1d(readable, used))
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        for name in [*parts, *(["val"] if self.folds else [])]:
            del fractions[name]
        if fractions or self.folds:
            first, place = first_occurrences(self.images.facts["hash"][pool])
            strata, kinds = self._strata
            labels = strata[pool][first]
            try:
                split = stratified_split(
                    labels, fractions, self.split_seed, folds=self.folds, fold=self.fold, classes=kinds
                )
            except UprightError as error:
                more = len(pool) - len(first)
                raise UserError(f"{error}{f' {more} duplicates of them are not counted.' if more else ''}") from None
            parts |= {name: pool[np.isin(place, part)] for name, part in split.items()}
        else:
            parts["train"] = pool
        if self.train_fraction < 1:
            train = parts["train"]
            parts["train"] = train[stratified_part(self._strata[0][train], self.train_fraction, self.split_seed)]
        return {name: parts[name] for name in SPLITS}

    @cached_property
    def manifest(self) -> SplitManifest:
        """The content of each split: counts per class, and hashes."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return SplitManifest.of(name, self.splits, self._labels, self.images.facts["hash"], self.kinds)

    @cached_property
    def remarks(self) -> list[str]:
        """Sentences for the user about these data: duplicates, and unreadable images that are left out."""
        remarks = [*self.source.remarks]
        remarks += describe_duplicates(
            self.splits, self._labels, self.images.facts["hash"], self.kinds, self.source.names
        )
        for split, counts in self.manifest.counts.items() if self.spec.multilabel else ():
            if missing := [name for name in self.spec.classes if name not in counts]:
                remarks.append(f"No image of split '{split}' has the class {' or '.join(map(repr, missing))}.")
        if len(unreadable := np.flatnonzero(~self.images.readable)):
            remarks.append(
                f"{len(unreadable)} of {len(self._labels)} images cannot be read and are left out, for example "
                f"'{self.source.names[unreadable[0]]}'."
            )
        return remarks

    def views(self, split: str) -> Views:
        """Return the views of every image of ``split``."""
        return Angles((0.0,) if split == "train" else self.angles, self.augmentation.padding)

    def originals(self, split: str) -> Iterator[Original]:
        """Yield decoded images at their own sizes, in the order of the loader, never from the cache."""
        indices = self.splits[split]
        labels = np.repeat(self._labels[indices], len(self.views(split).names), axis=0).tolist()
        yield from map(Original, self.names(split), self.shown(indices, split), labels)

    def shown(self, indices: Indices, split: str) -> Iterator[Pixels]:
        """Decode images of the source, and yield all views of each that ``split`` has."""
        views = self.views(split)
        for i in indices.tolist():
            (versions,) = views.show(to_tensor(self.source.images[i][None]), torch.tensor([i]))
            yield from versions.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def names(self, split: str) -> Iterator[str]:
        """Yield the names of the originals, without decoding them."""
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
            pixels = decoder if self.cache == "none" else self._cache(decoder).pixels
            positions = np.arange(len(indices))
        aspects = torch.full((len(indices),), spec.width / spec.height)
        if spec.resize == "stretch":
            # Stretching keeps normalised coordinates, in which a rotation depends on the original's own aspect.
            facts = self.images.facts[indices]
            aspects = torch.from_numpy(facts["width"] / facts["height"]).float()
        transforms = views.transforms(torch.from_numpy(indices), aspects)
        labels = torch.from_numpy(self._labels[indices])
        return Samples(pixels, positions, labels.float() if spec.multilabel else labels, transforms)

    def loader(self, split: str, *, shuffle: bool = False, transforms: ImageTransforms | None = None) -> BatchLoader:
        """Return the loader of this process's share of a split, with or without ``transforms`` of its images."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        samples = self.samples(split)
        return BatchLoader(
            samples,
            self.batch_size,
            shuffle=shuffle,
            seed=global_seed(),
            rank=rank,
            world_size=world_size,
            workers=self.images.workers if isinstance(samples.pixels, Decoder) or transforms else 0,
            transforms=transforms,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch of any LightningModule; see `augment`.

        A LightningModule with an attribute ``views = 2`` gets two augmented views of each image, with their transforms.
        """
        if not (self.trainer and self.trainer.training and isinstance(batch, Batch)):
            return batch
        return self.augment(batch, getattr(self.trainer.lightning_module, "views", 1))

    def augment(self, batch: Batch, views: int = 1) -> Batch:
        """Augment a batch on its device. With or without a Trainer, the result depends only on the batch and its seed.

        Args:
            batch: a batch of the training loader. Its ``seed`` seeds torch's global generators, so that later draws of
                the LightningModule, such as dropout, depend on it too.
            views: number of augmented views; ``images`` and ``labels`` are those of the first.
        """
        seed_generators(batch.seed, batch.images.device)
        labels = batch.labels
        if self.augmentation.mixes and not self.spec.multilabel:
            labels = one_hot(labels, len(self.spec.classes)).float()
        augmentation = self.augmentation.to(batch.images.device)
        first = augmentation(batch.images, labels)
        others = [augmentation(batch.images) for _ in range(views - 1)]
        return batch._replace(images=first.images, labels=first.targets, views=(first, *others))

    def train_dataloader(self) -> BatchLoader:
        """Return the training loader, with a new order in every epoch; with ``overfit_batches``, always the same."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._train_loader = loader = self.loader("train", shuffle=not overfits, transforms=self.image_transforms)
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
            self._resume_from = {}
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and the position of training in it."""
        # Lightning restores a loader's state only if its length was not read before, and every schedule over all steps
        # reads it.
        return self._train_loader.state_dict() if self._train_loader else self._resume_from

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at this position: the next training loader starts there."""
        self._resume_from = state_dict

    def val_dataloader(self) -> BatchLoader:
        return self.loader("val")

    def test_dataloader(self) -> BatchLoader:
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self.loader("test")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``.

    `torch.manual_seed` prepares every kind of device, which takes a tenth of LeNet's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
