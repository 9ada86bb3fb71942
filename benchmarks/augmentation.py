"""Augmentation of whole batches against an image at a time, against kornia, and against the step that it feeds.

    python benchmarks/augmentation.py [--rounds 30]

An image at a time there are two: the usual pipeline, torchvision's transforms on Pillow images (where torchvision is
installed, which Upright does not need), and the leanest that can be written with Pillow alone.

All give the same float batch of the same strength: turned by up to 15 degrees, scaled by 0.9 to 1.1, shifted by up to
10 %, mirrored every other time, cropped out of a margin of 4 pixels; bilinear, black beyond the border. What is
compared runs in turn, in an order drawn anew every round; medians over all rounds, and the ratio of each to ours taken
round by round. Two workers come beside the threads that the table says.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import kornia
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from upright.architectures.lenet import LeNet
from upright.data.augmentation import Augmentation, RandomAffine, RandomCrop
from upright.data.cache import PixelArray
from upright.data.loader import BatchLoader, Samples
from upright.runs.process import keep_freed_memory

try:
    from torchvision import transforms
except ImportError:
    transforms = None

ROTATE, SCALE, SHIFT, FLIP, MARGIN = 15, (0.9, 1.1), 0.1, 0.5, 4
BATCH = 128


def ours() -> Augmentation:
    """As a config has it."""
    return Augmentation([RandomAffine(rotate=ROTATE, scale=SCALE, shift=SHIFT, flip=FLIP), RandomCrop(padding=MARGIN)])


def theirs(size: int) -> nn.Module:
    """The same of kornia's."""
    return nn.Sequential(
        kornia.augmentation.RandomAffine(ROTATE, (SHIFT, SHIFT), SCALE, p=1.0),
        kornia.augmentation.RandomHorizontalFlip(p=FLIP),
        kornia.augmentation.RandomCrop((size, size), padding=MARGIN),
    )


class OneByOne(Dataset[tuple[Tensor, int]]):
    """An image at a time, as a Pillow image."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index]
        return self.transform(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)), index % 10


def usual(size: int) -> Callable[[Image.Image], Tensor]:
    """As most people write it."""
    bilinear = transforms.InterpolationMode.BILINEAR
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomAffine(ROTATE, (SHIFT, SHIFT), SCALE, interpolation=bilinear),
            transforms.RandomHorizontalFlip(FLIP),
            transforms.RandomCrop(size, padding=MARGIN),
            transforms.ToTensor(),
        ]
    )
    return composed


class Lean:
    """The same with as little as possible around Pillow's own loops."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Float ``(C, H, W)`` in [0, 1]."""
        size = image.width
        angle, scale = math.radians(random.uniform(-ROTATE, ROTATE)), random.uniform(*SCALE)
        across, down = (random.uniform(-SHIFT, SHIFT) * size for _ in range(2))
        cos, sin, middle = math.cos(angle) / scale, math.sin(angle) / scale, size / 2
        right, below = middle + across, middle + down
        matrix = (cos, -sin, middle - cos * right + sin * below, sin, cos, middle - sin * right - cos * below)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        if random.random() < FLIP:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = (random.randint(0, 2 * MARGIN) for _ in range(2))
        image = ImageOps.expand(image, MARGIN).crop((left, top, left + size, top + size))
        array = np.array(image, copy=True).reshape(size, size, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Batch after batch, epoch after epoch."""
    while True:
        yield from loader


def step(channels: int, size: int) -> Callable[[], None]:
    """A training step of LeNet."""
    network = LeNet((channels, size, size), 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    images, labels = torch.rand(BATCH, channels, size, size), torch.arange(BATCH) % 10

    def run() -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    return run


def side_by_side(blocks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each block in each round."""
    for block in blocks.values():
        for _ in range(3):
            block()
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name in random.sample(list(blocks), len(blocks)):
            # Two calls warm the caches that the other blocks have filled with theirs.
            block = blocks[name]
            block(), block()
            start = time.perf_counter()
            for _ in range(4):
                block()
            times[name].append(1000 * (time.perf_counter() - start) / 4)
    return times


def ratio(of: list[float], to: list[float]) -> str:
    """The median of round by round, and its quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(of, to, strict=True)], n=4)
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def compare(threads: int, rounds: int) -> None:
    """Rows of the first table."""
    torch.set_num_threads(threads)
    for channels, size in ((1, 28), (3, 32)):
        images = torch.randint(0, 256, (20 * BATCH, channels, size, size), dtype=torch.uint8)
        numbers = torch.arange(len(images))
        matrices = torch.eye(3).expand(len(images), 1, 3, 3)
        samples = Samples(PixelArray(images[:, None].numpy()), numbers.numpy(), numbers % 10, matrices)
        batches = endless(BatchLoader(samples, BATCH, shuffle=True))
        batch, augment, other = images[:BATCH], ours(), theirs(size)
        array = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        common: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
        singly = {"usual": usual(size)} if transforms else {}
        singly["lean"] = Lean()
        with torch.no_grad():
            times = side_by_side(
                {
                    "ours": partial(augment, batch),
                    "ours, loaded": lambda augment=augment, batches=batches: augment(next(batches).images),
                    "kornia": lambda other=other, batch=batch: other(batch / 255),
                }
                | {
                    name: partial(next, endless(DataLoader(OneByOne(array, transform), **common)))
                    for name, transform in singly.items()
                },
                rounds,
            )
        row = [f"{channels} x {size} x {size}", str(threads), f"{statistics.median(times['ours']):.2f}"]
        for name in ("usual", "lean"):
            if name not in singly:
                row += ["-", "-"]
                continue
            # Apart, for workers go on while others are measured, and would be found to have their batches ready.
            workers = DataLoader(OneByOne(array, singly[name]), num_workers=2, persistent_workers=True, **common)
            parallel = side_by_side({name: partial(next, endless(workers))}, 2 * rounds)[name][rounds:]
            row += [ratio(those, times["ours, loaded"]) for those in (times[name], parallel)]
        times |= side_by_side({"step": step(channels, size), "beside": partial(augment, batch)}, rounds)
        row += [ratio(times["kornia"], times["ours"]), ratio(times["beside"], times["step"])]
        print("|", " | ".join(row), "|", flush=True)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    rounds = parser.parse_args().rounds
    everything = torch.get_num_threads()
    torch.manual_seed(0)
    keep_freed_memory()  # as `upright fit` does; for all sides
    print(f"Batches of {BATCH}; torch {torch.__version__}, kornia {kornia.__version__}\n")
    singly = "usual | usual, 2 workers | lean | lean, 2 workers"
    print(f"| images | threads | ours, ms | {singly} | kornia | of LeNet's step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for threads in sorted({1, everything}):
        compare(threads, rounds)
    torch.set_num_threads(1)
    print("\n| batch, one thread | 1 x 28 x 28, us per image | 3 x 32 x 32, us per image |\n|---|---|---|")
    sizes = (32, 128, 512, 2048)
    columns = []
    for channels, size in ((1, 28), (3, 32)):
        augment = ours()
        given = [torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8) for batch in sizes]
        blocks = {str(len(images)): partial(augment, images) for images in given}
        times = side_by_side(blocks, rounds)
        columns.append([1000 * statistics.median(times[str(batch)]) / batch for batch in sizes])
    for batch, *values in zip(sizes, *columns, strict=True):
        print("|", " | ".join([str(batch), *(f"{value:.2f}" for value in values)]), "|", flush=True)


if __name__ == "__main__":
    main()
