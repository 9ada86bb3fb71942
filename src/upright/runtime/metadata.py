"""Metadata of image files, edited in place: set the EXIF orientation, or carry all metadata over to other pixels.

Everything else in the file stays the same, byte for byte. The functions take the content of a file that Pillow can
open. If its structure is damaged, they raise an error of any kind.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from upright.errors import ImageError

EXIF = b"Exif\0\0"
"""Start of the EXIF segment of a JPEG, in front of the TIFF structure."""
XMP = b"http://ns.adobe.com/xap/1.0/\0"
MAX_SEGMENT = 65_533
"""Largest content of a JPEG segment, in bytes."""
ORIENTATION_TAG = 0x0112
SHORT = 3
"""Type of a TIFF entry: an unsigned integer of 16 bits."""
PNG_SIGNATURE_BYTES = 8
PIXEL_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
"""Chunks of a PNG that hold or describe the pixels of its frames."""
COLOUR_CHUNKS = {b"PLTE", b"tRNS", b"bKGD", b"hIST", b"sBIT"}
"""Chunks of a PNG that depend on its colour type and bit depth."""


def set_orientation(content: bytes, kind: str, value: int, *, thumbnail: bool = True) -> bytes:
    """Return the content of an image file with another EXIF orientation. The pixel data stay the same.

    Args:
        content: the content of the file.
        kind: ``JPEG``, ``PNG``, ``WEBP`` or ``TIFF``.
        value: the orientation, from 1 to 8.
        thumbnail: False to remove the reference to the embedded thumbnail, whose pixels no longer match.

    Raises:
        ImageError: if the metadata have no place for the orientation.
    """
    return WRITERS[kind](content, value, thumbnail)


def with_metadata(pixels: bytes, source: bytes, kind: str) -> bytes:
    """Return the JPEG or PNG file ``pixels`` with all metadata of the file ``source``, whose kind is the same."""
    return _png_with(pixels, source) if kind == "PNG" else _jpeg_with(pixels, source)


def _tiff(content: bytes, value: int, thumbnail: bool) -> bytes:
    """Set the orientation in the first directory (IFD) of a TIFF structure, which is also the form of EXIF data.

    A directory without the tag is copied to the end, with the tag. All other data keep their positions, so that
    offsets in a maker note stay valid.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        raise ImageError("Its metadata are not in the form of classic TIFF.")
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    first, end = start + 2, start + 2 + 12 * count
    if end + 4 > len(content):
        raise ImageError("Its metadata are truncated.")
    entries = [content[position : position + 12] for position in range(first, end, 12)]
    tags = [int(struct.unpack(f"{order}H", entry[:2])[0]) for entry in entries]
    following = content[end : end + 4] if thumbnail else bytes(4)
    new = struct.pack(f"{order}HHIHH", ORIENTATION_TAG, SHORT, 1, value, 0)
    if ORIENTATION_TAG in tags:
        entries[tags.index(ORIENTATION_TAG)] = new
        return content[:first] + b"".join(entries) + following + content[end + 4 :]
    entries.insert(sum(tag < ORIENTATION_TAG for tag in tags), new)
    body = content + bytes(len(content) % 2)
    directory = struct.pack(f"{order}H", count + 1) + b"".join(entries) + following
    return body[:4] + struct.pack(f"{order}I", len(body)) + body[8:] + directory


def _exif(block: bytes | None, value: int, thumbnail: bool) -> bytes:
    """Set the orientation in EXIF data, with or without `EXIF` in front. Without data, write some that hold it."""
    if not block:
        return struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, ORIENTATION_TAG, SHORT, 1, value, 0, 0)
    prefix = EXIF if block.startswith(EXIF) else b""
    return prefix + _tiff(block[len(prefix) :], value, thumbnail)


