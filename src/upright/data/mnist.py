"""MNIST, and what comes in its four IDX files in its place: Fashion-MNIST and Kuzushiji-MNIST."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from upright.data.published import Bytes, Part, Published
from upright.errors import UserError
from upright.images import ImageSpec


class IDX(Published):
    """Four IDX files, packed (``.gz``) or not: images ``(N, 28, 28)`` and labels, to train on and to test."""

    classes: tuple[str, ...]
    """In the order of the labels."""
    mean: ClassVar[float]
    std: ClassVar[float]
    """Of the training images, on the scale of 0 to 1: well-known numbers, declared, not measured here."""
    stems: tuple[str, str] = ("train", "t10k")
    """What the names of the files begin with: those to train on, those to test on."""
    what = "the four IDX files"

    @property
    def spec(self) -> ImageSpec:
        """Grey, 28 x 28."""
        return ImageSpec(1, 28, 28, self.classes, (self.mean,), (self.std,))

    def prepare_data(self) -> None:
        """Download what is not there; Lightning calls it in one process."""
        for stem in self.stems:
            for file in _files(stem):
                self.file(file)

    def parts(self) -> tuple[Part, Part]:
        """What the four files hold."""
        train, test = (self.part(stem) for stem in self.stems)
        return train, test

    def part(self, stem: str) -> Part:
        """Two of the files."""
        images, labels = (read_idx(self.file(file)) for file in _files(stem))
        return Part(images[..., None], labels)

    def file(self, name: str) -> Path | zipfile.Path:
        """The file, packed or not, downloaded if it may be and is not there."""
        return self.find(name, f"{name}.gz") or self.fetch(f"{name}.gz")


class MNIST(IDX):
    """70,000 handwritten digits, 28 x 28 grey (LeCun, Cortes, Burges 1998): 60,000 to train on, 10,000 to test."""

    cached_as = "mnist"
    classes = tuple("0123456789")
    mean, std = 0.1307, 0.3081
    mirrors = ("https://ossci-datasets.s3.amazonaws.com/mnist",)
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


class FashionMNIST(IDX):
    """70,000 pictures of clothes, 28 x 28 grey (Xiao, Rasul, Vollgraf 2017): 60,000 to train on, 10,000 to test."""

    cached_as = "fashion-mnist"
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    mean, std = 0.2860, 0.3530
    mirrors = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",)
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


class KMNIST(IDX):
    """70,000 cursive Japanese characters, 28 x 28 grey (Clanuwat et al. 2018): 60,000 to train on, 10,000 to test."""

    cached_as = "kmnist"
    classes = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    mean, std = 0.1918, 0.3483
    mirrors = ("http://codh.rois.ac.jp/kmnist/dataset/kmnist",)
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }


def _files(stem: str) -> tuple[str, str]:
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def read_idx(path: Path | zipfile.Path) -> Bytes:
    """The uint8 array of an IDX file, packed with gzip or not.

    Raises:
        UserError: if it is cut off, too long, or something else.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' cannot be read: {error}. It may not be whole; bring it again.") from None
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4].ljust(4, b"\xff"))
    if (zeros, kind) != (0, 8) or len(content) < 4 + 4 * dimensions:
        raise UserError(f"'{path}' is not an IDX file of unsigned bytes.")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise UserError(f"'{path}' says that it holds {shape} bytes, and holds {len(values)}: it is not whole.")
    return values.reshape(shape)
