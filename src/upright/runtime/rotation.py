"""Rotate the image in a file: by quarter turns without loss, by any angle with resampling."""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor
from PIL.Image import Transpose
from PIL.JpegImagePlugin import get_sampling

from upright.errors import ImageError, UserError, one_line
from upright.images import FORMATS, exif_orientation, oriented
from upright.runtime.metadata import set_orientation, webp_chunks, with_metadata

Fit = Literal["crop", "pad"]
How = Literal["lossless", "exif", "resampled"]

CLOCKWISE = {1: 6, 6: 3, 3: 8, 8: 1, 2: 7, 7: 4, 4: 5, 5: 2}
"""Orientation after another quarter turn clockwise, by EXIF orientation."""
QUARTERS = {1: Transpose.ROTATE_270, 2: Transpose.ROTATE_180, 3: Transpose.ROTATE_90}
"""Transposition by number of quarter turns clockwise. Pillow's names count anticlockwise."""
WEBP_QUALITY = 90  # Quality of a resampled WebP whose source is lossy. A WebP file does not store its own.
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_adobe_deflate", "tiff_lzw", "lzma", "zstd")
"""Lossless compressions of TIFF for any kind of image."""
TIFF_TAGS = {
    ExifTags.Base[name]
    for name in (
        *("ImageDescription", "Make", "Model", "XResolution", "YResolution", "ResolutionUnit", "Software", "DateTime"),
        *("Artist", "HostComputer", "Copyright", "ExifOffset", "GPSInfo", "XMLPacket"),
    )
}
"""Tags of a TIFF that do not describe its pixels."""


class Resampling(NamedTuple):
    """Settings for angles that are no multiples of 90 degrees."""

    fit: Fit = "crop"  # `crop` keeps the largest rectangle without an empty corner; `pad` keeps the whole image
    background: tuple[int, int, int] = (255, 255, 255)  # of the corners with `pad`, unless the image is transparent
    quality: int | None = None  # of lossy formats, 1 to 100; by default a JPEG has the tables of its source


def parse_colour(name: str) -> tuple[int, int, int]:
    """Return the colour of a name or of ``#rrggbb``, or raise a `UserError`."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        raise UserError(f"--background must be the name of a colour or #rrggbb, got '{name}'.") from None
    return red, green, blue


def rotate(content: bytes, turns: int, degrees: float, settings: Resampling) -> tuple[bytes, How]:
    """Return the content of an image file with a rotated image, and how it was rotated.

    The angle is a number of quarter turns clockwise, 0 to 3, and further degrees clockwise. Without further degrees,
    the rotation loses nothing: ``lossless`` rotates the pixels of a PNG, BMP, GIF or lossless WebP file, and compares
    them with those of the new file; ``exif`` writes the EXIF orientation into a JPEG, WebP, TIFF or PNG file.
    ``resampled`` computes new pixels by ``settings``.

    Raises:
        ImageError: if the file does not allow this rotation.
    """
    try:
        with _opened(content) as (image, kind):
            if degrees:
                return _resampled(image, kind, content, 90 * turns + degrees, settings), "resampled"
            orientation = exif_orientation(image)  # before the pixels of a TIFF are loaded and rotated by it
            if new := _turned(image, kind, content, turns):
                return new, "lossless"
        if kind in ("BMP", "GIF"):
            raise ImageError(f"Pillow cannot write this kind of {kind} without loss.")
        for _ in range(turns):
            orientation = CLOCKWISE[orientation]
        new = set_orientation(content, kind, orientation)
        with _opened(new) as (image, _):
            if exif_orientation(image) != orientation:
                raise ImageError("Its metadata are damaged.")
        return new, "exif"
    except ImageError:
        raise
    except Exception as error:  # a damaged file can lead Pillow's plugins to any exception
        raise ImageError(f"Its structure or its metadata are damaged ({one_line(error)}).") from None


@contextmanager
def _opened(content: bytes) -> Iterator[tuple[Any, str]]:
    """Open an image, and yield it with its format. Refuse a file with several images."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.format != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"It has {count} frames or pages, and the angle is that of the first one.")
        yield image, "JPEG" if image.format == "MPO" else str(image.format)


def _turned(image: Image.Image, kind: str, content: bytes, turns: int) -> bytes | None:
    """Return a file with rotated pixels, or None if the pixels would change."""
    if kind in ("JPEG", "TIFF") or (kind == "WEBP" and b"VP8L" not in dict(webp_chunks(content))):
        return None
    options = _metadata(image, kind)
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    elif kind == "PNG":
        options["bits"] = content[24]
    turned = oriented(image).transpose(QUARTERS[turns])
    if kind == "PNG" and turned.mode == "P" and (palette := turned.getpalette()):
        # Pillow would use fewer bits for a short palette.
        turned.putpalette(palette + [0] * (3 * 2 ** content[24] - len(palette)))
    new = _encoded(turned, kind, **options)
    if kind == "PNG" and new[24:26] != content[24:26]:  # another depth or colour type, for example 8 bits instead of 16
        return None
    new = _finished(new, image, kind, content)
    with _opened(new) as (reread, _):
        return new if _equal(turned, oriented(reread)) else None


