"""Speed of loading photographs at 224 x 224: each stage, each kind of cache, and plain loops of other libraries.

    python benchmarks/loading.py [--count 600] [--rounds 5] [--quick]

It writes JPEG files of 500 x 375 to a temporary folder: different random crops of scikit-learn's two photographs. The
tables have:

1. the milliseconds per image of each stage, on one thread;
2. images per second of complete epochs, in alternating rounds with torch's default number of threads, and the ratio to
   streaming in the same round. "Dense resize" is streaming by the two matrix products of the graph. "Pillow and
   DataLoader" decodes and resizes with Pillow, without any check, and augments alike. "ImageFolder" is torchvision's,
   if it is installed, with the usual transforms: RandomResizedCrop, RandomHorizontalFlip and ToTensor;
3. the error of decoding a JPEG at half its size, which Upright does not do.
"""

import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from shared import command_line, heading, milliseconds, quartiles, row
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upright.architectures.resnet import ResNet
from upright.data.augmentation import RandomAffine, RandomResizedCrop
from upright.data.folder import Folder
from upright.data.split import content_hash
from upright.images import decode
from upright.runs.process import keep_freed_memory
from upright.warp import resize, resize_pixels

SIZE, BATCH = 224, 32
AUGMENT = (RandomResizedCrop, partial(RandomAffine, flip=0.5))


def photographs(folder: Path, count: int) -> None:
    """Write ``count`` photographs of two classes."""
    generator = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        label = number % 2
        source = sources[label]
        width = int(generator.integers(400, source.width))
        height = min(width * 3 // 4, source.height)
        x, y = (int(generator.integers(0, largest + 1)) for largest in (source.width - width, source.height - height))
        photograph = source.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
        path = folder / str(label) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.save(path, quality=90)


def dense(pixels: Tensor, *options: Any) -> Tensor:
    """Resize like `resize_pixels`, with the complete matrices."""
    images = resize(pixels.permute(0, 3, 1, 2).float(), *options)
    return images.round().clamp(0, 255).to(torch.uint8)


def stages(folder: Path, seconds: float) -> None:
    """Print the milliseconds per image of each stage, on one thread."""
    torch.set_num_threads(1)
    data = photos(folder, cache="disk")
    path = sorted(folder.glob("*/*.jpg"))[0]
    pixels = decode(path, data.spec)
    batch = data.samples("train")[:BATCH].images
    indices = torch.arange(BATCH)
    image = torch.tensor(pixels)[None]
    heading("one image, one thread", "ms")
    for name, work, images in (
        ("decode the JPEG", lambda: decode(path, data.spec), 1),
        ("hash its pixels, once", lambda: content_hash(pixels), 1),
        ("resize it to 224 x 224", lambda: resize_pixels(image, SIZE, SIZE, "crop"), 1),
        ("resize it like the graph", lambda: dense(image, SIZE, SIZE, "crop"), 1),
        ("read it from the disk cache", lambda: data.samples("train")[indices], BATCH),
        ("augment it (crop, flip: one sampling)", lambda: data.augmentation(batch), BATCH),
    ):
        row(name, f"{milliseconds(work, seconds) / images:.2f}")
    print()


def photos(folder: Path, **options: Any) -> Folder:
    """Return the photographs as data."""
    return Folder(root=str(folder), size=SIZE, resize="crop", batch_size=BATCH, augment=AUGMENT, **options)


class Pillow(Dataset[Any]):
    """The training images of `data`, decoded and resized by Pillow."""

    def __init__(self, data: Folder) -> None:
        self.paths = [data.source.files[index] for index in data.splits["train"]]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            side = min(image.size)
            x, y = (image.width - side) / 2, (image.height - side) / 2
            box = (x, y, x + side, y + side)
            pixels = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous(), 0


def loops(folder: Path, workers: int) -> dict[str, Callable[[], int]]:
    """Return functions that run one epoch and return its number of images."""

    def upright(**options: Any) -> Callable[[], int]:
        data = photos(folder, **options)
        loader = data.train_dataloader()

        def epoch() -> int:
            for batch in loader:
                data.augmentation(batch.images)
            return len(loader) * BATCH

        return epoch

    def others(dataset: Any, augment: Callable[[Tensor], object]) -> Callable[[], int]:
        loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True)

        def epoch() -> int:
            for images, _ in loader:
                augment(images)
            return len(loader) * BATCH

        return epoch

    streamed = upright(cache="none", num_workers=workers)

    def densely() -> int:
        with patch("upright.data.cache.resize_pixels", dense):  # the workers are forks
            return streamed()

    data = photos(folder, cache="none")
    result = {
        f"streamed, {workers} workers": streamed,
        "streamed, dense resize": densely,
        "Pillow and DataLoader": others(Pillow(data), data.augmentation),
        "cache on disk": upright(cache="disk"),
        "cache in memory": upright(cache="memory"),
    }
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop, ToTensor
    except ImportError:
        return result
    transform = Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), ToTensor()])
    return result | {"ImageFolder and DataLoader": others(ImageFolder(str(folder), transform), lambda images: images)}


