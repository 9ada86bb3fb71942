"""`Pictures`: a folder of images without labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upright.data.pictures import Pictures
from upright.errors import UserError


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(str(path)) + number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def test_all_images_without_classes(tmp_path: Path) -> None:
    write(tmp_path, *(f"{year}/{number}.png" for year in ("2024", "2025", "loose/deep") for number in range(10)))
    (tmp_path / "notes.txt").write_text("no image")
    data = Pictures(root=str(tmp_path), val_fraction=0.2, test_fraction=0.2, size=8)
    assert data.spec.classes == () and data.spec.task == "orientation" and data.spec.resize == "crop"
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 18, "val": 6, "test": 6}
    assert data.manifest.counts["train"] == {"images": 18}
    assert any("1 files are not in a format" in remark for remark in data.remarks)
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape == (6, 3, 8, 8) and batch.labels.tolist() == [0] * 6


def test_folders_of_splits(tmp_path: Path) -> None:
    write(tmp_path, *(f"Train/a/{n}.png" for n in range(8)), *(f"testing/{n}.png" for n in range(4)), "c/x.png")
    data = Pictures(root=str(tmp_path), val_fraction=0.25)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 6, "val": 2, "test": 4}
    # One folder with the name of a split is a folder like others.
    write(tmp_path / "one", *(f"train/{n}.png" for n in range(8)), "other/9.png")
    assert sum(map(len, Pictures(root=str(tmp_path / "one"), val_fraction=0.25).splits.values())) == 9


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing' does not exist; `root` \(--data.root\) is the folder"):
        Pictures(root=str(tmp_path / "missing")).setup()
    with pytest.raises(UserError, match="holds no image"):
        Pictures(root=str(tmp_path)).setup()