def _finished(new: bytes, image: Image.Image, kind: str, content: bytes) -> bytes:
    """Return the new file with the metadata of the source ``image``, whose orientation its pixels already have."""
    if kind in ("JPEG", "PNG"):
        new = with_metadata(new, content, kind)
    if kind in ("JPEG", "PNG", "WEBP") and ("exif" in image.info or exif_orientation(image) > 1):
        new = set_orientation(new, kind, 1, thumbnail=False)
    return new


def _metadata(image: Image.Image, kind: str) -> dict[str, Any]:
    """Return options to save the metadata, apart from those that `with_metadata` copies."""
    names = ("dpi",) if kind in ("JPEG", "PNG") else ("dpi", "icc_profile", "exif", "xmp", "comment")
    return {name: image.info[name] for name in names if image.info.get(name)}


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    # Into a file of the system, Pillow encodes a JPEG without the interpreter lock, so that threads work in parallel.
    with open(os.memfd_create(kind), "w+b") if hasattr(os, "memfd_create") else io.BytesIO() as file:
        image.save(file, kind, **options)
        file.seek(0)
        return file.read()


def _equal(first: Image.Image, second: Image.Image) -> bool:
    if first.mode == "P":
        first, second = first.convert("RGBA"), second.convert("RGBA")
    return (first.mode, first.size) == (second.mode, second.size) and first.tobytes() == second.tobytes()


def _resampled(image: Any, kind: str, content: bytes, degrees: float, settings: Resampling) -> bytes:
    if image.format == "MPO" or (kind == "JPEG" and not content.rstrip(b"\0").endswith(b"\xff\xd9")):
        raise ImageError("It holds further data after the image, which only quarter turns keep.")
    if not _interpolable(image, kind, content):
        raise ImageError("It has more than 8 bits per colour, which only quarter turns keep.")
    upright = oriented(image)
    options = _metadata(image, kind)
    if kind == "JPEG":
        options |= {"comment": b"", "progressive": bool(image.info.get("progressive"))}
        tables = {"qtables": image.quantization, "subsampling": get_sampling(image)}
        options |= {"quality": settings.quality} if settings.quality else tables
    elif kind == "WEBP":
        lossless = b"VP8L" in dict(webp_chunks(content))
        options |= {"lossless": True} if lossless else {"quality": settings.quality or WEBP_QUALITY}
    elif kind == "TIFF":
        compression = image.info.get("compression")
        options["compression"] = compression if compression in TIFF_COMPRESSIONS else "tiff_deflate"
        options["exif"] = image.getexif()
        for tag in set(options["exif"]) - TIFF_TAGS:
            del options["exif"][tag]
    return _finished(_encoded(_rotated(upright, degrees, settings), kind, **options), image, kind, content)


def _interpolable(image: Any, kind: str, content: bytes) -> bool:
    """Return whether Pillow has read all bits, and writes them again."""
    if kind == "TIFF":
        tags = image.tag_v2
        bits = tags.get(ExifTags.Base.BitsPerSample, (1,))
        grey = bits == (16,) and tags.get(ExifTags.Base.PhotometricInterpretation) == 1
        return bool(max(bits) <= 8 or (grey and image.mode.startswith("I;16")))
    return kind != "PNG" or content[24] <= 8 or (image.mode == "I;16" and "transparency" not in image.info)


def _rotated(image: Image.Image, degrees: float, settings: Resampling) -> Image.Image:
    """Rotate an image clockwise, by bicubic interpolation. Pixels that cannot be interpolated get another mode."""
    deep = image.mode.startswith("I;16")
    if deep:
        image = Image.fromarray(np.asarray(image).astype(np.float32))
    elif image.mode in ("1", "P", "PA") or image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert(("L" if grey else "RGB") + "A" * image.has_transparency_data)
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    if settings.fit == "crop":
        size = _inner(image.size, abs(cos), abs(sin))
    else:
        sides = np.abs([[cos, sin], [sin, cos]]) @ image.size
        size = math.ceil(sides[0] - 1e-6), math.ceil(sides[1] - 1e-6)
    (x, y), (new_x, new_y) = ((width / 2, height / 2) for width, height in (image.size, size))
    matrix = (cos, sin, x - cos * new_x - sin * new_y, -sin, cos, y + sin * new_x - cos * new_y)
    if image.mode in ("LA", "RGBA"):
        colour: Any = (0,) * len(image.mode)
    else:
        colour = Image.new("RGB", (1, 1), settings.background).convert("L" if deep else image.mode).getpixel((0, 0))
        colour = 257 * colour if deep else colour
    image = image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=colour)
    return Image.fromarray(np.asarray(image).round().clip(0, 65_535).astype(np.uint16)) if deep else image


def _inner(size: tuple[int, int], cos: float, sin: float) -> tuple[int, int]:
    """Return the size of the largest upright rectangle inside a rotated rectangle. Cosine and sine are positive."""
    long, short = max(size), min(size)
    if short <= 2 * sin * cos * long or abs(sin - cos) < 1e-9:
        # Two corners touch the long side; the other two lie on the middle line.
        sides = (short / 2 / sin, short / 2 / cos)
        width, height = sides if size[0] >= size[1] else sides[::-1]
    else:
        double = cos * cos - sin * sin
        width, height = (size[0] * cos - size[1] * sin) / double, (size[1] * cos - size[0] * sin) / double
    return max(1, math.floor(width + 1e-6)), max(1, math.floor(height + 1e-6))
