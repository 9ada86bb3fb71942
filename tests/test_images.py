import io
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upright.errors import UprightError
from upright.image_paths import find_images
from upright.images import ImageSpec, decode

GREY = ImageSpec(1, 8, 8, ("a", "b"), (0.5,), (0.5,))
RGB = ImageSpec(3, 8, 8, ("a", "b"), (0.5,) * 3, (0.5,) * 3)


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_spec_survives_plain_data() -> None:
    other = replace(RGB, mask="disc", interpolation="bicubic")
    assert ImageSpec.from_dict(RGB.to_dict()) == RGB and ImageSpec.from_dict(other.to_dict()) == other


def test_a_spec_of_an_older_version_has_no_mask_and_is_bilinear() -> None:
    old = RGB.to_dict()
    assert old.pop("mask") == "none" and old.pop("interpolation") == "bilinear" and ImageSpec.from_dict(old) == RGB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "channels must be 1 .grey. or 3 .RGB., got 2"),
        ({"height": 0}, "at least 1x1 pixels, got 0x8"),
        ({"mean": (0.1, 0.2)}, "one number per channel"),
        ({"std": (0.0,)}, "std above 0"),
        ({"classes": ("a", "a")}, "at least two different names"),
        ({"resize": "fit"}, "resize must be one of stretch, crop, pad, none; got 'fit'"),
        ({"background": 256}, "from 0 to 255, got 256"),
        ({"mask": "ring"}, "mask must be one of none, disc; got 'ring'"),
        ({"interpolation": "lanczos"}, "interpolation must be one of bilinear, bicubic; got 'lanczos'"),
        (
            {"mask": "disc", "resize": "none"},
            "mask disc needs images of one size, and resize none allows any size: use resize stretch, crop or pad, or "
            "mask none.",
        ),
    ],
)
def test_spec_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(UprightError, match=message):
        ImageSpec(**{**vars(GREY), **change})


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    image = Image.fromarray(pixels)
    (tmp_path / "ü x.png").write_bytes(png(image))
    for source in (tmp_path / "ü x.png", str(tmp_path / "ü x.png"), png(image), image, pixels):
        assert np.array_equal(decode(source, RGB), pixels)


def test_grey_arrays_with_and_without_a_channel() -> None:
    pixels = np.arange(20, dtype=np.uint8).reshape(5, 4)
    assert np.array_equal(decode(pixels, GREY), pixels[..., None])
    assert np.array_equal(decode(pixels[..., None], GREY), pixels[..., None])


def test_sixteen_bits_keep_their_range() -> None:
    values = np.array([[0, 256, 0x7FFF, 0xFFFF]], dtype=np.uint16)
    assert decode(png(Image.fromarray(values)), GREY)[..., 0].tolist() == [[0, 1, 0x7F, 0xFF]]


def tiff(values: np.ndarray, bits: int, *, photometric: int = 1, sample_format: int = 1, samples: int = 1) -> bytes:
    """Write an uncompressed little-endian TIFF of the packed ``values`` ``(H, W)``."""
    height, width = values.shape[:2]
    pixels = values.tobytes()
    if bits == 12:  # two values in three bytes
        a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        pixels = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=2).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height, 279: len(pixels)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries += [struct.pack("<HHIHH", 258, 3, 1, bits, 0), struct.pack("<HHIHH", 339, 3, 1, sample_format, 0)]
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda e: e[:2][::-1])) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


@pytest.mark.parametrize("top", [255, 256])
def test_the_type_sets_the_range_not_the_values(top: int) -> None:
    values = np.array([[0, 16, top, top]])
    assert decode(tiff(values.astype(np.uint16), 12), GREY)[0, :, 0].tolist() == (values >> 4)[0].tolist()
    assert decode(tiff(values.astype("<u2"), 16), GREY)[0, :, 0].tolist() == (values >> 8)[0].tolist()
    for content in (tiff(values.astype("<i2"), 16, sample_format=2), tiff(values.astype("<i4"), 32, sample_format=2)):
        with pytest.raises(UprightError, match="signed or 32-bit images have no agreed range; convert it to 8 or 16"):
            decode(content, GREY)


def test_white_is_zero_in_8_and_in_16_bits() -> None:
    values = np.array([[0, 1, 200, 255]], np.uint8)
    eight = decode(tiff(values, 8, photometric=0), GREY)
    assert eight[0, :, 0].tolist() == [255, 254, 55, 0]
    assert np.array_equal(decode(tiff(values.astype("<u2") * 257, 16, photometric=0), GREY), eight)


def test_lab_is_converted_through_rgb() -> None:
    file = io.BytesIO()
    Image.new("LAB", (2, 2), (255, 128, 128)).save(file, "TIFF")
    assert decode(file.getvalue(), RGB).min() > 250 and decode(file.getvalue(), GREY).min() > 250


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_level_of_a_png_has_the_depth_of_its_pixels(bits: int, colour: int) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels, top = 3 if colour else 1, (1 << bits) - 1
    row = np.repeat([[top], [0]], channels, axis=1).ravel()  # a transparent pixel of the highest level, then black
    packed = "".join(f"{level:0{bits}b}" for level in row)
    packed += "0" * (-len(packed) % 8)
    row_bytes = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0))
    content += chunk(b"tRNS", struct.pack(">H", top) * channels)
    content += chunk(b"IDAT", zlib.compress(b"\0" + row_bytes)) + chunk(b"IEND", b"")
    assert decode(content, replace(GREY, background=77))[0, :, 0].tolist() == [77, 0]


