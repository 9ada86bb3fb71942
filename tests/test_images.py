import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upright.errors import UprightError
from upright.images import ImageSpec, decode, find_images

GREY = ImageSpec(1, 8, 8, ("a", "b"), (0.5,), (0.5,))
RGB = ImageSpec(3, 8, 8, ("a", "b"), (0.5,) * 3, (0.5,) * 3)


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_spec_survives_plain_data() -> None:
    masked = replace(RGB, mask="disc")
    assert ImageSpec.from_dict(RGB.to_dict()) == RGB and ImageSpec.from_dict(masked.to_dict()) == masked


def test_a_spec_of_an_older_version_has_no_mask() -> None:
    old = RGB.to_dict()
    assert old.pop("mask") == "none" and ImageSpec.from_dict(old) == RGB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "channels must be 1 .grey. or 3 .RGB., got 2"),
        ({"height": 0}, "at least 1x1 pixels, got 0x8"),
        ({"mean": (0.1, 0.2)}, "one number per channel"),
        ({"std": (0.0,)}, "std above 0"),
        ({"classes": ("a", "a")}, "at least two different names"),
        ({"resize": "fit"}, "resize must be one of stretch, crop, none; got 'fit'"),
        ({"background": 256}, "from 0 to 255, got 256"),
        ({"mask": "ring"}, "mask must be one of none, disc; got 'ring'"),
        (
            {"mask": "disc", "resize": "none"},
            "mask disc needs images of one size, and resize none allows any size: use resize stretch or crop, or mask "
            "none.",
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


def test_a_32_bit_image_keeps_8_bits_and_is_refused_above_16() -> None:
    def tiff(values: list[int]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.array([values], dtype=np.int32)).save(file, "TIFF")
        return file.getvalue()

    assert decode(tiff([0, 200]), GREY)[0, :, 0].tolist() == [0, 200]
    assert decode(tiff([0, 0xFF00]), GREY)[0, :, 0].tolist() == [0, 255]
    with pytest.raises(UprightError, match=r"more than 16 bits"):
        decode(tiff([0, 70000]), GREY)


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
    with pytest.raises(UprightError, match=r"20x10 pixels are more than the limit of 199"):
        decode(png(Image.new("L", (20, 10))), GREY, max_pixels=199)


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
