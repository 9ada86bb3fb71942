"""Time of each stage of loading photographs at 224 x 224, and speed of each kind of cache.

    python benchmarks/loading.py [--count 600] [--quick]

It writes JPEG files of 500 x 375 to a temporary folder: different random crops of scikit-learn's two photographs. The
first table has the milliseconds per image of each stage, on one thread. The second table has the speed of complete
epochs through loader and augmentation, and of a training step of ResNet-18, with torch's default number of threads.
"""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shared import command_line, heading, milliseconds, row
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


def stages(folder: Path, seconds: float) -> None:
    """Print the milliseconds per image of each stage, on one thread."""
    torch.set_num_threads(1)
    data = Folder(root=str(folder), size=SIZE, resize="crop", cache="disk", augment=AUGMENT)
    path = sorted(folder.glob("*/*.jpg"))[0]
    pixels = decode(path, data.spec)
    batch = data.samples("train")[:BATCH].images
    indices = torch.arange(BATCH)
    image = to_tensor(pixels[None])
    heading("one image, one thread", "ms")
    for name, work, images in (
        ("decode the JPEG", lambda: decode(path, data.spec), 1),
        ("hash its pixels", lambda: content_hash(pixels), 1),
        ("resize it to 224 x 224", lambda: resize(image, SIZE, SIZE, "crop"), 1),
        ("read it from the disk cache", lambda: data.samples("train")[indices], BATCH),
        ("augment it (crop, flip: one sampling)", lambda: data.augmentation(batch), BATCH),
    ):
        row(name, f"{milliseconds(work, seconds) / images:.2f}")


def epochs(folder: Path, threads: int, seconds: float) -> None:
    """Print the images per second through loader and augmentation."""
    torch.set_num_threads(threads)
    print()
    heading(f"loader and augmentation, {threads} threads", "images per second")
    for cache, workers in (("disk", 0), ("memory", 0), ("none", 0), ("none", 1), ("none", 2)):
        options = {"cache": cache, "num_workers": workers, "batch_size": BATCH, "augment": AUGMENT}
        data = Folder(root=str(folder), size=SIZE, resize="crop", **options)
        loader = data.train_dataloader()
        best = 0.0
        for _ in range(2):
            start = time.perf_counter()
            for batch in loader:
                data.augmentation(batch.images)
            best = max(best, len(loader) * BATCH / (time.perf_counter() - start))
        row(f"cache {cache}" + (f", {workers} workers" if cache == "none" else ""), f"{best:.0f}")
    network = ResNet((3, SIZE, SIZE), 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.rand(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 2

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    row("ResNet-18's training step alone", f"{1000 * BATCH / milliseconds(step, 5 * seconds):.0f}")


def main() -> None:
    """Print two tables."""
    parser = command_line(__doc__)
    parser.add_argument("--count", type=int, default=600, help="number of photographs; default: 600")
    options, threads = parser.parse_args(), torch.get_num_threads()
    count, seconds = (60, 0.0) if options.quick else (options.count, 2.0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["UPRIGHT_CACHE"] = f"{scratch}/cache"
        folder = Path(scratch) / "photographs"
        photographs(folder, count)
        start = time.perf_counter()
        _ = Folder(root=str(folder), size=SIZE, resize="crop", cache="disk", num_workers=threads).images
        print(f"Filling the cache, {threads} workers: {count / (time.perf_counter() - start):.0f} images per second\n")
        stages(folder, seconds)
        epochs(folder, threads, seconds)


if __name__ == "__main__":
    main()