def test_a_changed_byte_raises_no_other_error_than_ours() -> None:
    choose = random.Random(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        file = io.BytesIO()
        image.save(file, kind, exif=exif) if kind != "BMP" else image.save(file, kind)
        original = file.getvalue()
        for _ in range(200):
            content = bytearray(original)
            content[choose.randrange(min(len(content), 200))] = choose.randrange(256)
            try:
                assert decode(bytes(content), RGB).shape[2] == 3
            except UprightError as error:
                assert "\n" not in str(error)


def test_transparent_pixels_show_the_background() -> None:
    image = Image.new("LA", (2, 1), (200, 0))
    image.putpixel((1, 0), (200, 255))
    assert decode(png(image), GREY)[0, :, 0].tolist() == [0, 200]
    white = ImageSpec(1, 8, 8, ("a", "b"), (0.5,), (0.5,), background=255)
    assert decode(png(image), white)[0, :, 0].tolist() == [255, 200]


def test_palette_with_transparency() -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([90, 90, 90])
    assert decode(png(image, transparency=0), GREY).item() == 0
    assert decode(png(image), GREY).item() == 90


def test_cmyk() -> None:
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "JPEG", quality=95)
    red, green, blue = decode(file.getvalue(), RGB)[4, 4].tolist()
    assert red > 240 and max(green, blue) < 15


def test_exif_orientation_is_applied() -> None:
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: rotate the image by 90 degrees clockwise
    assert decode(png(image, exif=exif), GREY).shape == (4, 2, 1)
    assert decode(png(image, exif=exif), GREY)[0, 1, 0] == 255


def test_damaged_exif_data_keep_their_orientation_and_warn_of_nothing() -> None:
    """Warnings are errors in tests. Pillow refuses to write tags of the wrong type back, and warns about short ones."""
    image = Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16))

    def jpeg(entries: list[bytes], end: bytes = bytes(4)) -> bytes:
        file = io.BytesIO()
        data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + end
        image.save(file, "JPEG", quality=100, exif=data)
        return file.getvalue()

    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    width_as_text = struct.pack("<HHI4s", 0x0100, 2, 3, b"16\0\0")
    expected = decode(jpeg([orientation]), GREY)
    assert expected.shape == (16, 8, 1)
    assert np.array_equal(decode(jpeg([width_as_text, orientation]), GREY), expected)
    assert decode(jpeg([orientation[:6]], end=b""), GREY).shape in ((8, 16, 1), (16, 8, 1))
    for content in (b"Exif\0\0", b"Exif\0\0XX*\0", b"\0\xff" * 9):
        file = io.BytesIO()
        image.save(file, "JPEG", exif=content)
        assert decode(file.getvalue(), GREY).shape == (8, 16, 1)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (3, 3), value) for value in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert decode(file.getvalue(), GREY)[0, 0, 0] == 10


def test_files_that_are_not_images(tmp_path: Path) -> None:
    complete = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))
    for name, content, message in (
        ("text.png", b"hello", "text.png' is in none of the formats that can be read: BMP, GIF"),
        ("empty.png", b"", "empty.png' is in none of the formats"),
        ("truncated.png", complete[: len(complete) // 2], "truncated.png' cannot be decoded"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UprightError, match=message):
            decode(tmp_path / name, GREY)
    with pytest.raises(UprightError, match=r"nope.png' does not exist"):
        decode(tmp_path / "nope.png", GREY)
    with pytest.raises(UprightError, match=r"Is a directory"):
        decode(tmp_path, GREY)


def test_an_image_over_the_limit_is_not_decoded() -> None:
    with pytest.raises(UprightError, match=r"20x10 pixels are more than the limit of 199 .max_pixels."):
        decode(png(Image.new("L", (20, 10))), GREY, max_pixels=199)


def test_max_pixels_is_the_only_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    large = png(Image.new("L", (20, 10)))
    for limit in (50, 150):  # Pillow refuses from twice its limit, and warns below
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UprightError, match=r"max_pixels"):
            decode(large, GREY, max_pixels=limit)
        assert decode(large, GREY, max_pixels=200).shape == (10, 20, 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4)), "must be uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape .H, W.*got \(4, 4, 2\)"),
        (np.zeros((0, 4), np.uint8), r"got \(0, 4\)"),
    ],
)
def test_arrays_that_are_not_images(array: np.ndarray, message: str) -> None:
    with pytest.raises(UprightError, match=message):
        decode(array, GREY)


def test_find_images(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/z.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list(find_images([tmp_path])) == [tmp_path / "a.png", tmp_path / "b/z.JPG"]
    assert list(find_images([tmp_path / "notes.txt"])) == [tmp_path / "notes.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UprightError, match=r"none' holds no images"):
        list(find_images([tmp_path / "none"]))
    with pytest.raises(UprightError, match=r"nope' does not exist"):
        list(find_images([tmp_path / "nope"]))
