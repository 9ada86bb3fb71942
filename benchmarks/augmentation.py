"""Time of augmenting batches, compared with one image at a time, with kornia, and with a training step.

    python benchmarks/augmentation.py [--rounds 30] [--quick]

Two pipelines take one image at a time: *usual*, torchvision's transforms on Pillow images (if torchvision is installed,
which Upright does not need), and *lean*, the shortest code with Pillow alone.

All give the same float batch with the same strength: rotated by up to 15 degrees, scaled by 0.9 to 1.1, shifted by up
to 10 %, mirrored with probability 0.5, cropped after padding by 4 pixels; bilinear, black beyond the border. They take
turns, in a new random order every round. The table has medians over all rounds, and ratios to ours of each round. The
two workers are additional to the threads in the table.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import kornia
import numpy as np
import torch
from PIL import Image, ImageOps
from shared import command_line, heading, quartiles, row
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
    """Return the augmentation that a config would build."""
    return Augmentation([RandomAffine(rotate=ROTATE, scale=SCALE, shift=SHIFT, flip=FLIP), RandomCrop(padding=MARGIN)])


def with_kornia(size: int) -> nn.Module:
    """Return the augmentation with kornia."""
    return nn.Sequential(
        kornia.augmentation.RandomAffine(ROTATE, (SHIFT, SHIFT), SCALE, p=1.0),
        kornia.augmentation.RandomHorizontalFlip(p=FLIP),
        kornia.augmentation.RandomCrop((size, size), padding=MARGIN),
    )


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Dataset that returns one image at a time, from a Pillow image."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index]
        return self.transform(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)), index % 10


def usual(size: int) -> Callable[[Image.Image], Tensor]:
    """Return the augmentation with torchvision."""
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
    """Augment with as little code as possible around Pillow's own loops."""

    def __call__(self, image: Image.Image) -> Tensor:
        size = image.width
        angle, scale = math.radians(random.uniform(-ROTATE, ROTATE)), random.uniform(*SCALE)
        across, down = (random.uniform(-SHIFT, SHIFT) * size for _ in range(2))
        cos, sin, middle = math.cos(angle) / scale, math.sin(angle) / scale, size / 2
        right, below = middle + across, middle + down
        matrix = (cos, -sin, middle - cos * right + sin * below, sin, cos, middle - sin * right - cos * below)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        if random.random() < FLIP:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y = (random.randint(0, 2 * MARGIN) for _ in range(2))
        image = ImageOps.expand(image, MARGIN).crop((x, y, x + size, y + size))
        array = np.array(image, copy=True).reshape(size, size, -1)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield batch after batch, epoch after epoch."""
    while True:
        yield from loader


def step(channels: int, size: int) -> Callable[[], None]:
    """Return a training step of LeNet."""
    network = LeNet((channels, size, size), 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    images, labels = torch.rand(BATCH, channels, size, size), torch.arange(BATCH) % 10

    def run() -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    return run


def side_by_side(blocks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each block in each round."""
    for block in blocks.values():
        for _ in range(3):
            block()
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name in random.sample(list(blocks), len(blocks)):
            # Two calls warm the caches, which contain the data of the other blocks.
            block = blocks[name]
            block(), block()
            start = time.perf_counter()
            for _ in range(4):
                block()
            times[name].append(1000 * (time.perf_counter() - start) / 4)
    return times


def compare(threads: int, rounds: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Print rows of the first table."""
    torch.set_num_threads(threads)
    for channels, size in sizes:
        images = torch.randint(0, 256, (20 * BATCH, channels, size, size), dtype=torch.uint8)
        numbers = torch.arange(len(images))
        matrices = torch.eye(3).expand(len(images), 1, 3, 3)
        samples = Samples(PixelArray(images[:, None].numpy()), numbers.numpy(), numbers % 10, matrices)
        batches = endless(BatchLoader(samples, BATCH, shuffle=True))
        batch, augment, other = images[:BATCH], ours(), with_kornia(size)
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
        cells = [f"{channels} x {size} x {size}", str(threads), f"{statistics.median(times['ours']):.2f}"]
        for name in ("usual", "lean"):
            if name not in singly:
                cells += ["-", "-"]
                continue
            # Measure workers alone: they continue during other measurements, and would have their batches ready.
            workers = DataLoader(OneByOne(array, singly[name]), num_workers=2, persistent_workers=True, **common)
            parallel = side_by_side({name: partial(next, endless(workers))}, 2 * rounds)[name][rounds:]
            cells += [quartiles(each, times["ours, loaded"]) for each in (times[name], parallel)]
        times |= side_by_side({"step": step(channels, size), "ours again": partial(augment, batch)}, rounds)
        row(*cells, quartiles(times["kornia"], times["ours"]), quartiles(times["ours again"], times["step"]))


def main() -> None:
    """Print two tables."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    options = parser.parse_args()
    rounds, sizes, threads = options.rounds, [(1, 28), (3, 32)], sorted({1, torch.get_num_threads()})
    batches = [32, 128, 512, 2048]
    if options.quick:
        rounds, sizes, threads, batches = 2, sizes[:1], threads[:1], batches[:2]
    torch.manual_seed(0)
    keep_freed_memory()  # as in `upright fit`, for all pipelines
    print(f"Batches of {BATCH}; torch {torch.__version__}, kornia {kornia.__version__}\n")
    singly = ("usual", "usual, 2 workers", "lean", "lean, 2 workers")
    heading("images", "threads", "ours, ms", *singly, "kornia", "of LeNet's step")
    for count in threads:
        compare(count, rounds, sizes)
    torch.set_num_threads(1)
    print()
    heading("batch, one thread", *(f"{channels} x {size} x {size}, us per image" for channels, size in sizes))
    columns = []
    for channels, size in sizes:
        augment = ours()
        tensors = [torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8) for batch in batches]
        times = side_by_side({str(len(images)): partial(augment, images) for images in tensors}, rounds)
        columns.append([1000 * statistics.median(times[str(batch)]) / batch for batch in batches])
    for batch, *values in zip(batches, *columns, strict=True):
        row(batch, *(f"{value:.2f}" for value in values))


if __name__ == "__main__":
    main()
