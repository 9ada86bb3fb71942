"""MNIST, and whatever else comes in its four IDX files."""

import gzip
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pooch

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.errors import UprightError
from upright.images import ImageSpec, Pixels

FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""Names, and the MD5 of what is downloaded (with ``.gz``)."""

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"


class MNIST(ImageDataModule):
    """70,000 handwritten digits, 28 x 28 grey (LeCun, Cortes, Burges 1998): 60,000 to train on, 10,000 to test.

    Args:
        root: folder of the four IDX files, packed (``.gz``) or not. By default ``$UPRIGHT_DATA/mnist``, or the user's
            cache where that variable is not set; what is not there is downloaded once, and its MD5 checked.
        val_fraction: of the 60,000, for validation.
        **options: see `ImageDataModule`.
    """

    def __init__(self, *, root: str | None = None, val_fraction: float = 0.1, **options: object) -> None:
        if root is not None:
            # A checkpoint is used from any working directory.
            root = self.arguments["root"] = str(Path(root).expanduser().resolve())
        super().__init__(val_fraction=val_fraction, **options)  # type: ignore[arg-type]  # the base's own types
        self.root = root

    @property
    def spec(self) -> ImageSpec:
        """Grey, 0 to 9."""
        return ImageSpec(1, 28, 28, tuple("0123456789"), mean=(0.1307,), std=(0.3081,))

    def prepare_data(self) -> None:
        """Download what is not there; Lightning calls it in one process."""
        for name in FILES:
            self._file(name)

    def read(self) -> Source:
        """All 70,000, in the published order."""
        images: list[Pixels] = []
        labels: list[int] = []
        for part in ("train", "t10k"):
            pixels = read_idx(self._file(f"{part}-images-idx3-ubyte"))
            classes = read_idx(self._file(f"{part}-labels-idx1-ubyte"))
            if pixels.ndim != 3 or classes.shape != pixels.shape[:1] or classes.max(initial=0) > 9:
                raise UprightError(
                    f"The {part} files do not fit together: (N, H, W) images and (N,) labels from 0 to 9 are needed, "
                    f"got {pixels.shape} and {classes.shape} up to {classes.max(initial=0)}."
                )
            images += list(pixels[..., None])
            labels += classes.tolist()
            if part == "train":
                count = len(labels)
        names = [f"train-{i:05d}" if i < count else f"test-{i - count:05d}" for i in range(len(labels))]
        return Source(images, labels, names, {"train": range(count), "test": range(count, len(labels))})

    def _file(self, name: str) -> Path:
        """The file, downloaded if it may be and is not there."""
        folder = Path(self.root or Path(os.environ.get("UPRIGHT_DATA", pooch.os_cache("upright"))) / "mnist")
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        if self.root:
            raise UprightError(
                f"'{folder}' holds neither {name} nor {name}.gz; `root` (--data.root) is the folder of the four IDX "
                "files. Without it they are downloaded."
            )
        url = f"{MIRROR}/{name}.gz"
        try:
            return Path(
                pooch.retrieve(url, f"md5:{FILES[name]}", f"{name}.gz", folder, progressbar=sys.stderr.isatty())
            )
        except Exception as error:  # whatever a network or a disk leads the libraries below to
            raise UprightError(
                f"{url} cannot be downloaded ({' '.join(str(error).split())[:200]}). Put the four IDX files into "
                f"'{folder}', or say with --data.root where they are."
            ) from error


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The uint8 array of an IDX file, packed with gzip or not.

    Raises:
        UprightError: if it is cut off, too long, or something else.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UprightError(f"'{path}' cannot be read: {error}.") from None
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4].ljust(4, b"\xff"))
    if (zeros, kind) != (0, 8) or len(content) < 4 + 4 * dimensions:
        raise UprightError(f"'{path}' is not an IDX file of unsigned bytes.")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise UprightError(f"'{path}' says that it holds {shape} bytes, and holds {len(values)}: it is not whole.")
    return values.reshape(shape)
