"""Contracts of every dataset, and the content of each one."""

import pickle
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from tests.conftest import ROOT
from upright.data.augmentation import RandomAffine
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.folder import Folder
from upright.data.source import Source
from upright.errors import UprightError
from upright.images import ImageSpec
from upright.recipes import build
from upright.warp import rotation_angle, transform_points

DATA = sorted(ROOT.glob("configs/data/*.yaml"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small photographs of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, base in (("dark", 40), ("light", 180)):
        (root / name).mkdir()
        for number in range(20):
            size = generator.integers(20, 60, 2)
            pixels = generator.integers(0, 40, (*size, 3), dtype=np.uint8) + np.uint8(base)
            Image.fromarray(pixels).save(root / name / f"é {number:02d}.png")
    lines = [f"{file.relative_to(root)},{file.parent.name}" for file in sorted(root.glob("*/*"))]
    (root / "table.csv").write_text("\n".join(["path,label", *lines]), encoding="utf-8")
    files = sorted(root.glob("*/*.png"))
    columns = {"image": [{"bytes": file.read_bytes()} for file in files], "label": [file.parent.name for file in files]}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "data.parquet")
    return root


@pytest.fixture(params=DATA, ids=lambda path: path.stem)
def data(request: pytest.FixtureRequest, photos: Path) -> ImageDataModule:
    recipe = yaml.safe_load(request.param.read_text())
    ours = {"root": ("my-images", photos), "file": ("my-images.csv", photos / "table.csv")}
    ours["name"] = ("my-parquet", photos / "data.parquet")
    for name, (theirs, here) in ours.items():
        if recipe["init_args"].get(name) == theirs:
            recipe["init_args"][name] = str(here)
    module = build(recipe)()
    assert isinstance(module, ImageDataModule)
    return module


def test_batches_have_the_shape_of_the_spec(data: ImageDataModule) -> None:
    channels, *size = data.spec.input_shape
    for split, wanted in (("train", data.stored_size), ("val", size), ("test", size)):
        batch = next(iter(data.loader(split)))
        count = len(batch.labels)
        assert batch.images.shape == (count, channels, *wanted) and batch.images.dtype == torch.uint8
        trained_on = data.augmentation(batch.images).images
        assert split != "train" or trained_on.shape == (count, channels, *size)
        assert batch.labels.max() < len(data.spec.classes)
        assert batch.transforms.shape == (count, 3, 3)


def test_the_spec_is_declared_before_anything_is_read(data: ImageDataModule) -> None:
    assert data.spec == data.spec
    assert "source" not in vars(data)


def test_originals_are_in_the_order_of_the_loader(data: ImageDataModule) -> None:
    samples, originals = data.samples("test")[:], list(data.originals("test"))
    assert [original.label for original in originals] == samples.labels.tolist()
    assert len({original.name for original in originals}) == len(originals)
    assert all(original.pixels.dtype == np.uint8 for original in originals)


def test_the_same_arguments_give_the_same_split(data: ImageDataModule) -> None:
    again = build(data.recipe)()
    assert again.manifest.digest == data.manifest.digest
    assert again.recipe == data.recipe


def test_views_show_known_angles_of_the_same_image() -> None:
    data = Digits(size=20, angles=(-90, 0, 90))
    samples = data.samples("val")[:]
    assert (samples.group[:6].tolist(), samples.position[:6].tolist()) == ([0, 0, 0, 1, 1, 1], list(range(6)))
    clockwise, upright, anticlockwise = samples.images[:3]
    assert torch.equal(clockwise, torch.rot90(upright, -1, (1, 2)))
    assert torch.equal(anticlockwise, torch.rot90(upright, 1, (1, 2)))
    points = torch.rand(5, 2)
    degrees = rotation_angle(transform_points(samples.transforms[:3], points), points).rad2deg()
    torch.testing.assert_close(degrees, torch.tensor([-90.0, 0.0, 90.0]), atol=1e-3, rtol=0)
    assert len(data.samples("train")) == len(data.splits["train"])


def test_views_of_an_image_are_never_in_two_splits() -> None:
    data = Digits(angles=(-30, 30))
    stems = [{original.name.split("_")[0] for original in data.originals(split)} for split in ("train", "val", "test")]
    assert not stems[0] & stems[1] and not stems[0] & stems[2] and not stems[1] & stems[2]


@pytest.mark.parametrize(("size", "margin"), [(28, 4), (16, 0), (8, 0), (60, 10)])
def test_all_digits_are_read(size: int, margin: int) -> None:
    data = Digits(size=size, margin=margin)
    assert sum(len(part) for part in data.splits.values()) == 1797
    pixels = data.samples("train")[:].images.float() / 255
    assert abs(pixels.mean() - data.spec.mean[0]) < 0.01
    # Enlarging smooths the image, and the deviation is declared for 28 pixels.
    assert abs(pixels.std() - data.spec.std[0]) < 0.06
    frame = torch.cat([pixels[..., :margin].flatten(), pixels[..., size - margin :].flatten()])
    assert frame.sum() == 0


def test_folder_reads_any_sizes_and_names(photos: Path) -> None:
    data = Folder(root=str(photos), size=16)
    assert data.spec.classes == ("dark", "light")
    samples = data.samples("val")[:]
    assert samples.images.shape[1:] == (3, 16, 16)
    assert ((samples.images.float().mean(dim=(1, 2, 3)) > 128).long() == samples.labels).all()
    assert {original.pixels.shape[2] for original in data.originals("val")} == {3}
    assert len({original.pixels.shape for original in data.originals("val")}) > 1


def test_without_resizing_a_batch_has_one_size(photos: Path) -> None:
    with pytest.raises(UprightError, match=r"must have one size, 16x16; one has \d+x\d+. Use stretch, crop or pad"):
        Folder(root=str(photos), size=16, resize="none").samples("val")
    data = Folder(root=str(photos), size=16, resize="none")
    assert data.spec.resize == "none" and ImageSpec.from_dict(data.spec.to_dict()) == data.spec


def test_the_split_folders_are_used(photos: Path, tmp_path: Path) -> None:
    for split, source in (("train", photos), ("test", photos)):
        for name in ("dark", "light"):
            target = tmp_path / split / name
            target.mkdir(parents=True)
            for number, file in enumerate(sorted((source / name).iterdir())):
                if (number < 5) == (split == "test"):
                    (target / file.name).write_bytes(file.read_bytes())
    data = Folder(root=str(tmp_path), val_fraction=0.2)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 24, "val": 6, "test": 10}
    assert all(original.name.startswith("test/") for original in data.originals("test"))
    assert all(original.name.startswith("train/") for original in data.originals("val"))


