"""Where the time goes with photographs at 224 x 224, and what each way of keeping them costs.

    python benchmarks/loading.py [--count 600]

Makes JPEG files of 500 x 375 from the two photographs that come with scikit-learn (random crops, so that no two are
equal), in a temporary folder. First the milliseconds that one image costs on one thread, stage by stage; then whole
epochs through the loader and the augmentation, and a training step of ResNet-18, at the threads that torch has.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn.functional import cross_entropy

from upright.architectures.resnet import ResNet
from upright.data.augmentation import RandomAffine, RandomResizedCrop
from upright.data.cache import to_tensor
from upright.data.folder import Folder
from upright.data.split import content_hash
from upright.images import decode
from upright.runs.process import keep_freed_memory
from upright.warp import resize

SIZE = 224
AUGMENT = (RandomResizedCrop, partial(RandomAffine, flip=0.5))


def photographs(folder: Path, count: int) -> None:
    """Write them."""
    generator = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        label = number % 2
        source = sources[label]
        width = int(generator.integers(400, source.width))
        height = min(width * 3 // 4, source.height)
        left, top = (int(generator.integers(0, most + 1)) for most in (source.width - width, source.height - height))
        picture = source.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        path = folder / str(label) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)


def milliseconds(work: Callable[[], object], least: float = 2.0) -> float:
    """Of one call, the median of at least two seconds of calls."""
    work()
    times: list[float] = []
    while sum(times) < least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


def stages(folder: Path) -> None:
    """Milliseconds per image, one thread."""
    torch.set_num_threads(1)
    data = Folder(root=str(folder), size=SIZE, resize="crop", cache="disk", augment=AUGMENT)
    path = sorted(folder.glob("*/*.jpg"))[0]
    pixels = decode(path, data.spec)
    batch = data.samples("train")[:32].images
    chosen = torch.arange(32)
    image = to_tensor(pixels[None])
    rows = {
        "decode the JPEG": milliseconds(lambda: decode(path, data.spec)),
        "hash its pixels": milliseconds(lambda: content_hash(pixels)),
        "resize it to 224 x 224": milliseconds(lambda: resize(image, SIZE, SIZE, "crop")),
        "read it from the disk cache": milliseconds(lambda: data.samples("train")[chosen]) / 32,
        "augment it (crop, flip: one sampling)": milliseconds(lambda: data.augmentation(batch)) / 32,
    }
    print("| one image, one thread | ms |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |", flush=True)


def epochs(folder: Path, count: int, threads: int) -> None:
    """Images per second through loader and augmentation."""
    torch.set_num_threads(threads)
    print(f"\n| loader and augmentation, {threads} threads | images per second |\n|---|---|")
    for cache, workers in (("disk", 0), ("memory", 0), ("none", 0), ("none", 1), ("none", 2)):
        data = Folder(
            root=str(folder), size=SIZE, resize="crop", cache=cache, num_workers=workers, batch_size=32, augment=AUGMENT
        )
        loader = data.train_dataloader()
        best = 0.0
        for _ in range(2):
            start = time.perf_counter()
            for batch in loader:
                data.augmentation(batch.images)
            best = max(best, len(loader) * 32 / (time.perf_counter() - start))
        name = f"cache {cache}" + (f", {workers} workers" if cache == "none" else "")
        print(f"| {name} | {best:.0f} |", flush=True)
    network = ResNet((3, SIZE, SIZE), 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.rand(32, 3, SIZE, SIZE), torch.arange(32) % 2

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    print(f"| ResNet-18's training step alone | {32000 / milliseconds(step, 10):.0f} |")


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="photographs; default: 600")
    count, threads = parser.parse_args().count, torch.get_num_threads()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["UPRIGHT_CACHE"] = f"{scratch}/cache"
        photographs(Path(scratch) / "photographs", count)
        start = time.perf_counter()
        _ = Folder(root=f"{scratch}/photographs", size=SIZE, resize="crop", cache="disk", num_workers=threads).images
        print(f"Filling the cache, {threads} workers: {count / (time.perf_counter() - start):.0f} images per second\n")
        stages(Path(scratch) / "photographs")
        epochs(Path(scratch) / "photographs", count, threads)


if __name__ == "__main__":
    main()
