"""Folders of images: every format, links, loops, odd names."""

import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upright.data.augmentation import RandomResizedCrop
from upright.data.folder import Folder
from upright.data.split import split_of
from upright.errors import UprightError, UserError
from upright.image_paths import find_images
from upright.warp import resize

GREY = 100
COLOUR = (200, 100, 50)


def save(path: Path, image: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write class a, with one image of every format, and class b, of grey images."""
    a, orange = tmp_path / "a", Image.new("RGB", (12, 8), COLOUR)
    save(a / "alpha.png", Image.new("RGBA", (12, 8), (*COLOUR, 0)))
    save(a / "animated.gif", orange, save_all=True, append_images=[Image.new("RGB", (12, 8))])
    save(a / "cmyk.jpg", Image.new("CMYK", (12, 8), (0, 0, 0, 255 - GREY)), quality=100)
    save(a / "colour.bmp", orange)
    save(a / "deep.png", Image.fromarray(np.full((8, 12), GREY * 256 + 7, np.uint16)))
    save(a / "deep.tif", Image.fromarray(np.full((8, 12), GREY * 256 + 7, np.uint16)))
    save(a / "eins/ßwei.webp", orange, lossless=True)
    save(a / "grey.PNG", Image.new("L", (12, 8), GREY))
    save(a / "palette.png", orange.quantize(4))
    save(a / "日本 🙂.png", Image.new("1", (12, 8), 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(a / "rotated.jpg", orange, exif=exif, quality=100)
    for number in range(10):
        save(tmp_path / "b" / f"{number}.png", Image.new("L", (30 + number, 20), number))
    return tmp_path


def test_every_format_in_one_folder(mixed: Path) -> None:
    source = Folder(root=str(mixed)).source
    images = dict(zip(source.names, source.images, strict=True))
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images.values())
    sizes = {name: image.shape[:2] for name, image in images.items() if name.startswith("a/")}
    assert sizes.pop("a/rotated.jpg") == (12, 8) and set(sizes.values()) == {(8, 12)} and len(sizes) == 10
    expected = {
        "alpha.png": 0, "cmyk.jpg": GREY, "deep.png": GREY, "deep.tif": GREY, "grey.PNG": GREY, "日本 🙂.png": 255
    }  # fmt: skip
    for name, image in images.items():
        if name.startswith("a/"):
            wanted = expected.get(name.removeprefix("a/"), COLOUR)
            assert abs(image.astype(int) - np.array(wanted)).max() <= 3, name
    assert Folder(root=str(mixed), size=16, val_fraction=0.2).samples("train")[:].images.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is in none of the formats that can be read: BMP, GIF, JPEG"),
        (b"GIF89a", "cannot be decoded|is in none of the formats"),
        ("cut", "cannot be decoded: .*truncated"),
        ("link", "does not exist"),
        ("float", "cannot be decoded: floating-point images have no agreed range"),
    ],
)
def test_an_invalid_image_among_valid_ones_is_named(mixed: Path, content: bytes | str, text: str) -> None:
    bad = mixed / "a/bad ü.tif"
    if content == "link":
        bad.symlink_to(mixed / "nothing.png")
    elif content == "float":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(bad)
    elif isinstance(content, str):
        complete = mixed / "complete.png"
        Image.effect_noise((64, 64), 50).save(complete)
        bad.write_bytes(complete.read_bytes()[:2000])
        complete.unlink()
    else:
        bad.write_bytes(content)
    source = Folder(root=str(mixed)).source
    index = list(source.names).index("a/bad ü.tif")
    with pytest.raises(UprightError, match=f"/a/bad ü.tif' ({text})"):
        source.images[index]
    assert source.images[index + 1].shape[2] == 3


def test_links_are_followed(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("c/1.png", "more/deeper/2.png", "3.png"):
        save(elsewhere / name, Image.new("L", (8, 8)))
    (mixed / "c").symlink_to(elsewhere / "c")
    (elsewhere / "c/more").symlink_to(elsewhere / "more")
    (elsewhere / "c/3.png").symlink_to(elsewhere / "3.png")
    source = Folder(root=str(mixed)).source
    assert [name for name in source.names if name.startswith("c")] == ["c/1.png", "c/3.png", "c/more/deeper/2.png"]


def test_loops_end_and_an_image_counts_once_in_a_class(mixed: Path) -> None:
    before = Folder(root=str(mixed)).source
    (mixed / "a/self").symlink_to(mixed / "a")
    (mixed / "a/up").symlink_to(mixed)
    (mixed / "a/zwei").symlink_to(mixed / "a/eins")
    (mixed / "b/round").mkdir()
    (mixed / "b/round/and").symlink_to(mixed / "b")
    source = Folder(root=str(mixed)).source
    assert list(source.names) == list(before.names) and source.labels == before.labels


def test_a_class_that_links_to_the_root_is_empty(mixed: Path) -> None:
    (mixed / "c").symlink_to(mixed)
    with pytest.raises(UprightError, match=r"No image in class \['c'\]"):
        _ = Folder(root=str(mixed)).source


def test_a_folder_without_read_permission_is_named(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("eins"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: refuse(f"{path}/eins"))
        patch.setattr(os, "scandir", lambda path: refuse(f"{path}/eins"))
        with pytest.raises(UprightError, match=r"Folder '.*/eins' cannot be read: Permission denied\."):
            _ = Folder(root=str(mixed)).classes()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UprightError, match=r"Folder '.*/a/eins' cannot be read: Permission denied\."):
        _ = Folder(root=str(mixed)).source


def test_an_empty_folder_in_test_is_ignored(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        save(tmp_path / name / "x.png", Image.new("L", (8, 8)))
    (tmp_path / "test/thumbs").mkdir()
    assert len(Folder(root=str(tmp_path)).source.labels) == 4


def test_the_images_can_be_pickled(mixed: Path) -> None:
    images = Folder(root=str(mixed)).source.images
    again = pickle.loads(pickle.dumps(images))
    assert len(again) == len(images) and (again[4] == images[4]).all()


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    for name in ("train/a", "train/b"):
        save(tmp_path / name / "x.png", Image.new("L", (8, 8)))
    (tmp_path / "val").mkdir()
    with pytest.raises(UprightError, match=r"No image in class \['a', 'b'\] of '.*/val'"):
        _ = Folder(root=str(tmp_path)).source


@pytest.mark.parametrize(
    ("spellings", "split"),
    [
        ("train Train TRAINING train_set training-data images_train train2017", "train"),
        ("val Valid validation Validation_Set dev val2017", "val"),
        ("test Test testing test_images", "test"),
        ("cat trainer tests holdout station_train testimony value", None),
    ],
)
def test_usual_spellings_of_a_split(spellings: str, split: str | None) -> None:
    assert {split_of(name) for name in spellings.split()} == {split}


def fill(root: Path, *folders: str, count: int = 1) -> None:
    for folder in folders:
        for number in range(count):
            save(root / folder / f"{number}.png", Image.new("L", (8, 8)))


def test_folders_of_splits_in_other_spellings(tmp_path: Path) -> None:
    fill(tmp_path, "Training/a", "Training/b", "valid/a", "valid/b", "extra/a", "extra/b")
    source = Folder(root=str(tmp_path)).source
    assert source.splits == {"train": [0, 1], "val": [2, 3]}
    assert source.remarks == [
        f"Folders 'extra' in '{tmp_path}' are left out: their names are not those of splits (train, val, test)."
    ]
    fill(tmp_path, "dev/a")
    with pytest.raises(UprightError, match=r"'.*/dev' and '.*/valid' are both split 'val'\. Rename or merge"):
        _ = Folder(root=str(tmp_path)).source


def test_splits_without_classes_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, "Train", "Test")
    with pytest.raises(UprightError, match=r"has splits 'Test', 'Train', but no folder per class in them"):
        _ = Folder(root=str(tmp_path)).source
    fill(tmp_path, "control")  # laboratory data: test and control
    (tmp_path / "Train/0.png").unlink()
    (tmp_path / "Train").rmdir()
    source = Folder(root=str(tmp_path)).source
    assert source.labels == [0, 1] and source.remarks == [f"'{tmp_path}/Test' is a class, because it holds no folders."]


def test_a_note_names_folders_that_may_be_splits_and_images_without_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "seg_one/a", "seg_one/b", "seg_two/a", "seg_two/b", ".")
    source = Folder(root=str(tmp_path)).source
    assert source.remarks == [
        "Folders 'seg_one', 'seg_two' are classes, and all hold the same folders ['a', 'b']. If they are splits, "
        "rename them to train, val and test.",
        f"1 images lie in no folder of a class and are left out, for example '{tmp_path}/0.png'.",
    ]


def test_training_and_inference_agree_on_what_an_image_is(
    mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Content decides where the suffix is unknown. Hidden files and remains of archives do not count. Links do."""
    jpeg = (mixed / "a/cmyk.jpg").read_bytes()
    for name in ("b/photo.jfif", "b/photo", "b/photo.JPG.bak", "b/._0.png", "b/.cache/0.png", "b/Thumbs.db"):
        (mixed / name).parent.mkdir(exist_ok=True)
        (mixed / name).write_bytes(jpeg)
    (mixed / "__MACOSX/b").mkdir(parents=True)
    (mixed / "__MACOSX/b/0.png").write_bytes(jpeg)
    for name in ("b/photo.avif", "b/photo.nef", "b/notes"):
        (mixed / name).write_bytes(b"II*\0 and more")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fill(elsewhere, "c")
    (mixed / "c").symlink_to(elsewhere / "c")
    source = Folder(root=str(mixed)).source
    assert source.files and list(source.files) == list(find_images([mixed]))
    names = {name for name in source.names if "photo" in name or name.startswith("c")}
    assert names == {"b/photo.jfif", "b/photo", "b/photo.JPG.bak", "c/0.png"}
    assert source.remarks == [
        f"3 files are not in a format that can be read (1 no suffix, 1 .avif, 1 .nef), for example '{mixed}/b/notes'. "
        "They are left out."
    ]


def test_both_unicode_forms_are_one_class(tmp_path: Path) -> None:
    fill(tmp_path, "train/cafe\u0301", "train/tea", "test/caf\u00e9", "test/tea")
    data = Folder(root=str(tmp_path))
    assert data.classes() == ("caf\u00e9", "tea") and data.source.labels == [0, 1, 0, 1]


def test_a_class_that_is_too_small_to_split_is_named(tmp_path: Path) -> None:
    for name, count in (("cat", 12), ("dog", 1)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", Image.new("L", (8, 8), number + 20 * (name == "dog")))
    with pytest.raises(
        UprightError, match=r"too few images of 'dog' \(1\)\. Every class needs at least 7\. Add images"
    ):
        _ = Folder(root=str(tmp_path)).splits


def test_crops_from_larger_stored_images_keep_their_details(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    for number in range(16):
        stripes[0, 0] = number  # no two images are equal
        save(tmp_path / "ab"[number % 2] / f"{number}.png", Image.fromarray(stripes))
    contrast = {}
    for stored in (None, 128):
        crop = partial(RandomResizedCrop, scale=(1 / 16, 1 / 16), ratio=(1, 1))
        data = Folder(root=str(tmp_path), size=32, stored=stored, channels=1, augment=[crop], val_fraction=0.25)
        images = data.augment(data.samples("train")[:]).images
        contrast[stored] = resize(images, 32, 32, "stretch").std()
        assert data.samples("val")[:].images.shape[-2:] == (32, 32)
    # A crop of a quarter of the side has 32 pixels of the original: the stripes are there, or a mean grey.
    assert contrast[None] < 5 and contrast[128] > 70


@pytest.mark.parametrize("options", [{"stored": 16}, {"stored": 64, "resize": "none"}])
def test_stored_images_are_at_least_as_large_as_the_input(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="stored must be at least size, and needs a resize other than none; got stored"):
        Folder(root="anywhere", size=32, **options)
