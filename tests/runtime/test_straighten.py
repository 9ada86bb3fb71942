"""`upright straighten`: copies are upright, complete, and lossless where possible. Sources never change."""

import csv
import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from tests.conftest import ROOT, Upright
from upright.cli import main
from upright.errors import ImageError
from upright.images import ImageSpec
from upright.runtime import straighten
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODELS, SAMPLES, SUMS, checksums, spec_entries
from upright.runtime.metadata import set_orientation
from upright.runtime.predictor import OrientationPredictor, open_session, run_batch
from upright.runtime.rotation import QUARTERS, Resampling, rotate

# The gradient of the brightness, by linear regression. An image is upright if its top is bright. The confidence is the
# correlation of the brightness with that direction.
GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
orientation (uint8[batch, height, width, 3] images) => (float[batch, 2] orientation)
<int64[1] colours = {3}, int64[2] plane = {1, 2}, int64[1] last = {1}, int64 across = {2}, int64 along = {1},
 float zero = {0}, float one = {1}, float tiny = {1e-6}, float half = {180}, float radian = {57.29577951}>
{
    pixels = Cast<to: int = 1>(images)
    grey = ReduceMean<keepdims: int = 0>(pixels, colours)
    nothing = Mul(grey, zero)
    ones = Add(nothing, one)
    columns = CumSum(ones, across)
    rows = CumSum(ones, along)
    column_mean = ReduceMean(columns, plane)
    row_mean = ReduceMean(rows, plane)
    grey_mean = ReduceMean(grey, plane)
    x = Sub(columns, column_mean)
    y = Sub(rows, row_mean)
    level = Sub(grey, grey_mean)
    xx = Mul(x, x)
    yy = Mul(y, y)
    xg = Mul(x, level)
    yg = Mul(y, level)
    gg = Mul(level, level)
    x_variance0 = ReduceMean<keepdims: int = 0>(xx, plane)
    y_variance0 = ReduceMean<keepdims: int = 0>(yy, plane)
    variance0 = ReduceMean<keepdims: int = 0>(gg, plane)
    x_variance = Add(x_variance0, tiny)
    y_variance = Add(y_variance0, tiny)
    variance = Add(variance0, tiny)
    x_covariance = ReduceMean<keepdims: int = 0>(xg, plane)
    y_covariance = ReduceMean<keepdims: int = 0>(yg, plane)
    right = Div(x_covariance, x_variance)
    down = Div(y_covariance, y_variance)
    right_part = Mul(right, x_covariance)
    down_part = Mul(down, y_covariance)
    part = Add(right_part, down_part)
    share = Div(part, variance)
    confidence = Sqrt(share)
    left = Neg(right)
    up0 = Neg(down)
    flat = Equal(up0, zero)
    up = Where(flat, tiny, up0)
    slope = Div(left, up)
    radians = Atan(slope)
    degrees = Mul(radians, radian)
    is_down = Less(up, zero)
    is_right = Less(left, zero)
    minus_half = Neg(half)
    behind = Where(is_right, minus_half, half)
    turned = Add(degrees, behind)
    angle = Where(is_down, turned, degrees)
    angle_column = Unsqueeze(angle, last)
    confidence_column = Unsqueeze(confidence, last)
    orientation = Concat<axis: int = 1>(angle_column, confidence_column)
}
"""


def photograph(angle: float = 0, size: tuple[int, int] = (64, 40), seed: int = 0) -> Image.Image:
    """Return an image with a bright top that is rotated anticlockwise by ``angle``, with a little noise."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) - width / 2, np.arange(height) - height / 2)
    radians = np.deg2rad(angle)
    up = -(np.cos(radians) * y + np.sin(radians) * x) / np.hypot(width, height)
    pixels = 128 + 150 * up[..., None] + np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_orientation_bundle(folder: Path, threshold: float | None = 0.5) -> Path:
    """Write a bundle that estimates the orientation of `photograph`."""
    (folder / SAMPLES).mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(GRAPH), folder / MODELS["fp32"])
    session = open_session(folder / MODELS["fp32"])
    samples = []
    for number, angle in enumerate((0, 90, -60, 170)):
        file = f"{SAMPLES}/{number:02d}.png"
        photograph(angle).save(folder / file)
        (row,) = run_batch(session, np.asarray(photograph(angle))[None])[0]
        samples.append({"file": file, "label": str(angle), "orientation": {"fp32": row.tolist()}})
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        **spec_entries(ImageSpec(3, 64, 64, (), (0.5,) * 3, (0.5,) * 3)),
        "input": {"shape": ["batch", "height", "width", 3]},
        "other_outputs": [],
        "precisions": {"fp32": {"tolerance": 1e-3}},
        "provenance": {"versions": {"upright": "0.2.0"}, "model": {"network": "Gradient"}},
    }
    if threshold is not None:
        manifest["orientation"] = {"threshold": threshold}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / EXPECTED).write_text(json.dumps(samples))
    (folder / SUMS).write_text(checksums(folder))
    return folder