def epochs(folder: Path, threads: int, rounds: int) -> None:
    """Print the images per second of every loop, and of filling the cache."""
    torch.set_num_threads(threads)
    scratch = os.environ["UPRIGHT_CACHE"]

    def fill(resizing: Callable[..., Tensor]) -> int:
        with tempfile.TemporaryDirectory() as cache, patch("upright.data.cache.resize_pixels", resizing):
            os.environ["UPRIGHT_CACHE"] = cache
            count = len(photos(folder, cache="disk", num_workers=threads).images.facts)
            os.environ["UPRIGHT_CACHE"] = scratch
        return count

    every = loops(folder, threads) | {
        "filling the cache on disk": lambda: fill(resize_pixels),
        "filling it, dense resize": lambda: fill(dense),
    }
    speeds: dict[str, list[float]] = {name: [] for name in every}
    costs: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, epoch in every.items():
            start, processor = time.perf_counter(), processor_seconds()
            count = epoch()
            speeds[name].append(count / (time.perf_counter() - start))
            costs[name].append(1000 * (processor_seconds() - processor) / count)
    reference = next(iter(costs.values()))
    heading(f"{threads} threads", "images per second", "processor ms per image", "ratio to streaming")
    for name, values in costs.items():
        ratio = quartiles(values, reference) if rounds > 1 else "-"
        row(name, f"{statistics.median(speeds[name]):.0f}", f"{statistics.median(values):.2f}", ratio)
    print()


def processor_seconds() -> float:
    """Return the processor time of this process and of its finished workers."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def training_step(seconds: float) -> None:
    """Print the images per second of a training step."""
    network = ResNet((3, SIZE, SIZE), 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.rand(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 2

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    print(f"ResNet-18's training step alone: {1000 * BATCH / milliseconds(step, seconds):.0f} images per second\n")


def half_size() -> None:
    """Print how much the pixels change if Pillow decodes a JPEG at half its size before it is resized."""
    heading("decoded at half its size", "largest difference, grey levels", "share of values that differ by more than 1")
    for name, photograph in zip(("china.jpg", "flower.jpg"), load_sample_images().images, strict=True):
        file = io.BytesIO()
        Image.fromarray(photograph).save(file, "JPEG", quality=90)
        full, half = Image.open(file), Image.open(file)
        half.draft("RGB", (half.width // 2, half.height // 2))
        small, exact = (resize_pixels(torch.tensor(np.array(each))[None], 160, 160).int() for each in (half, full))
        difference = (small - exact).abs()
        row(f"{name}, to 160 x 160", int(difference.max()), f"{100 * (difference > 1).float().mean():.0f} %")


def main() -> None:
    """Print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--count", type=int, default=600, help="number of photographs; default: 600")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop; default: 5")
    options, threads = parser.parse_args(), torch.get_num_threads()
    count, rounds, seconds = (60, 1, 0.0) if options.quick else (options.count, options.rounds, 2.0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["UPRIGHT_CACHE"] = f"{scratch}/cache"
        folder = Path(scratch) / "photographs"
        photographs(folder, count)
        stages(folder, seconds)
        epochs(folder, threads, rounds)
    training_step(5 * seconds)
    half_size()


if __name__ == "__main__":
    main()
