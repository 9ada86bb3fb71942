"""Metadata of image files, edited in place: set the EXIF orientation, or carry all metadata over to other pixels.

Everything else in the file stays the same, byte for byte. The functions take the content of a file that Pillow can
open. If its structure is damaged, they raise an error of any kind.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

from upright.errors import ImageError

EXIF = b"Exif\0\0"  # start of the EXIF segment of a JPEG, in front of the TIFF structure
APP1 = b"\xff\xe1"  # marker of a JPEG segment with EXIF data or XMP
XMP = b"http://ns.adobe.com/xap/1.0/\0"
MAX_SEGMENT = 65_533  # largest content of a JPEG segment, in bytes
ORIENTATION_TAG = 0x0112
SHORT = 3  # type of a TIFF entry: an unsigned integer of 16 bits
PNG_SIGNATURE_BYTES = 8
PIXEL_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
"""Chunks of a PNG that hold or describe the pixels of its frames."""
COLOUR_CHUNKS = {b"PLTE", b"tRNS", b"bKGD", b"hIST", b"sBIT"}
"""Chunks of a PNG that depend on its colour type and bit depth."""


def set_orientation(content: bytes, kind: str, value: int, *, thumbnail: bool = True) -> bytes:
    """Return the content of an image file with another EXIF orientation, 1 to 8. The pixel data stay the same.

    ``kind`` is ``JPEG``, ``PNG``, ``WEBP`` or ``TIFF``. Without ``thumbnail``, the new file does not refer to the
    embedded thumbnail, whose pixels no longer match.

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


def _segments(content: bytes) -> list[bytes]:
    """Split a JPEG into its start, each segment in front of the pixel data, and the rest."""
    segments, start = [content[:2]], 2
    while (marker := content[start + 1]) != 0xDA:
        if content[start] != 0xFF or marker == 0xD9:
            raise ImageError("Its structure is damaged.")
        is_fill_byte = marker == 0xFF
        end = start + (1 if is_fill_byte else 2 + int.from_bytes(content[start + 2 : start + 4]))
        segments.append(content[start:end])
        start = end
    return [*segments, content[start:]]


def _exif_segment(data: bytes) -> bytes:
    if len(data) > MAX_SEGMENT:
        raise ImageError("Its EXIF data have no room for the orientation.")
    return APP1 + (len(data) + 2).to_bytes(2) + data


def _insert(segments: list[bytes], metadata: list[bytes]) -> bytes:
    """Return a JPEG with more segments. JFIF stays the first one."""
    place = 2 if segments[1].startswith(b"\xff\xe0") else 1
    return b"".join([*segments[:place], *metadata, *segments[place:]])


def _jpeg(content: bytes, value: int, thumbnail: bool) -> bytes:
    segments = [_xmp(each, value) if each.startswith(XMP, 4) else each for each in _segments(content)]
    places = [i for i, each in enumerate(segments) if each.startswith(APP1) and each.startswith(EXIF, 4)]
    if not places:
        return _insert(segments, [_exif_segment(EXIF + _exif(None, value, thumbnail))])
    old = segments[places[0]]
    segments[places[0]] = new = _exif_segment(_exif(old[4:], value, thumbnail))
    if len(places) > 1 and len(new) != len(old):  # the EXIF data continue in a second segment
        raise ImageError("Its EXIF data have no room for the orientation.")
    return b"".join(segments)


def _jpeg_with(pixels: bytes, source: bytes) -> bytes:
    def is_metadata(segment: bytes) -> bool:
        # JFIF and Adobe describe the pixels, and MPF lists further images in the file.
        marker = segment[1:2]
        return marker == b"\xfe" or (
            b"\xe1" <= marker <= b"\xef" and marker != b"\xee" and not segment.startswith(b"MPF\0", 4)
        )

    return _insert(_segments(pixels), list(filter(is_metadata, _segments(source))))


def _chunks(content: bytes) -> list[bytes]:
    """Split a PNG into its signature, its chunks, and the rest."""
    chunks, start = [content[:PNG_SIGNATURE_BYTES]], PNG_SIGNATURE_BYTES
    while _name(chunks[-1]) != b"IEND":
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if end > len(content):
            raise ImageError("Its structure is damaged.")
        chunks.append(content[start:end])
        start = end
    return [*chunks, content[start:]]


def _name(chunk: bytes) -> bytes:
    return chunk[4:8]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(content: bytes, value: int, thumbnail: bool) -> bytes:
    chunks = _chunks(content)
    for i, chunk in enumerate(chunks):
        if _name(chunk) == b"iTXt" and chunk.startswith(b"XML:com.adobe.xmp", 8):
            chunks[i] = _chunk(b"iTXt", _xmp(chunk[8:-4], value))
    names = list(map(_name, chunks))
    if b"eXIf" in names:
        place = names.index(b"eXIf")
        chunks[place] = _chunk(b"eXIf", _exif(chunks[place][8:-4], value, thumbnail))
    else:
        chunks.insert(names.index(b"IDAT"), _chunk(b"eXIf", _exif(None, value, thumbnail)))
    return b"".join(chunks)


def _png_with(pixels: bytes, source: bytes) -> bytes:
    new = {
        name: b"".join(chunk for chunk in _chunks(pixels) if _name(chunk) == name)
        for name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
    }
    # Depth and colour type stand in the first chunk.
    same = pixels[24:26] == source[24:26]
    colours = b"" if same else new[b"PLTE"] + new[b"tRNS"]
    parts: dict[bytes, list[bytes]] = {b"IHDR": [], b"PLTE": [], b"IDAT": []}  # metadata by the chunk that they follow
    part = b"IHDR"
    for chunk in _chunks(source)[1:-1]:
        name = _name(chunk)
        part = name if name in parts else part
        if name not in PIXEL_CHUNKS and (same or name not in COLOUR_CHUNKS):
            parts[part].append(chunk)
    before, between, after = (b"".join(chunks) for chunks in parts.values())
    content = [new[b"IHDR"], before, colours, between, new[b"IDAT"], after, _chunk(b"IEND", b"")]
    return pixels[:PNG_SIGNATURE_BYTES] + b"".join(content)


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
        chunks = {b"VP8X": _webp_header(content), **chunks}
    header = chunks[b"VP8X"]
    chunks[b"VP8X"] = bytes([header[0] | 0x08]) + header[1:]
    chunks[b"EXIF"] = _exif(chunks.get(b"EXIF"), value, thumbnail)
    if b"XMP " in chunks:
        chunks[b"XMP "] = _xmp(chunks[b"XMP "], value)
    body = b"".join(
        name + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2) for name, data in chunks.items()
    )
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def _webp_header(content: bytes) -> bytes:
    """Return the chunk ``VP8X`` of a WebP file that has only pixel data."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = ((side - 1).to_bytes(3, "little") for side in image.size)
        return bytes([0x10 * ("A" in image.mode), 0, 0, 0]) + width + height


WRITERS: dict[str, Callable[[bytes, int, bool], bytes]] = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "TIFF": _tiff}