ORIENTATION = ExifTags.Base.Orientation
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta tiff:Orientation="3" dc:title="kept"/>'


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int | None = None) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Make] = "Maker"
    data.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"private data"
    if orientation:
        data[ORIENTATION] = orientation
    return data


def opened(content: bytes) -> Any:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def displayed(content: bytes) -> Image.Image:
    """The image as a viewer shows it."""
    image = ImageOps.exif_transpose(opened(content))
    return image.convert("RGBA") if image.mode == "P" else image


def same(first: Image.Image, second: Image.Image) -> bool:
    return (first.mode, first.size) == (second.mode, second.size) and first.tobytes() == second.tobytes()


IMAGE = photograph(size=(37, 21))
GREY, PALETTE, RGBA = IMAGE.convert("L"), IMAGE.quantize(200), IMAGE.convert("RGBA")
RGBA.putalpha(GREY)
DEEP = Image.fromarray(257 * np.asarray(GREY).astype(np.uint16) + 1)
METADATA = {"icc_profile", "dpi", "comment", "progressive"}
FILES = {
    "jpeg": (encode(IMAGE, "JPEG", icc_profile=PROFILE), "exif"),
    "jpeg, grey": (encode(GREY, "JPEG"), "exif"),
    "jpeg, cmyk": (encode(IMAGE.convert("CMYK"), "JPEG"), "exif"),
    "jpeg, exif without orientation": (encode(IMAGE, "JPEG", exif=exif()), "exif"),
    "jpeg, orientation in xmp": (encode(IMAGE, "JPEG", xmp=XMP), "exif"),
    "jpeg, two images": (encode(IMAGE, "MPO", save_all=True, append_images=[IMAGE]), "exif"),
    "png": (encode(IMAGE, "PNG"), "lossless"),
    "png, exif": (encode(IMAGE, "PNG", exif=exif(6)), "lossless"),
    "png, 1 bit": (encode(IMAGE.convert("1"), "PNG"), "lossless"),
    "png, 2 bits": (encode(GREY.point(lambda level: level // 64 * 85), "PNG", bits=2), "lossless"),
    "png, palette": (encode(PALETTE, "PNG", transparency=3), "lossless"),
    "png, short palette of 8 bits": (encode(IMAGE.quantize(11), "PNG", bits=8), "lossless"),
    "png, alpha": (encode(RGBA, "PNG"), "lossless"),
    "png, transparent colour": (encode(IMAGE, "PNG", transparency=(9, 9, 9)), "lossless"),
    "png, 16 bits": (encode(DEEP, "PNG"), "lossless"),
    "bmp": (encode(IMAGE, "BMP", dpi=(300, 200)), "lossless"),
    "gif": (encode(PALETTE, "GIF", transparency=3, comment=b"hello"), "lossless"),
    "webp": (encode(IMAGE, "WEBP"), "exif"),
    "webp, alpha": (encode(RGBA, "WEBP"), "exif"),
    "webp, metadata": (encode(IMAGE, "WEBP", exif=exif(8), icc_profile=PROFILE, xmp=XMP), "exif"),
    "webp, lossless": (encode(RGBA, "WEBP", lossless=True, exif=exif(5)), "lossless"),
    "tiff": (encode(IMAGE, "TIFF", compression="tiff_lzw"), "exif"),
    "tiff, orientation": (encode(IMAGE, "TIFF", exif=exif(7)), "exif"),
    "tiff, fax": (encode(IMAGE.convert("1"), "TIFF", compression="group4"), "exif"),
    "tiff, 16 bits": (encode(DEEP, "TIFF"), "exif"),
}


@pytest.mark.parametrize("name", FILES)
def test_quarter_turns_keep_every_pixel(name: str) -> None:
    content, how = FILES[name]
    for turns, transposition in QUARTERS.items():
        new, actual = rotate(content, turns, 0, Resampling())
        assert actual == how
        assert same(displayed(new), displayed(content).transpose(transposition))
        before, after = opened(content), opened(new)
        assert after.getexif().get(ExifTags.Base.Make) == before.getexif().get(ExifTags.Base.Make)
        for key in {*METADATA, "transparency"} & before.info.keys():
            assert after.info[key] == before.info[key]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP"])
def test_turns_compose_with_each_exif_orientation(kind: str, orientation: int) -> None:
    content = encode(IMAGE, kind, exif=exif(orientation))
    for turns, transposition in QUARTERS.items():
        new, how = rotate(content, turns, 0, Resampling())
        assert how == "exif" and len(new) == len(content)
        assert sum(a != b for a, b in zip(new, content, strict=True)) <= 1
        assert same(displayed(new), displayed(content).transpose(transposition))


def test_an_orientation_in_a_jpeg_changes_nothing_else() -> None:
    content = encode(IMAGE, "JPEG", exif=exif(), icc_profile=PROFILE, xmp=XMP, comment=b"hello")
    new = set_orientation(content, "JPEG", 6)
    before, after = opened(content), opened(new)
    scan = content.index(b"\xff\xda")
    assert new.endswith(content[scan:])
    assert after.info["icc_profile"] == PROFILE and after.info["comment"] == b"hello"
    assert after.info["xmp"] == XMP.replace(b'"3"', b'"6"')
    assert dict(after.getexif()) == {**before.getexif(), ORIENTATION: 6, ExifTags.IFD.Exif: after.getexif()[34665]}
    assert after.getexif().get_ifd(ExifTags.IFD.Exif) == before.getexif().get_ifd(ExifTags.IFD.Exif)


def test_a_rotated_png_keeps_all_its_chunks() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "scan")
    info.add(b"gAMA", (45455).to_bytes(4))
    info.add(b"prVt", b"private", after_idat=True)
    content = encode(IMAGE, "PNG", pnginfo=info, dpi=(300, 300), exif=exif(6))
    new, _ = rotate(content, 1, 0, Resampling())
    assert all(name in new for name in (b"gAMA", b"tEXt", b"prVt", b"pHYs"))
    assert opened(new).text == {"Title": "scan"} and opened(new).info["dpi"] == opened(content).info["dpi"]
    assert opened(new).getexif()[ORIENTATION] == 1 and opened(new).getexif()[ExifTags.Base.Make] == "Maker"


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("degrees", [-30, 8, 44])
def test_other_angles_are_interpolated(turns: int, degrees: float) -> None:
    image = photograph(size=(120, 70))
    reference = image.rotate(-90 * turns - degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="red")
    for fit in ("crop", "pad"):
        new = opened(rotate(encode(image, "PNG"), turns, degrees, Resampling(fit, (255, 0, 0)))[0])
        x, y = (reference.width - new.width) / 2, (reference.height - new.height) / 2
        box = (x, y, x + new.width, y + new.height)
        centre = reference.transform(new.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
        # Half a pixel of shift can separate the two.
        assert np.median(np.abs(np.asarray(centre).astype(int) - np.asarray(new))) <= 4
        red = np.all(np.asarray(new) == (255, 0, 0), axis=2)
        if fit == "crop":
            assert not red.any() and new.width * new.height > 0.25 * image.width * image.height
        else:
            assert red.any() and abs(x) <= 1 and abs(y) <= 1
            assert abs((~red).sum() - image.width * image.height) < 0.06 * image.width * image.height


def test_a_crop_is_the_largest_rectangle_without_a_corner() -> None:
    white = Image.new("L", (200, 100), 255)
    for degrees in (5, 20, 45):
        new = opened(rotate(encode(white, "PNG"), 0, degrees, Resampling("crop", (0, 0, 0)))[0])
        assert np.asarray(new).min() == 255
    # 45 degrees: the rectangle of half the short side over sin 45 and cos 45
    assert new.size == (70, 70)


@pytest.mark.parametrize("name", FILES)
def test_an_interpolated_image_keeps_format_and_metadata(name: str) -> None:
    content, _ = FILES[name]
    if name == "jpeg, two images":
        with pytest.raises(ImageError, match=r"holds further data after the image, which only quarter turns keep\.$"):
            rotate(content, 0, 10, Resampling())
        return
    new, how = rotate(content, 0, 10, Resampling())
    before, after = opened(content), opened(new)
    assert how == "resampled" and after.format == before.format
    assert after.getexif().get(ORIENTATION, 1) == 1
    assert after.getexif().get(ExifTags.Base.Make) == before.getexif().get(ExifTags.Base.Make)
    for key in METADATA & before.info.keys():
        assert after.info[key] == before.info[key]
    assert after.mode == before.mode or before.mode in ("1", "P", "RGB")
    if after.format == "JPEG":
        assert after.quantization == before.quantization
        assert rotate(content, 0, 10, Resampling(quality=30))[0] != new


@pytest.mark.parametrize(
    ("content", "turns", "degrees", "message"),
    [
        (encode(PALETTE, "GIF", save_all=True, append_images=[GREY]), 1, 0, "It has 2 frames or pages"),
        (encode(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]), 1, 0, "It has 2 frames or pages"),
        (encode(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]), 0, 9, "It has 2 frames or pages"),
        (encode(IMAGE, "TIFF", big_tiff=True), 1, 0, "Its metadata are not in the form of classic TIFF"),
        (encode(IMAGE, "JPEG") + b"a film", 0, 9, "It holds further data after the image, which only quarter turns"),
        (encode(IMAGE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), 1, 0, "damaged"),
        (encode(IMAGE, "JPEG", exif=b"Exif\0\0" + exif().tobytes()[6:] + bytes(65_430)), 1, 0, "have no room for"),
    ],
)
def test_a_rotation_that_would_lose_data_is_refused(content: bytes, turns: int, degrees: float, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        rotate(content, turns, degrees, Resampling())


def test_colours_of_16_bits_are_rotated_by_the_tag_only() -> None:
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(5))
    header = (8).to_bytes(4) + (5).to_bytes(4) + bytes([16, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    buffer = io.BytesIO(PngImagePlugin._MAGIC)
    buffer.seek(0, io.SEEK_END)
    for name, data in chunks:
        PngImagePlugin.putchunk(buffer, name, data)
    new, how = rotate(buffer.getvalue(), 1, 0, Resampling())
    assert how == "exif" and chunks[1][1] in new and opened(new).getexif()[ORIENTATION] == 6
    with pytest.raises(ImageError, match=r"more than 8 bits per colour, which only quarter turns keep\.$"):
        rotate(buffer.getvalue(), 1, 10, Resampling())


# The command


@pytest.fixture(scope="module")
def orientation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_orientation_bundle(tmp_path_factory.mktemp("bundle") / "gradient")


ANGLES = {"upright.jpg": 0, "left.jpg": 90, "down.png": 180, "right.tif": -90, "tilted.webp": 25, "both.jpg": 100}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder with an image for each of `ANGLES`, one of noise, one that is broken."""
    folder = tmp_path / "scans"
    (folder / "2020").mkdir(parents=True)
    for name, angle in ANGLES.items():
        photograph(angle).save(folder / "2020" / name)
        os.utime(folder / "2020" / name, (1_000_000_000, 1_000_000_000))
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xffbroken")
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(to: Path) -> dict[str, dict[str, str]]:
    with open(to / "straighten.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = list(csv.DictReader(file))
    by_copy = {row["copy"]: row for row in table}
    assert len(by_copy) == len(table)  # no duplicates
    return by_copy


def test_every_image_has_an_upright_copy(orientation: Path, scans: Path, upright: Upright) -> None:
    before = contents(scans)
    answer = upright("straighten", orientation, scans, "--to", "out")
    assert answer.code == 2
    assert answer.out == "8 images: 5 rotated, 1 upright, 1 unsure, 1 error\nout/straighten.csv\n"
    assert re.fullmatch(r"upright: error: '/.*/broken\.jpg': The image .* formats that can be read: .*\n", answer.err)
    assert contents(scans) == before
    after = contents(Path("out"))
    assert after.keys() == before.keys() | {"straighten.csv", "straighten.json"}
    table = rows(Path("out"))
    assert {name: (row["action"], row["how"]) for name, row in table.items()} == {
        "2020/both.jpg": ("rotated", "resampled"),
        "2020/down.png": ("rotated", "lossless"),
        "2020/left.jpg": ("rotated", "exif"),
        "2020/right.tif": ("rotated", "exif"),
        "2020/tilted.webp": ("rotated", "resampled"),
        "2020/upright.jpg": ("upright", "copied"),
        "broken.jpg": ("error", "copied"),
        "noise.png": ("unsure", "copied"),
    }
    for name, row in table.items():
        assert row["path"] == str(scans / name) and (row["how"] == "copied") == (after[name] == before[name])
    predictor = OrientationPredictor(orientation)
    for name, angle in ANGLES.items():
        assert float(table[f"2020/{name}"]["angle"]) == pytest.approx(angle, abs=2) or angle == 180
        assert abs(predictor(Path("out/2020") / name).angle) < 5
        assert (Path("out/2020") / name).stat().st_mtime == 1_000_000_000


def test_turns_and_angles_that_are_kept(orientation: Path, scans: Path, upright: Upright) -> None:
    assert upright("straighten", orientation, scans, "--to", "four", "--turns", "4").code == 2
    assert rows(Path("four"))["2020/tilted.webp"]["action"] == "upright"
    assert rows(Path("four"))["2020/both.jpg"]["how"] == "exif"
    assert upright("straighten", orientation, scans, "--to", "near", "--min-angle", "30").code == 2
    assert rows(Path("near"))["2020/tilted.webp"]["action"] == "upright"
    assert upright("straighten", orientation, scans, "--to", "sure", "--threshold", "1").code == 2
    assert {row["action"] for row in rows(Path("sure")).values()} == {"unsure", "error"}
    sources = contents(scans)
    assert {name: value for name, value in contents(Path("sure")).items() if name in sources} == sources


def test_a_bundle_without_a_threshold_needs_the_option(scans: Path, upright: Upright) -> None:
    bundle = write_orientation_bundle(Path("bundle"), threshold=None)
    answer = upright("straighten", bundle, scans, "--to", "out")
    assert answer.code == 2 and "Bundle 'bundle' has no threshold of the confidence; give one by --thr" in answer.err
    assert not Path("out").exists()
    assert upright("straighten", bundle, scans / "2020", "--to", "out", "--threshold", "0.5").code == 0


def test_a_bundle_with_classes_is_refused(scans: Path, upright: Upright) -> None:
    answer = upright("straighten", ROOT / "export/digits", scans, "--to", "out")
    assert answer.code == 2 and "classifies images; give one that estimates the orientation." in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scans"], "straighten: the following arguments are required: --to."),
        (["scans", "--to", "scans"], "--to 'scans' and the input 'scans' overlap; give a folder outside of it."),
        (["scans", "--to", "scans/new"], "--to 'scans/new' and the input 'scans' overlap; "),
        (["scans/2020", "--to", "scans"], "--to 'scans' and the input 'scans/2020' overlap; "),
        (["scans/noise.png", "--to", "."], "--to '.' and the input 'scans/noise.png' overlap; "),
        (["link", "--to", "scans"], "--to 'scans' and the input 'link' overlap; "),
        (["nothing", "--to", "out"], "'nothing' does not exist."),
        (["scans", "--to", "scans/noise.png"], "overlap"),
        (["scans/noise.png", "--to", "file"], "--to 'file' is a file; give a folder."),
        (["scans", "--to", "out", "--threshold", "2"], "--threshold must be from 0 to 1, got 2."),
        (["scans", "--to", "out", "--min-angle", "50"], "--min-angle must be from 0 to 45, got 50."),
        (["scans", "--to", "out", "--quality", "101"], "--quality must be from 1 to 100, got 101."),
        (["scans", "--to", "out", "--background", "x"], "--background must be the name of a colour or #rrggbb, got"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    arguments: list[str], message: str, orientation: Path, scans: Path, upright: Upright
) -> None:
    Path("link").symlink_to("scans/2020")
    Path("file").write_text("text")
    before = contents(scans.parent)
    answer = upright("straighten", orientation, *arguments)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert contents(scans.parent) == before


def test_an_existing_file_is_replaced_by_force_only(orientation: Path, scans: Path, upright: Upright) -> None:
    arguments = ("straighten", orientation, scans / "2020", "--to", "out")
    Path("out").mkdir()
    Path("out/left.jpg").write_text("mine")
    answer = upright(*arguments)
    assert answer.code == 2 and "'out/left.jpg' exists with another content; --force replaces it." in answer.err
    assert Path("out/left.jpg").read_text() == "mine" and rows(Path("out"))["left.jpg"]["action"] == "error"
    # The next run tries it again, with the other images done.
    answer = upright(*arguments)
    assert answer.out.startswith("6 images: 4 rotated, 1 upright, 0 unsure, 1 error (5 of them in earlier runs)\n")
    Path("out/left.jpg").unlink()
    assert upright(*arguments).code == 0 and rows(Path("out"))["left.jpg"]["how"] == "exif"
    # Other settings need --force, or another folder.
    answer = upright(*arguments, "--turns", "4")
    assert (
        answer.code == 2 and "'out' holds copies by other settings (turns any, not 4); give another --to" in answer.err
    )
    answer = upright(*arguments, "--dry-run")
    assert answer.code == 2 and "'out' holds copies, and a dry run would replace their CSV" in answer.err
    assert upright(*arguments, "--turns", "4", "--force").code == 0
    assert rows(Path("out"))["both.jpg"]["how"] == "exif"
    Path("out/straighten.json").unlink()
    answer = upright(*arguments)
    assert answer.code == 2 and "'out/straighten.json' is missing or was changed" in answer.err


def test_a_dry_run_writes_only_the_csv(orientation: Path, scans: Path, upright: Upright) -> None:
    arguments = ("straighten", orientation, scans / "2020", "--to", "out")
    assert upright(*arguments, "--dry-run", "--turns", "4").code == 0
    assert upright(*arguments, "--dry-run").code == 0
    planned = rows(Path("out"))
    assert contents(Path("out")).keys() == {"straighten.csv", "straighten.json"}
    assert upright(*arguments).code == 0
    assert rows(Path("out")) == planned and len(planned) == len(ANGLES)
    # Any path of the folder gives the same copies.
    assert upright("straighten", orientation, "scans/../scans/2020", "--to", "other", "--dry-run").code == 0
    assert rows(Path("other")).keys() == planned.keys()


def test_images_with_one_place_do_not_replace_each_other(orientation: Path, scans: Path, upright: Upright) -> None:
    for name in ("a", "b"):
        (scans.parent / name).mkdir()
        photograph(90, seed=ord(name)).save(f"{name}/x.png")
    for force in ((), ("--force",)):
        answer = upright("straighten", orientation, "a", "b", "a/x.png", "a", "--to", "out", *force)
        assert answer.code == 2 and "'x.png' in --to is the copy of another image." in answer.err
        assert same(displayed(Path("out/x.png").read_bytes()), photograph(90, seed=97).transpose(QUARTERS[1]))


def test_copies_stay_inside_their_folder(orientation: Path, scans: Path, upright: Upright) -> None:
    Path("out").mkdir()
    Path("out/2020").symlink_to(scans / "2020")
    Image.open(scans / "2020/left.jpg").save("out/inside.jpg")
    Path("scans/link.jpg").symlink_to(Path("out/inside.jpg").resolve())
    before = contents(scans)
    answer = upright("straighten", orientation, scans, "--to", "out", "--force")
    assert answer.code == 2 and contents(scans) == before
    assert "A link leads from 'out/2020' out of --to." in answer.err
    assert "link.jpg': It lies in --to 'out'." in answer.err


def test_names_from_standard_input(
    orientation: Path, scans: Path, upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = b"scans/2020/left.jpg\n" + os.fsencode(scans / "2020/down.png") + b"\nmissing.jpg\nscans/noi*.png\n\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names)))
    answer = upright("straighten", orientation, "-", "--to", "out")
    assert answer.code == 2 and "missing.jpg': 'missing.jpg' does not exist." in answer.err
    assert rows(Path("out")).keys() == {"scans/2020/left.jpg", "scans/2020/down.png", "scans/noise.png", ""}


def test_names_may_have_any_bytes_and_other_files_are_named(orientation: Path, scans: Path, upright: Upright) -> None:
    (scans / "2020/film.mp4").write_text("film")
    odd = os.fsdecode(b'a\nb,"\xff.jpg')
    (scans / "2020" / odd).write_bytes((scans / "2020/left.jpg").read_bytes())
    for _ in range(2):
        answer = upright("straighten", orientation, scans / "2020", "--to", os.fsdecode(b"out\xfe"))
        assert answer.code == 0 and rows(Path(os.fsdecode(b"out\xfe")))[odd]["how"] == "exif"
    assert answer.out.startswith("7 images: 6 rotated, 1 upright, 0 unsure, 0 error (7 of them in earlier runs)\nout")
    assert answer.code == 0 and re.search(r"warning: 1 files .* \(1 \.mp4\).* They are not copied\.\n", answer.err)


def test_a_full_disk_stops_the_run(
    orientation: Path, scans: Path, upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing_file, count = straighten.replacing_file, 0

    @contextmanager
    def full(target: Path) -> Iterator[Path]:
        nonlocal count
        count += target.suffix != ".csv"
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        with replacing_file(target) as new:
            yield new

    with monkeypatch.context() as patch:
        patch.setattr(straighten, "replacing_file", full)
        answer = upright("straighten", orientation, scans / "2020", "--to", "out", "--threads", "1")
    assert answer.code == 2 and answer.err.startswith("upright: error: No space left on device: 'out/")
    assert upright("straighten", orientation, scans / "2020", "--to", "out").code == 0
    assert rows(Path("out")).keys() == ANGLES.keys()


# Interruptions

IMAGES = 40


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(IMAGES):
        path = folder / str(number % 3) / f"{number}{random.Random(number).choice(['.jpg', '.png', '.tif'])}"
        path.parent.mkdir(exist_ok=True)
        photograph(ANGLES["both.jpg"] * number, (200, 120), number).save(path)
    return folder


def start(bundle: Path, folder: Path, to: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "upright", "straighten", bundle, folder, "--to", to, "--threads", "2", *options]
    # A shell starts a job in the background with SIGINT ignored, and its children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)


def wait_for_rows(to: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (to / "straighten.csv").exists() and (to / "straighten.csv").read_bytes().count(b"\n") > count:
            return
        time.sleep(0.002)
    pytest.fail("The process wrote no rows.")


def check_killed(bundle: Path, folder: Path, to: Path, reference: dict[str, str], kills: int) -> None:
    """Kill the command again and again at random moments, then let it end."""
    sources, generator = contents(folder), random.Random(kills)
    for number in range(1, kills + 1):
        process = start(bundle, folder, to)
        wait_for_rows(to, (IMAGES - 5) * number // kills)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        process.communicate()
        for name, value in contents(to).items():  # no half-written copy has the name of a complete one
            assert name.startswith("straighten.") or Path(name).name.startswith(".") or value == reference[name]
    output, errors = start(bundle, folder, to).communicate()
    assert output.startswith(f"{IMAGES} images: ") and not errors
    assert contents(folder) == sources
    table = rows(to)
    assert table.keys() == sources.keys()
    copies = {name: value for name, value in contents(to).items() if not name.startswith("straighten.")}
    assert copies == reference


@pytest.fixture(scope="module")
def reference(orientation: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The copies of a run that nobody interrupts."""
    to = tmp_path_factory.mktemp("reference")
    assert main(["straighten", str(orientation), str(many), "--to", str(to)]) == 0
    return {name: value for name, value in contents(to).items() if not name.startswith("straighten.")}


def test_a_killed_run_resumes(orientation: Path, many: Path, reference: dict[str, str], tmp_path: Path) -> None:
    check_killed(orientation, many, tmp_path / "out", reference, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, 8, 13, 20])
def test_a_run_that_is_killed_often_resumes(
    orientation: Path, many: Path, reference: dict[str, str], tmp_path: Path, kills: int
) -> None:
    check_killed(orientation, many, tmp_path / "out", reference, kills)


def test_ctrl_c_stops_after_the_images_in_work(
    orientation: Path, many: Path, reference: dict[str, str], tmp_path: Path, upright: Upright
) -> None:
    to = tmp_path / "out"
    process = start(orientation, many, to)
    wait_for_rows(to, 5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and errors == "upright: stopped. The same command resumes.\n"
    copies = {name: value for name, value in contents(to).items() if not name.startswith("straighten.")}
    assert output.startswith(f"{len(copies)} images: ") and 5 <= len(copies) < IMAGES
    assert copies.items() <= reference.items() and rows(to).keys() == copies.keys()
    with open(to / "straighten.csv", "a") as file:
        file.write(f"{many}/0/0.jpg,0/0.j")  # a row that a failure of the power has cut off
    assert upright("straighten", orientation, many, "--to", to).code == 0
    assert rows(to).keys() == reference.keys()


def test_two_processes_do_not_share_a_folder(orientation: Path, many: Path, tmp_path: Path, upright: Upright) -> None:
    process = start(orientation, many, tmp_path / "out")
    wait_for_rows(tmp_path / "out", 1)
    answer = upright("straighten", orientation, many, "--to", tmp_path / "out")
    process.kill()
    process.communicate()
    assert answer.code == 2 and re.search(r"Another process writes to '.*out'; wait until it ends\.", answer.err)


@pytest.mark.slow
def test_the_benchmark_measures_the_bundle(orientation: Path, tmp_path: Path) -> None:
    for number in range(3):
        photograph(size=(160, 120), seed=number).save(tmp_path / f"{number}.png")
    command = [
        sys.executable,
        ROOT / "benchmarks/straighten.py",
        orientation,
        tmp_path,
        "--quick",
        "--",
        "--turns",
        "any",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 photographs, 40 rotated versions; no source was changed or lost." in result.stdout
    cells = {line.split(" | ")[0]: line.split(" | ") for line in result.stdout.splitlines()}
    assert cells["| all"][5].startswith("100.0 %") and cells["| already upright"][2] == "0"
