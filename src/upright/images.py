"""`ImageSpec`, and a decoder from any image to uint8. This module does not import torch."""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from upright.errors import ImageError, UserError, one_line

Pixels = npt.NDArray[np.uint8]  # one decoded image, uint8, shape `(H, W, C)`

ImageSource: TypeAlias = str | Path | bytes | bytearray | IO[bytes] | Image.Image | npt.ArrayLike
"""Anything that `decode` reads: a path, the content of a file, an open file, a PIL image, or a uint8 array."""

Item = TypeVar("Item")
Resize = Literal["stretch", "crop", "pad", "none"]
Mask = Literal["none", "disc"]
TaskName = Literal["classification", "multilabel", "orientation"]
Interpolation = Literal["bilinear", "bicubic"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that Pillow may read. Its other plugins are less tested against attacks, and one of them runs Ghostscript."""
# Pillow warns about damaged metadata without the name of the file. The pixels are either right or refused. The filter
# is set once, because threads decode at the same time and `catch_warnings` is not safe there.
warnings.filterwarnings("ignore", module=r"PIL\.")
MAX_PIXELS = 64_000_000  # default limit for one image, in pixels
DECODE_BYTES = 24  # memory for decoding one image, per pixel: a transparent WebP needs 23 bytes, other formats less
MAX_BATCH_PIXELS = 4_000_000  # limit for one batch, in pixels, so that a folder of photographs fits into memory
LISTED_CLASSES = 12  # largest number of classes in a message
ORIENTATIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""Transposition by value of the EXIF orientation."""
RAW_LEVELS = {"L;2": 85, "L;4": 17}
"""Grey levels per raw level of a PNG, by Pillow's raw mode. Pillow scales the pixels, but not the transparent level."""


@dataclass(frozen=True)
class ImageSpec:
    """Format of the images, the same in training and deployment. The datamodule declares it.

    `decode` always applies the EXIF orientation and reads only the first frame of an animation.

    Args:
        channels: 1 (grey, ITU-R 601) or 3 (RGB).
        height: rows of the network's input; with ``resize`` none, rows of the training images.
        width: columns, likewise.
        classes: names of the classes, in the order of the labels. Without classes, the task is the orientation.
        mean: mean of each channel, on the scale of 0 to 1. The model subtracts it.
        std: standard deviation of each channel. The model divides by it.
        resize: ``stretch`` resizes to ``height`` x ``width``; ``crop`` first takes the largest centred box with that
            aspect ratio; ``pad`` shows the whole image and fills the rest with ``background`` (letterbox); ``none`` is
            for a network that takes any size.
        background: grey level (0 to 255) behind transparent pixels, and beyond the image with ``pad``.
        mask: ``disc`` replaces all pixels outside the largest centred disc by the mean, so that no corner shows the
            angle of a rotated image; ``none`` shows the complete image.
        interpolation: filter of ``resize``, with antialiasing: ``bilinear`` or ``bicubic``.
        multilabel: an image has any number of the classes, also none; each class has its own probability.

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
    interpolation: Interpolation = "bilinear"
    multilabel: bool = False

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
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise UserError(f"classes must be at least two different names, got {list(self.classes)}.")
        if not 0 <= self.background <= 255:
            raise UserError(f"background must be a grey level from 0 to 255, got {self.background}.")
        for name, kind in (("resize", Resize), ("mask", Mask), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}; got '{getattr(self, name)}'.")
        if self.mask == "disc" and self.resize == "none":
            raise UserError(
                "mask disc needs images of one size, and resize none allows any size: use resize stretch, crop or pad, "
                "or mask none."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the network's input."""
        return self.channels, self.height, self.width

    @property
    def task(self) -> TaskName:
        """``classification``; ``multilabel`` for several classes per image; ``orientation`` if there are no classes."""
        return ("multilabel" if self.multilabel else "classification") if self.classes else "orientation"

    @property
    def summary(self) -> str:
        """Channels and the first classes, for messages."""
        if not self.classes:
            return f"{self.channels} channel(s) and the orientation, without classes"
        more = len(self.classes) - LISTED_CLASSES
        text = f"{self.channels} channel(s) and the classes {list(self.classes[:LISTED_CLASSES])}"
        return text + (f" and {more} more" if more > 0 else "") + (", any number per image" if self.multilabel else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for checkpoints and manifests."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ImageSpec":
        """Return the spec of `to_dict`. A missing field has its default."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return cls(**values)


def decode(
    source: ImageSource,
    spec: ImageSpec,
    max_pixels: int = MAX_PIXELS,
    reserve: Callable[[int], None] | None = None,
) -> Pixels:
    """Decode an image to uint8 of shape ``(H, W, spec.channels)``, at its own size.

    The type of the pixels sets their range, never their values: 16 bits keep the high byte, 12 bits the upper 8.
    Signed, 32-bit and floating-point pixels have no agreed range and are refused. An orientation in damaged EXIF data
    is applied if it can be read.

    Args:
        source: a path, the content of a file as ``bytes`` or ``bytearray``, a binary file, a PIL image, or a uint8
            array ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 (RGBA) channels.
        spec: format that sets the channels and the background.
        max_pixels: largest number of pixels; a larger image is refused before it is decoded. A limit above Pillow's
            own (89 million) raises that one too, for the whole process.
        reserve: function that gets the number of pixels of a file before it is decoded, and may wait for memory.
            Decoding needs up to `DECODE_BYTES` per pixel.

    Raises:
        ImageError: if the source cannot be read as an image.
    """
    name = f"'{source}'" if isinstance(source, str | Path) else "The image"
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
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
    except Image.DecompressionBombError:
        raise ImageError(f"{name} cannot be decoded: it has more pixels than max_pixels ({max_pixels}).") from None
    except Exception as error:  # a broken file can lead Pillow's plugins to any exception
        raise ImageError(f"{name} cannot be decoded: {one_line(error)}") from None


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
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels} (max_pixels)")
    image = oriented(_in_8_bits(image))
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (spec.background,) * 3 + (255,))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    mode = "L" if spec.channels == 1 else "RGB"
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], spec.channels)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits per channel that Pillow can convert to RGB. It loads the image."""
    raw_mode = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""  # type: ignore[attr-defined]
    image.load()
    if image.mode in ("I", "F"):
        kind = "signed or 32-bit" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} images have no agreed range; convert it to 8 or 16 unsigned bits first")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _high_byte(image, transparent)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB")) or image
    if raw_mode in RAW_LEVELS and isinstance(transparent, int):
        image.info["transparency"] = transparent * RAW_LEVELS[raw_mode]
    elif raw_mode.startswith("RGB;16") and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    return image