def test_a_folders_root_is_recorded_absolute(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    assert Folder(root=photos.name).recipe["init_args"]["root"] == str(photos)


def test_folder_refuses(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UprightError, match=r"nope' does not exist; `root` .--data.root. is the folder"):
        _ = Folder(root=str(tmp_path / "nope")).spec
    (tmp_path / "only").mkdir()
    with pytest.raises(UprightError, match=r"at least two folders, one per class; found 1"):
        _ = Folder(root=str(tmp_path)).spec
    (tmp_path / "other").mkdir()
    with pytest.raises(UprightError, match=r"No image in class \['only', 'other'\]"):
        _ = Folder(root=str(tmp_path)).source
    (tmp_path / "test" / "third").mkdir(parents=True)
    with pytest.raises(UprightError, match=r"has \['test'\] but no 'train'"):
        _ = Folder(root=str(tmp_path)).spec


def test_a_class_without_training_images_is_refused(photos: Path, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(UprightError, match=r"test/c': label 'c' of split 'test' is not among the training labels"):
        _ = Folder(root=str(tmp_path)).source


def test_an_unreadable_image_is_named(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "3.png").write_text("not an image")
    with pytest.raises(UprightError, match=r"a/3.png' is in none of the formats"):
        _ = Folder(root=str(tmp_path)).manifest


class Stripes(ImageDataModule):
    """The example of the README: a dataset in one file."""

    def __init__(self, *, width: int = 16, **options: object) -> None:
        super().__init__(**options)
        self.width = width

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(1, 16, self.width, ("across", "down"), (0.5,), (0.5,))

    def read(self) -> Source:
        images = np.zeros((40, 16, self.width, 1), np.uint8)
        images[::2, ::2] = images[1::2, :, ::2] = 200
        images[:, 0, 0, 0] = range(40)
        return Source(images, [0, 1] * 20, [f"stripes-{i}" for i in range(40)])


def test_a_dataset_of_the_users_own() -> None:
    data = Stripes(width=20, batch_size=4, augment=[partial(RandomAffine, rotate=5), nn.Identity])
    assert next(iter(data.train_dataloader())).images.shape == (4, 1, 16, 20)
    assert len(data.augmentation.parts) == 2
    assert data.recipe["init_args"]["width"] == 20
    assert build(data.recipe)().manifest.digest == data.manifest.digest


def test_every_dataset_has_the_option_mask(data: ImageDataModule) -> None:
    assert data.spec.mask == "none"
    masked = build(data.recipe)(mask="disc")
    assert masked.spec == replace(data.spec, mask="disc") and build(masked.recipe)().spec == masked.spec


class Constant(Stripes):
    """Declares its spec as a constant."""

    spec = ImageSpec(1, 16, 16, ("across", "down"), (0.5,), (0.5,))


class Cached(Stripes):
    """Declares its spec as a cached property, from the one of its base, with an attribute of its own."""

    mask = "an attribute that is not ours"

    @cached_property
    def spec(self) -> ImageSpec:
        return replace(super().spec, mean=(0.25,))


class AlwaysMasked(Stripes):
    """Declares a mask of its own."""

    @property
    def spec(self) -> ImageSpec:
        """The docstring stays."""
        return replace(super().spec, mask="disc")


@pytest.mark.parametrize("dataset", [Stripes, Constant, Cached])
def test_a_dataset_of_the_users_own_has_the_option_mask(dataset: type[Stripes]) -> None:
    assert dataset().spec.mask == "none" and dataset(mask="disc").spec == replace(dataset().spec, mask="disc")
    assert pickle.loads(pickle.dumps(dataset(mask="disc"))).spec.mask == "disc"
    with pytest.raises(UprightError, match="mask must be one of none, disc; got 'ring'"):
        _ = dataset(mask="ring").spec


def test_the_option_keeps_a_mask_that_the_dataset_declares() -> None:
    assert AlwaysMasked().spec.mask == "disc" and AlwaysMasked.spec.__doc__ == "The docstring stays."


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"angles": []}, r"\[0\] shows every image as it is"),
        ({"size": 15}, "at least 8, got size 15 and margin 4"),
        ({"augment": [lambda: nn.Identity()]}, "cannot be written into a checkpoint"),
    ],
)
def test_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        Digits(**options)


