"""`ImageSpec`, and a decoder from any image to uint8. This module does not import torch."""

import glob
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from upright.errors import ImageError, UserError

Pixels = npt.NDArray[np.uint8]
"""One decoded image, uint8, shape ``(H, W, C)``."""

ImageSource: TypeAlias = str | Path | bytes | bytearray | IO[bytes] | Image.Image | npt.ArrayLike
"""Anything that `decode` reads: a path, the content of a file, an open file, a PIL image, or a uint8 array."""

Item = TypeVar("Item")
Resize = Literal["stretch", "crop", "none"]
Mask = Literal["none", "disc"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that Pillow may read. Its other plugins are less tested against attacks, and one of them runs Ghostscript."""
MAX_PIXELS = 64_000_000
"""Default limit for one image, in pixels."""
DECODE_BYTES = 24
"""Memory for decoding one image, per pixel: a transparent WebP needs 23 bytes, other formats less."""
MAX_BATCH_PIXELS = 4_000_000
"""Limit for one batch, in pixels, so that a folder of photographs fits into memory."""
LISTED_CLASSES = 12
"""Largest number of classes in a message."""


@dataclass(frozen=True)
class ImageSpec:
    """Format of the images, the same in training and deployment. The datamodule declares it.

    `decode` always applies the EXIF orientation and reads only the first frame of an animation.

    Args:
        channels: 1 (grey, ITU-R 601) or 3 (RGB).
        height: rows of the network's input; with ``resize`` none, rows of the training images.
        width: columns, likewise.
        classes: names of the classes, in the order of the labels.
        mean: mean of each channel, on the scale of 0 to 1. The model subtracts it.
        std: standard deviation of each channel. The model divides by it.
        resize: ``stretch`` resizes to ``height`` x ``width``; ``crop`` first takes the largest centred box with that
            aspect ratio; ``none`` is for a network that takes any size.
        background: grey level (0 to 255) behind transparent pixels.
        mask: ``disc`` replaces all pixels outside the largest centred disc by the mean, so that no corner shows the
            angle of a rotated image; ``none`` shows the complete image.

    Raises:
        UserError: if a value is out of range.
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "stretch"
    background: int = 0
    mask: Mask = "none"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}.")
        if min(self.height, self.width) < 1:
            raise UserError(f"An image needs at least 1x1 pixels, got {self.height}x{self.width}.")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise UserError(
                f"mean and std need one number per channel ({self.channels}), std above 0; "
                f"got mean {list(self.mean)}, std {list(self.std)}."
            )
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise UserError(f"classes must be at least two different names, got {list(self.classes)}.")
        if self.resize not in get_args(Resize):
            raise UserError(f"resize must be one of {', '.join(get_args(Resize))}; got '{self.resize}'.")
        if not 0 <= self.background <= 255:
            raise UserError(f"background must be a grey level from 0 to 255, got {self.background}.")
        if self.mask not in get_args(Mask):
            raise UserError(f"mask must be one of {', '.join(get_args(Mask))}; got '{self.mask}'.")
        if self.mask == "disc" and self.resize == "none":
            raise UserError(
                "mask disc needs images of one size, and resize none allows any size: use resize stretch or crop, or "
                "mask none."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the network's input."""
        return self.channels, self.height, self.width

    @property
    def task(self) -> str:
        """Channels and the first classes, for messages."""
        more = len(self.classes) - LISTED_CLASSES
        text = f"{self.channels} channel(s) and the classes {list(self.classes[:LISTED_CLASSES])}"
        return text + (f" and {more} more" if more > 0 else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for checkpoints and manifests."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ImageSpec":
        """Return the spec of `to_dict`. A missing field has its default."""
        arguments: dict[str, Any] = {}
        for key, value in data.items():
            arguments[key] = tuple(value) if isinstance(value, list) else value
        return cls(**arguments)


def decode(
    source: ImageSource,
    spec: ImageSpec,
    max_pixels: int = MAX_PIXELS,
    reserve: Callable[[int], None] | None = None,
) -> Pixels:
    """Decode an image to uint8 of shape ``(H, W, spec.channels)``, at its own size.

    Args:
        source: a path, the content of a file as ``bytes`` or ``bytearray``, a binary file, a PIL image, or a uint8
            array ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 (RGBA) channels.
        spec: format that sets the channels and the background.
        max_pixels: largest number of pixels; a larger image is refused before it is decoded.
        reserve: function that gets the number of pixels of a file before it is decoded, and may wait for memory.
            Decoding needs up to `DECODE_BYTES` per pixel.

    Raises:
        ImageError: if the source cannot be read as an image.
    """
    name = f"'{source}'" if isinstance(source, str | Path) else "The image"
    try:
        if isinstance(source, str | Path | bytes | bytearray) or hasattr(source, "read"):
            file: Any = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
            with Image.open(file, formats=FORMATS) as image:
                if reserve and image.width * image.height <= max_pixels:
                    reserve(image.width * image.height)
                return _to_pixels(image, spec, max_pixels)
        return _to_pixels(source if isinstance(source, Image.Image) else _from_array(source), spec, max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is in none of the formats that can be read: {', '.join(FORMATS)}.") from None
    except Exception as error:  # a broken file can lead Pillow's plugins to any exception
        raise ImageError(f"{name} cannot be decoded: {' '.join(str(error).split())}") from None


def _from_array(source: npt.ArrayLike) -> Image.Image:
    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8 with values from 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"an array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_pixels(image: Image.Image, spec: ImageSpec, max_pixels: int) -> Pixels:
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise ValueError("its values need more than 16 bits; convert it to 8 or 16 bits first")
        # Pillow's own conversion of grey clips 16 bits at 255. Take the high byte, as Pillow does for 16-bit colour.
        # Mode I can also hold 8 bits.
        shift = 0 if image.mode == "I" and values.max() <= 0xFF else 8
        image = Image.fromarray((values >> shift).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point images have no agreed range; convert it to 8 or 16 bits first")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (spec.background,) * 3 + (255,))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    pixels = np.array(image.convert("L" if spec.channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], spec.channels)


def find_images(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the image files for a list of files, folders and patterns.

    A folder stands for all files below it with the suffix of an image, sorted. A pattern is a path that does not exist
    and contains ``*``, ``?`` or ``[``; ``**`` matches all folders.

    Raises:
        UserError: for a path that does not exist, a folder without images, and a pattern that matches no file.
    """
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                raise UserError(f"Folder '{path}' holds no images ({' '.join(sorted(SUFFIXES))}).")
        elif path.exists():
            files = [path]
        elif glob.has_magic(str(path)):
            files = [match for match in map(Path, sorted(glob.iglob(str(path), recursive=True))) if match.is_file()]
            if not files:
                raise UserError(f"'{path}' does not exist, and no file matches it as a pattern.")
        else:
            raise UserError(f"'{path}' does not exist.")
        yield from files


def batches_of_one_size(items: Iterable[Item], pixels: Callable[[Item], Pixels], limit: int) -> Iterator[list[Item]]:
    """Yield batches of neighbours whose ``pixels`` have the same size.

    A batch holds at most ``limit`` items and `MAX_BATCH_PIXELS` pixels, but at least one item.
    """
    for (height, width, _), group in groupby(items, key=lambda item: pixels(item).shape):
        while batch := list(islice(group, max(1, min(limit, MAX_BATCH_PIXELS // (height * width))))):
            yield batch
