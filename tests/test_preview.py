from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.preview import _of_many_classes, draw

DATA = sorted(path for path in ROOT.glob("configs/data/*.yaml") if path.stem not in ("folder", "table", "hub"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three classes with 12 grey images each, in two sizes."""
    for label, name in enumerate(("dark", "grey", "a class with a very long name indeed")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            size = (20, 10) if number % 2 else (30, 40)
            Image.new("L", size, (label + 1) * 20 + number).save(tmp_path / "pictures" / name / f"{number:02d}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_data_yaml_has_a_preview(path: Path, upright: Upright) -> None:
    answer = upright("preview", path)
    assert answer.code == 0, answer.err
    with Image.open("preview.png") as image:
        assert image.width > 800 and image.height > 500
    lines = answer.out.splitlines()
    assert lines[0].split() == ["class", "train", "val", "test"] and lines[-1] == "Plot: preview.png"


def test_the_table_matches_the_data(pictures: Path, upright: Upright) -> None:
    answer = upright("preview", ROOT / "configs/data/folder.yaml", "--root", pictures, "--output", "own.png")
    assert answer.code == 0, answer.err
    table = {line[:24].strip(): line[24:].split() for line in answer.out.splitlines()}
    assert table["dark"] == ["8", "2", "2"] and table["all"] == ["24", "5", "7"]
    assert "a class with a very lo…" in table
    assert (
        "Image size: 10x20 to 40x30 (median height and width: 25x25). Network input: 3 x 32 x 32 (crop)." in answer.out
    )
    pixels = [np.array(Image.open(path)).mean() for path in pictures.glob("*/*.png")]
    measured = float(answer.out.split("measured  mean [")[1].split(",")[0])
    assert abs(measured - np.mean(pixels) / 255) < 0.02
    assert "declared  mean [0.5000, 0.5000, 0.5000]  std [0.2500, 0.2500, 0.2500]" in answer.out
    assert Path("own.png").is_file() and not Path("preview.png").exists()


def test_duplicates_and_unreadable_images_are_reported(pictures: Path, upright: Upright, tmp_path: Path) -> None:
    (pictures / "dark/00.png").write_bytes(b"")
    (pictures / "grey/copy.png").write_bytes((pictures / "dark/01.png").read_bytes())
    recipe = yaml.safe_load((ROOT / "configs/data/folder.yaml").read_text())
    recipe["init_args"] |= {"root": str(pictures), "max_unreadable": 1}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    answer = upright("preview", "own.yaml")
    assert answer.code == 0, answer.err
    assert (
        "Note: 1 images have a duplicate in another class, for example 'dark/01.png' (dark) and 'grey/copy.png'"
        in answer.out
    )
    assert "Note: 1 of 37 images cannot be read and are left out, for example 'dark/00.png'." in answer.out
    assert upright("preview", ROOT / "configs/data/folder.yaml", "--root", pictures).code == 2


def test_a_config_a_run_and_a_checkpoint_give_the_same_preview(run_folder: Path, upright: Upright) -> None:
    from_config = upright("preview", run_folder / "config.yaml").out
    assert from_config == upright("preview", run_folder).out == upright("preview", run_folder / "last.ckpt").out
    assert "views per image" in from_config


def test_the_images_behind_a_mask_are_drawn_as_the_network_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners: dict[str, set[int]] = {}

    def record(title: str, images: list, captions: list, columns: int) -> Image.Image:
        for image, (line, _) in zip(images, captions, strict=True):
            corners.setdefault(line.text, set()).add(int(image[0, 0, 0]))
        return Image.new("L", (1, 1))

    monkeypatch.setattr("upright.preview.draw_tiles", record)
    data = Digits(mask="disc", augment=[partial(RandomAffine, rotate=60)])
    draw(data, tmp_path / "preview.png")
    mean = round(255 * data.spec.mean[0])
    assert mean > 0 and corners == {
        **{split: {0} for split in ("train", "val", "test")},
        **{f"augmented {number}": {mean} for number in (1, 2, 3)},
        "input": {mean},
    }


def test_the_seed_changes_the_augmented_images(upright: Upright) -> None:
    def png(*options: object) -> bytes:
        assert upright("preview", ROOT / "configs/data/digits.yaml", *options).code == 0
        return Path("preview.png").read_bytes()

    assert png() == png("--seed", 0) != png("--seed", 1)


def test_columns_show_as_many_classes_as_possible() -> None:
    data = Digits()
    labels = torch.tensor(data.source.labels)[data.splits["val"]]
    chosen = _of_many_classes(data, "val", 13)
    assert labels[chosen].tolist() == [*range(10), 0, 1, 2] and len(set(chosen)) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.yaml"], "'nope.yaml' does not exist. Give a YAML like configs/data/digits.yaml"),
        ([ROOT / "pyproject.toml"], "is not a"),
        ([ROOT / "configs/data/digits.yaml", "--root", "x"], "unexpected keyword argument 'root'"),
        ([ROOT / "configs/data/folder.yaml", "--root", "nowhere"], "nowhere' does not exist"),
        ([ROOT / "configs/data/digits.yaml", "--output", "no/folder.png"], "there is no folder 'no'"),
    ],
)
def test_bad_input(arguments: list[object], message: str, upright: Upright) -> None:
    answer = upright("preview", *arguments)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert not Path("preview.png").exists()


BLOCK = """# Pets.
class_path: upright.data.folder.Folder
init_args:
  root: pictures  # twelve each
  std:
    - 0.5
  # The end.
  channels: 1
"""
FLOW = "class_path: upright.data.folder.Folder\ninit_args: {root: pictures, channels: 1, mean: [0.1]} # flow\n"


@pytest.mark.parametrize(("text", "comments"), [(BLOCK, 3), (FLOW, 1)])
@pytest.mark.parametrize("inline", [False, True])
def test_statistics_are_written_into_the_yaml_beside_its_comments(
    pictures: Path, upright: Upright, text: str, comments: int, inline: bool
) -> None:
    if inline:
        model = "model: {network: {class_path: upright.architectures.lenet.LeNet}}\ndata:\n"
        text = model + "".join(f"  {line}\n" for line in text.splitlines())
    Path("own.yaml").write_text(text)
    before = yaml.safe_load(text)
    answer = upright("preview", "own.yaml", "--write-statistics")
    assert answer.code == 0 and answer.out.endswith("Statistics: mean and std in 'own.yaml'\n"), answer.err
    after = yaml.safe_load(Path("own.yaml").read_text())
    measured = yaml.safe_load(answer.out.split("measured  mean ")[1].split("  std")[0])
    for content in (before, after):
        arguments = (content["data"] if inline else content)["init_args"]
        if content is after:
            assert arguments["mean"] == measured and 0 < arguments["std"][0] < 0.5
        arguments.pop("mean", None), arguments.pop("std", None)
    assert before == after and Path("own.yaml").read_text().count("#") == comments
    again = upright("preview", "own.yaml", "--write-statistics")
    assert f"declared  mean [{measured[0]:.4f}]" in again.out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ROOT / "configs/data/digits.yaml", "--write-statistics: Digits has no options mean and std."),
        ("own.yaml", "'own.yaml' names a file as its data: give 'data.yaml'."),
    ],
)
def test_statistics_have_no_place(pictures: Path, upright: Upright, source: Path | str, message: str) -> None:
    Path("data.yaml").write_text(BLOCK)
    Path("own.yaml").write_text("model: {network: {class_path: upright.architectures.lenet.LeNet}}\ndata: data.yaml\n")
    answer = upright("preview", source, "--write-statistics")
    assert answer.code == 2 and answer.err == f"upright: error: {message}\n"
    assert Path("data.yaml").read_text() == BLOCK