def _high_byte(image: Image.Image, transparent: int | None) -> Image.Image:
    """Return the upper 8 bits of a grey image of 12 or 16 bits, as Pillow does for 16-bit colour."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    values = np.asarray(image)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; Pillow inverts only up to 8 bits
        values = ((1 << bits) - 1) - values
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if transparent is not None:
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}  # EXIF data
    return grey


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 to 8. Damaged EXIF data may have none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged data can lead Pillow's parser to any exception
        return 1
    return value if value in ORIENTATIONS else 1


def oriented(image: Image.Image) -> Image.Image:
    """Load an image, and apply its EXIF orientation."""
    image.load()  # a TIFF is then oriented, and its tag removed
    method = ORIENTATIONS.get(exif_orientation(image))
    return image if method is None else image.transpose(method)


def batches_of_one_size(
    items: Iterable[Item], pixels: Callable[[Item], Pixels], limit: int, max_pixels: int | None = None
) -> Iterator[list[Item]]:
    """Yield batches of neighbours whose ``pixels`` have the same size.

    A batch holds at most ``limit`` items and ``max_pixels`` pixels (by default `MAX_BATCH_PIXELS`), but at least one
    item.
    """
    most = MAX_BATCH_PIXELS if max_pixels is None else max_pixels
    for (height, width, _), group in groupby(items, key=lambda item: pixels(item).shape):
        while batch := list(islice(group, max(1, min(limit, most // (height * width))))):
            yield batch