class Declared(Stripes):
    """Defines some of its splits."""

    declared: dict[str, list[int]]

    def read(self) -> Source:
        source = super().read()
        return Source(source.images, source.labels, source.names, self.declared)


@pytest.mark.parametrize(
    "declared", [{"test": range(20, 40)}, {"val": range(10)}, {"test": range(8), "val": range(30, 40)}]
)
def test_declared_splits_are_used_and_the_rest_is_split(declared: dict[str, range]) -> None:
    data = Declared()
    data.declared = {name: list(part) for name, part in declared.items()}
    assert sorted(np.concatenate(list(data.splits.values()))) == list(range(40))
    for name, part in declared.items():
        assert data.splits[name].tolist() == list(part)


def test_an_image_in_two_declared_splits_is_refused() -> None:
    data = Declared()
    data.declared = {"val": [1, 2], "test": [2, 3]}
    with pytest.raises(UprightError, match="more than one split"):
        _ = data.splits


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_the_transform_of_an_oblong_original_reproduces_its_view(tmp_path: Path, resize: str) -> None:
    from upright.warp import warp

    blob = np.zeros((64, 128), np.uint8)
    blob[24:40, 50:90] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.fromarray(np.roll(blob, number, axis=1)).save(tmp_path / name / f"{number}.png")
    data = Folder(root=str(tmp_path), size=64, channels=1, resize=resize, angles=(0, 60))
    samples = data.samples("test")[:]
    plain, rotated = samples.images[0::2].float(), samples.images[1::2].float()
    assert (warp(plain, samples.transforms[1::2]) - rotated).abs().mean() < 2
    assert (warp(plain, samples.transforms[0::2]) - rotated).abs().mean() > 8


@pytest.mark.parametrize(("split", "missing"), [("val", "a"), ("test", "b"), ("train", "b")])
def test_a_class_without_images_in_a_split_is_refused(tmp_path: Path, split: str, missing: str) -> None:
    for folder in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / folder / name).mkdir(parents=True)
            if (folder, name) != (split, missing):
                Image.new("L", (8, 8)).save(tmp_path / folder / name / "x.png")
    with pytest.raises(UprightError, match=rf"No image in class \['{missing}'\] of '.*{split}'"):
        _ = Folder(root=str(tmp_path)).source


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "._x.png").write_text("a Mac was here")
    data = Folder(root=str(tmp_path))
    assert data.spec.classes == ("a", "b") and list(data.source.names) == ["a/x.png", "b/x.png"]
