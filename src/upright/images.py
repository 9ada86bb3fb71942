"""What an image is (`ImageSpec`), and decoding any picture to uint8. Never imports torch."""

import glob
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from upright.errors import UserError

Pixels = npt.NDArray[np.uint8]
"""One decoded image, uint8, shape ``(H, W, C)``."""

Item = TypeVar("Item")
Resize = Literal["stretch", "crop", "none"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What Pillow is asked to read: of its other plugins, some have rarely been attacked, and one runs Ghostscript."""
MAX_PIXELS = 64_000_000
"""The largest picture that is decoded unless told otherwise, in pixels."""
TOLD = 12
"""Classes that a message names, at most."""


@dataclass(frozen=True)
class ImageSpec:
    """What every stage from decoding to deployment must agree on; declared by the datamodule, never measured.

    Args:
        channels: 1 (pictures are turned to grey, ITU-R 601) or 3 (RGB).
        height: rows that the network sees; with ``resize`` none, those of the training images.
        width: columns, likewise.
        classes: names, in the order of the labels.
        mean: per channel, on the scale of 0 to 1, subtracted before the network.
        std: per channel, divided by.
        resize: ``stretch`` to ``height`` x ``width``, ``crop`` the largest centred box of that aspect first, or
            ``none``, for a network that takes any size.
        background: grey level (0 to 255) that transparent pixels are laid over.

    A picture's EXIF orientation is always applied; only the first frame of an animation is read.
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "stretch"
    background: int = 0

    def __post_init__(self) -> None:
        """Refuse what no picture can be."""
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
            raise UserError(f"At least two classes of different names are needed, got {list(self.classes)}.")
        if self.resize not in get_args(Resize):
            raise UserError(f"resize must be one of {', '.join(get_args(Resize))}; got '{self.resize}'.")
        if not 0 <= self.background <= 255:
            raise UserError(f"background must be a grey level from 0 to 255, got {self.background}.")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what the network sees."""
        return self.channels, self.height, self.width

    @property
    def task(self) -> str:
        """Channels and classes, of many the first ones, as a message tells them."""
        more = len(self.classes) - TOLD
        told = f"{self.channels} channel(s) and the classes {list(self.classes[:TOLD])}"
        return told + (f" and {more} more" if more > 0 else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints and manifests."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ImageSpec":
        """The inverse of `to_dict`."""
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**arguments)


def decode(
    source: str | Path | bytes | Image.Image | npt.ArrayLike, spec: ImageSpec, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Any picture as uint8 of shape ``(H, W, spec.channels)``, at its own size.

    Args:
        source: a path, the bytes of a file, a PIL image, or a uint8 array ``(H, W)`` or ``(H, W, C)`` with 1, 3 or
            4 (RGBA) channels.
        spec: says channels and background.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        UserError: naming the source, for whatever cannot be read as a picture.
    """
    name = f"'{source}'" if isinstance(source, str | Path) else "The image"
    try:
        if isinstance(source, str | Path):
            with Image.open(source, formats=FORMATS) as image:
                return _decode(image, spec, max_pixels)
        if isinstance(source, bytes):
            with Image.open(io.BytesIO(source), formats=FORMATS) as image:
                return _decode(image, spec, max_pixels)
        if isinstance(source, Image.Image):
            return _decode(source, spec, max_pixels)
        return _decode(Image.fromarray(_picture_array(np.asarray(source))), spec, max_pixels)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist.") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not a picture, or none of {', '.join(FORMATS)}.") from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise UserError(f"{name} cannot be decoded: {' '.join(str(error).split())}") from None


def _picture_array(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8 with values from 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"an array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    return np.ascontiguousarray(array)


def _decode(image: Image.Image, spec: ImageSpec, max_pixels: int) -> Pixels:
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise ValueError("its values need more than 16 bits; convert it to 8 or 16 bits first")
        # Pillow's own conversion clips 16 bits at 255; the high byte is what it takes of 16-bit colour. Mode I may hold
        # 8 bits as well.
        shift = 0 if image.mode == "I" and values.max() <= 0xFF else 8
        image = Image.fromarray((values >> shift).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pictures have no agreed range; convert it to 8 or 16 bits first")
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (spec.background,) * 3 + (255,))
        image = Image.alpha_composite(below, image.convert("RGBA"))
    pixels = np.array(image.convert("L" if spec.channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], spec.channels)


def find_images(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files as they are given, folders as the pictures under them (sorted, by suffix), patterns as what they match.

    A pattern is what is no path, but has ``*``, ``?`` or ``[``; ``**`` goes through all folders.

    Raises:
        UserError: for a path that does not exist, a folder without pictures, and a pattern that matches no file.
    """
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise UserError(f"Folder '{path}' holds no pictures ({' '.join(sorted(SUFFIXES))}).")
            yield from found
        elif path.exists():
            yield path
        elif glob.has_magic(str(path)):
            matches = [match for match in map(Path, sorted(glob.iglob(str(path), recursive=True))) if match.is_file()]
            if not matches:
                raise UserError(f"'{path}' does not exist, and as a pattern it matches no file.")
            yield from matches
        else:
            raise UserError(f"'{path}' does not exist.")


MAX_BATCH_PIXELS = 4_000_000
"""A batch of large pictures is cut at so many pixels, so that a folder of photographs fits into memory."""


def batches_of_one_size(items: Iterable[Item], pixels: Callable[[Item], Pixels], most: int) -> Iterator[list[Item]]:
    """Neighbours whose ``pixels`` have one shape, at most so many, and at most `MAX_BATCH_PIXELS` unless it is one."""
    for (height, width, _), group in groupby(items, key=lambda item: pixels(item).shape):
        while batch := list(islice(group, max(1, min(most, MAX_BATCH_PIXELS // (height * width))))):
            yield batch
