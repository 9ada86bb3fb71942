"""Batches of a split. The order is a function of seed and epoch; the only state is the position in the epoch.

Why not StatefulDataLoader of torchdata 0.11.0: with Lightning 2.6.6, a run resumed in epoch 1 got the order of epoch 0,
an epoch that ended early skipped batches of the next one, and Ctrl-C killed the workers. Order, shares, seeds, errors
and signals would remain our code, and we would save only a counter.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upright.data.batch import Batch
from upright.data.cache import Decoder, PixelArray
from upright.data.image_transforms import SEEDS, ImageTransforms
from upright.data.split import Indices
from upright.data.workers import fetch


def global_seed() -> int:
    """Return the seed of Lightning's ``seed_everything``, which it stores in the environment, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Samples:
    """A split: ``V`` views of each of ``n`` images; the views of one image are neighbours.

    Args:
        pixels: stored images, or a decoder that reads files on access.
        positions: rows of the images in ``pixels``, ``(n,)``.
        labels: labels of the images, see `Batch`.
        transforms: transform of each view, ``(n, V, 3, 3)``.
    """

    def __init__(self, pixels: PixelArray | Decoder, positions: Indices, labels: Tensor, transforms: Tensor) -> None:
        self.pixels, self.positions, self.labels, self.transforms = pixels, positions, labels, transforms

    def __len__(self) -> int:
        return self.transforms.shape[0] * self.transforms.shape[1]

    def __getitem__(self, chosen: Tensor | slice) -> Batch:
        position = torch.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen
        views = self.transforms.shape[1]
        group, view = position // views, position % views
        images = self.pixels.take(self.positions[group.numpy()], view.numpy())
        return Batch(images, self.labels[group], position, group, self.transforms[group, view])


class EpochOrder:
    """The order of ``count`` samples, a function of seed and epoch. Lightning calls `set_epoch`."""

    def __init__(self, count: int, *, shuffle: bool, seed: int) -> None:
        self.count, self.shuffle, self.seed, self.epoch = count, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self) -> Tensor:
        """Return the indices of the current epoch, ``(count,)``."""
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.count, generator=generator)


class BatchLoader:
    """Batches of one split for one process. It resumes in the middle of an epoch.

    With ``shuffle`` (training), samples that do not fill a batch on every process are dropped; they are different ones
    in every epoch. Without ``shuffle``, every sample is delivered exactly once, by one process.

    ``batch_size`` counts the samples of one process. ``workers`` processes read ahead; with 0, this process reads.
    ``transforms`` draw for each image from a seed of its own, a function of the run's seed, the epoch and the image.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        transforms: ImageTransforms | None = None,
    ) -> None:
        self.transforms = transforms or ImageTransforms()
        self.samples, self.rank, self.world_size, self.workers = samples, rank, world_size, workers
        # A training split that is smaller than one batch becomes one batch.
        self.batch_size = min(batch_size, max(1, len(samples) // world_size)) if shuffle else batch_size
        # Lightning looks for `set_epoch` in `sampler`, and expects both attributes of a DataLoader.
        self.batch_sampler = None
        self.sampler = EpochOrder(len(samples), shuffle=shuffle, seed=seed)
        self._position = 0
        self._resume: dict[str, Any] = {}

    def __len__(self) -> int:
        """Return the number of batches per epoch on this process."""
        if self.sampler.shuffle:
            return self.sampler.count // (self.batch_size * self.world_size)
        share = len(range(self.rank, self.sampler.count, self.world_size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch, from the restored position if the state is of this epoch."""
        # Lightning calls iter() before set_epoch(): as a generator, this reads the epoch at the first batch.
        order, epoch = self.sampler(), self.sampler.epoch
        # A state of another epoch stems from the end of that epoch, so this one starts from scratch.
        start = self._resume.get("position", 0) if self._resume.get("epoch") == epoch else 0
        self._resume = {}
        batches = torch.split(order[self.rank :: self.world_size], self.batch_size)[start : len(self)]
        for index, batch in enumerate(fetch(partial(self._read, epoch), batches, self.workers), start):
            self._position = index + 1
            yield batch._replace(seed=hash((self.sampler.seed, epoch, index, self.rank)))

    def _read(self, epoch: int, chosen: Tensor) -> Batch:
        batch = self.samples[chosen]
        seeds = [hash((self.sampler.seed, epoch, position)) % SEEDS for position in chosen.tolist()]
        return batch._replace(images=self.transforms(batch.images, seeds))

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and the number of its batches that were delivered."""
        return {"epoch": self.sampler.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration at the position of ``state``, if it is of the same epoch."""
        self._resume, self._position = state, state["position"]
