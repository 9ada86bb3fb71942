"""Batches of a split: the order is f(seed, epoch), the position inside the epoch is the loader's only state."""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from upright.data.batch import Batch
from upright.data.split import Indices
from upright.data.workers import fetch


def global_seed() -> int:
    """The seed that Lightning's ``seed_everything`` set (it keeps it in the environment for its processes), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Pixels(Protocol):
    """Where images come from: kept, or decoded when they are wanted."""

    def take(self, positions: Indices, views: Indices) -> Tensor:
        """One view of each of the images at ``positions``: uint8 ``(B, C, H, W)``."""


class Samples:
    """A split: ``V`` views of each of ``n`` images, one after the other.

    Args:
        pixels: of the images.
        positions: of these images among the pixels, ``(n,)``.
        labels: ``(n,)``.
        transforms: what each view did, ``(n, V, 3, 3)``.
    """

    def __init__(self, pixels: Pixels, positions: Indices, labels: Tensor, transforms: Tensor) -> None:
        self.pixels, self.positions, self.labels, self.transforms = pixels, positions, labels, transforms

    def __len__(self) -> int:
        """How many there are."""
        return self.transforms.shape[0] * self.transforms.shape[1]

    def __getitem__(self, chosen: Tensor | slice) -> Batch:
        """Those at the indices ``(B,)``."""
        position = torch.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen
        views = self.transforms.shape[1]
        group, view = position // views, position % views
        images = self.pixels.take(self.positions[group.numpy()], view.numpy())
        return Batch(images, self.labels[group], position, group, self.transforms[group, view])


class EpochOrder:
    """The order of ``count`` samples, a function of seed and epoch. Lightning calls `set_epoch` on it."""

    def __init__(self, count: int, *, shuffle: bool, seed: int) -> None:
        self.count, self.shuffle, self.seed, self.epoch = count, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """From now on, the order of that epoch."""
        self.epoch = epoch

    def __call__(self) -> Tensor:
        """Indices ``(count,)``."""
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.count, generator=generator)


class BatchLoader:
    """Iterate a split, resumable in mid-epoch, every process its share.

    Training (``shuffle``) drops what does not fill a batch on every process; it is other samples in every epoch.
    Otherwise every sample comes exactly once, on one process.

    Args:
        samples: the whole split.
        batch_size: samples per batch and process.
        shuffle: a new order every epoch.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        workers: processes of this one that fetch samples ahead; 0 fetches them here.
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
    ) -> None:
        self.samples, self.rank, self.world_size, self.workers = samples, rank, world_size, workers
        # A training set smaller than one batch is one batch.
        self.batch_size = min(batch_size, max(1, len(samples) // world_size)) if shuffle else batch_size
        # Lightning looks for `set_epoch` under `sampler`, and expects both names as a DataLoader has them.
        self.batch_sampler = None
        self.sampler = EpochOrder(len(samples), shuffle=shuffle, seed=seed)
        self._position = 0
        self._resume: dict[str, Any] = {}

    def __len__(self) -> int:
        """Batches per epoch on this process."""
        if self.sampler.shuffle:
            return self.sampler.count // (self.batch_size * self.world_size)
        mine = len(range(self.rank, self.sampler.count, self.world_size))
        return -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the current epoch, from where a restored state left off."""
        # Lightning sets the epoch after it has called iter(), so nothing is read before the first batch is asked for.
        order = self.sampler()[self.rank :: self.world_size]
        # A state of another epoch is one of its end, and this epoch begins at its beginning.
        start = self._resume.get("position", 0) if self._resume.get("epoch") == self.sampler.epoch else 0
        self._resume = {}
        mine = torch.split(order, self.batch_size)[start : len(self)]
        for position, batch in enumerate(fetch(self.samples, mine, self.workers), start + 1):
            self._position = position
            seed = hash((self.sampler.seed, self.sampler.epoch, position - 1, self.rank))
            yield batch._replace(seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the batches of it that were handed out."""
        return {"epoch": self.sampler.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on there, if it is of the same epoch."""
        self._resume, self._position = state, state["position"]
