"""MNIST and two datasets in the same four IDX files: Fashion-MNIST and Kuzushiji-MNIST."""

import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from upright.data.published import Bytes, LabelledImages, Published, read_file
from upright.errors import UserError


class IDX(Published):
    """Four IDX files, with or without ``.gz``: images ``(N, 28, 28)`` and labels, for training and for test."""

    shape = (28, 28, 1)
    stems: tuple[str, str] = ("train", "t10k")
    """Beginnings of the names of the training files and the test files."""
    wanted_files = "the four IDX files"

    def parts(self) -> tuple[LabelledImages, LabelledImages]:
        train, test = (self.part(stem) for stem in self.stems)
        return train, test

    def part(self, stem: str) -> LabelledImages:
        """Read the images and labels of one part."""
        images, labels = (read_idx(self.file(f"{stem}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        return LabelledImages(images[..., None], labels)

    def file(self, name: str) -> Path | zipfile.Path:
        """Find a file, or download it."""
        return self.find(name, f"{name}.gz") or self.fetch(f"{name}.gz")


class MNIST(IDX):
    """70,000 handwritten digits, 28 x 28 grey (LeCun, Cortes, Burges 1998): 60,000 for training, 10,000 for test."""

    cached_as = "mnist"
    classes = tuple("0123456789")
    mean, std = (0.1307,), (0.3081,)
    address = "https://ossci-datasets.s3.amazonaws.com/mnist"
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


class FashionMNIST(IDX):
    """70,000 images of clothes, 28 x 28 grey (Xiao, Rasul, Vollgraf 2017): 60,000 for training, 10,000 for test."""

    cached_as = "fashion-mnist"
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    mean, std = (0.2860,), (0.3530,)
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


class KMNIST(IDX):
    """70,000 cursive Japanese characters, 28 x 28 grey (Clanuwat et al. 2018): 60,000 for training, 10,000 for test."""

    cached_as = "kmnist"
    classes = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    mean, std = (0.1918,), (0.3483,)
    address = "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }


def read_idx(path: Path | zipfile.Path) -> Bytes:
    """Read the uint8 array of an IDX file. Raise a `UserError` if it is truncated, too long, or another format."""
    content = read_file(path)
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4].ljust(4, b"\xff"))
    offset = 4 + 4 * dimensions
    if (zeros, kind) != (0, 8) or len(content) < offset:
        raise UserError(f"'{path}' is not an IDX file of unsigned bytes.")
    shape = struct.unpack(f">{dimensions}I", content[4:offset])
    values = np.frombuffer(content, np.uint8, offset=offset)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise UserError(f"'{path}' declares the shape {shape}, and holds {len(values)} bytes: it is not complete.")
    return values.reshape(shape)
