"""Small files in exactly the formats in which datasets are published."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))


def write_emnist(path: Path, split: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write ``gzip.zip``. In the published files, images are transposed and letters count from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gzip/", b"")
        for part, (images, labels) in parts.items():
            stem = f"gzip/emnist-{split}-{part}"
            archive.writestr(f"{stem}-images-idx3-ubyte.gz", gzip.compress(idx(images.swapaxes(1, 2))))
            archive.writestr(f"{stem}-labels-idx1-ubyte.gz", gzip.compress(idx(labels + (split == "letters"))))


def cifar_records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Return the binary version: for each image its labels, then its colour planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(label[:, None] for label in labels), planes], axis=1).astype(np.uint8).tobytes()


def cifar_batch(images: np.ndarray, **labels: np.ndarray) -> bytes:
    """Return the Python version: the opcodes of Python 2 and NumPy 1 for a dictionary with an array of bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + text(b"b") + b"tR"
    array += b"(" + number(1) + b"(" + number(len(planes)) + number(planes.shape[1]) + b"t" + dtype
    array += b"I00\n" + text(planes.astype(np.uint8).tobytes()) + b"tb"
    content = b"\x80\x02}(" + text(b"batch_label") + text(b"one of two") + text(b"data") + array
    for key, values in labels.items():
        content += text(key.encode()) + b"](" + b"".join(number(int(value)) for value in values) + b"e"
    return content + b"u."


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def colours(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` images ``(32, 32, 3)`` of different colours, and labels 0, 1, ... in turn."""
    numbers = np.arange(count)
    colour = np.stack([numbers % 256, numbers // 256, 255 - numbers % 256], axis=1).astype(np.uint8)
    return np.broadcast_to(colour[:, None, None], (count, 32, 32, 3)).copy(), (numbers % classes).astype(np.uint8)


def write_all(root: Path, digits: np.ndarray, labels: np.ndarray) -> None:
    """Write a small version of every downloaded dataset to its place, from 500 images ``(28, 28)`` of ten classes."""
    for name in ("mnist", "fashion-mnist", "kmnist"):
        for part, chosen in (("train", slice(400)), ("t10k", slice(400, 500))):
            write_idx(root / name / f"{part}-images-idx3-ubyte.gz", digits[chosen])
            write_idx(root / name / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
    letters = np.arange(len(digits), dtype=np.uint8) % 26
    parts = {"train": (digits[:400], letters[:400]), "test": (digits[400:], letters[400:])}
    write_emnist(root / "emnist/gzip.zip", "letters", parts)
    images, classes = colours(300, 10)
    batches = {f"data_batch_{i}": slice(50 * i - 50, 50 * i) for i in range(1, 6)} | {"test_batch": slice(250, 300)}
    members = {f"{name}.bin": cifar_records(images[part], classes[part]) for name, part in batches.items()}
    write_tar(root / "cifar10/cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{n}": m for n, m in members.items()})
    images, classes = colours(1200, 100)
    members = {
        f"cifar-100-binary/{name}.bin": cifar_records(images[part], classes[part] // 5, classes[part])
        for name, part in (("train", slice(1000)), ("test", slice(1000, 1200)))
    }
    write_tar(root / "cifar100/cifar-100-binary.tar.gz", members)