def _xmp(packet: bytes, value: int) -> bytes:
    """Set the copy of the orientation in an XMP packet, if it has one. The length stays the same."""
    return re.sub(rb'(tiff:Orientation(?:="|>))[1-8]', rb"\g<1>%d" % value, packet)


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment of a JPEG in front of its pixel data."""
    position = 2
    while True:
        while content[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = content[position + 1]
        if content[position] != 0xFF or marker == 0xD9:
            raise ImageError("Its structure is damaged.")
        if marker == 0xDA:
            return
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        yield marker, position, end
        position = end


def _segment(marker: int, content: bytes) -> bytes:
    if len(content) > MAX_SEGMENT:
        raise ImageError("Its EXIF data have no room for the orientation.")
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


def _jpeg(content: bytes, value: int, thumbnail: bool) -> bytes:
    parts: list[bytes] = []
    position, place, blocks, growth = 0, 2, 0, 0
    for marker, start, end in _segments(content):
        data = content[start + 4 : end]
        if marker == 0xE0 and start == 2:  # JFIF stays the first segment
            place = end
        if marker == 0xE1 and data.startswith(XMP):
            new = _xmp(data, value)
        elif marker == 0xE1 and data.startswith(EXIF):
            blocks += 1
            new = _exif(data, value, thumbnail) if blocks == 1 else data
            growth += len(new) - len(data)
        else:
            continue
        parts += [content[position:start], _segment(marker, new)]
        position = end
    if blocks > 1 and growth:  # the EXIF data continue in a second segment
        raise ImageError("Its EXIF data have no room for the orientation.")
    result = b"".join(parts) + content[position:]
    return result if blocks else result[:place] + _segment(0xE1, EXIF + _exif(None, value, thumbnail)) + result[place:]


def _jpeg_with(pixels: bytes, source: bytes) -> bytes:
    metadata = [
        source[start:end]
        for marker, start, end in _segments(source)
        # Not JFIF and Adobe, which describe the pixels, nor the list of further images in the file.
        if (0xE1 <= marker <= 0xEF and marker != 0xEE and source[start + 4 : start + 8] != b"MPF\0") or marker == 0xFE
    ]
    place = next((end for marker, _, end in _segments(pixels) if marker == 0xE0), 2)
    return pixels[:place] + b"".join(metadata) + pixels[place:]


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk of a PNG."""
    position, name = PNG_SIGNATURE_BYTES, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            raise ImageError("Its structure is damaged.")
        yield name, position, end
        position = end


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(content: bytes, value: int, thumbnail: bool) -> bytes:
    parts: list[bytes] = []
    position, place, has_exif = 0, 0, False
    for name, start, end in _chunks(content):
        data = content[start + 8 : end - 4]
        if name == b"IDAT" and not place:
            place = sum(map(len, parts)) + start - position
        if name == b"eXIf":
            new, has_exif = _exif(data, value, thumbnail), True
        elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp"):
            new = _xmp(data, value)
        else:
            continue
        parts += [content[position:start], _chunk(name, new)]
        position = end
    result = b"".join(parts) + content[position:]
    return result if has_exif else result[:place] + _chunk(b"eXIf", _exif(None, value, thumbnail)) + result[place:]


def _png_with(pixels: bytes, source: bytes) -> bytes:
    # Depth and colour type stand in the first chunk.
    same = pixels[24:26] == source[24:26]
    before: list[bytes] = []
    between: list[bytes] = []
    after: list[bytes] = []
    part = before
    for name, start, end in _chunks(source):
        if name == b"PLTE":
            part = between
        elif name == b"IDAT":
            part = after
        if name not in PIXEL_CHUNKS and (same or name not in COLOUR_CHUNKS):
            part.append(source[start:end])
    new = {name: b"" for name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")}
    for name, start, end in _chunks(pixels):
        if name in new:
            new[name] += pixels[start:end]
    colours = [] if same else [new[b"PLTE"], new[b"tRNS"]]
    parts = [new[b"IHDR"], *before, *colours, *between, new[b"IDAT"], *after, _chunk(b"IEND", b"")]
    return pixels[:PNG_SIGNATURE_BYTES] + b"".join(parts)


def webp_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and data of each chunk of a WebP file."""
    position, end = 12, 8 + int.from_bytes(content[4:8], "little")
    while position + 8 <= min(end, len(content)):
        length = int.from_bytes(content[position + 4 : position + 8], "little")
        yield content[position : position + 4], content[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _webp(content: bytes, value: int, thumbnail: bool) -> bytes:
    chunks = dict(webp_chunks(content))
    if b"VP8X" not in chunks:
        chunks = {b"VP8X": _webp_header(chunks), **chunks}
    header = chunks[b"VP8X"]
    chunks[b"VP8X"] = bytes([header[0] | 0x08]) + header[1:]
    chunks[b"EXIF"] = _exif(chunks.get(b"EXIF"), value, thumbnail)
    if b"XMP " in chunks:
        chunks[b"XMP "] = _xmp(chunks[b"XMP "], value)
    body = b"".join(
        name + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2) for name, data in chunks.items()
    )
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def _webp_header(chunks: dict[bytes, bytes]) -> bytes:
    """Return the chunk ``VP8X`` of a WebP file that has only pixel data."""
    if data := chunks.get(b"VP8L"):
        bits = int.from_bytes(data[1:5], "little")
        width, height, alpha = bits & 0x3FFF, bits >> 14 & 0x3FFF, bits >> 28 & 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", chunks[b"VP8 "], 6))
        width, height, alpha = width - 1, height - 1, 0
    return bytes([0x10 * alpha, 0, 0, 0]) + width.to_bytes(3, "little") + height.to_bytes(3, "little")


WRITERS: dict[str, Callable[[bytes, int, bool], bytes]] = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "TIFF": _tiff}
