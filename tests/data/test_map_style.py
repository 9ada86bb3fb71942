"""Map-style datasets, as torchvision's: PIL images, ``targets`` and ``classes``."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upright.data import cache
from upright.data.map_style import MapStyle
from upright.errors import UprightError


class Stripes:
    """Images of different sizes. ``kind`` is what an item holds."""

    def __init__(self, *, count: int = 40, seed: int = 0, kind: str = "pil", classes: bool = True) -> None:
        self.seed, self.kind = seed, kind
        self.targets = [number % 2 for number in range(count)]
        if classes:
            self.classes = ["across", "down"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        shape = (10 + index % 3, 12, 3)
        pixels = np.random.default_rng(self.seed + index).integers(0, 256, shape, dtype=np.uint8)
        kinds = {
            "pil": Image.fromarray,
            "array": lambda pixels: pixels,
            "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
            "float": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
            "broken": lambda pixels: pixels[len(pixels)],
        }
        return kinds[self.kind](pixels), self.targets[index]


class WithoutTargets(Stripes):
    """A dataset whose attribute disagrees with its items."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        image, label = super().__getitem__(index)
        return image, 1 - label


PATH = f"{__name__}.Stripes"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))


def test_images_labels_classes_and_splits() -> None:
    data = MapStyle(
        train={"class_path": PATH}, test={"class_path": PATH, "init_args": {"count": 8, "seed": 99}}, size=8
    )
    source = data.source
    assert data.classes() == ("across", "down") and source.labels == [0, 1] * 24
    assert source.splits == {"train": [*range(40)], "test": [*range(40, 48)]} and source.names[40] == "test/000000"
    assert np.array_equal(source.images[41], Stripes(seed=99)[1][0])
    same = MapStyle(**data.recipe["init_args"])
    assert same.manifest.digest == data.manifest.digest
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 34, "val": 6, "test": 8}


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_every_kind_of_item_is_the_same_image(kind: str) -> None:
    one, other = (MapStyle(train=partial(Stripes, kind=each)).source.images for each in ("pil", kind))
    assert np.array_equal(one[3], other[3])


def test_items_decide_their_labels_and_classes_may_be_numbers() -> None:
    data = MapStyle(train=partial(WithoutTargets, classes=False))
    assert data.source.labels == [1, 0] * 20 and data.classes() == ("0", "1")


def test_every_cache_gives_the_same_batches(tmp_path: Path) -> None:
    data = {s: MapStyle(train=partial(Stripes), size=8, cache=s, num_workers=0) for s in ("memory", "disk", "none")}
    batches = {storage: each.samples("train")[:].images for storage, each in data.items()}
    assert torch.equal(batches["memory"], batches["disk"]) and torch.equal(batches["memory"], batches["none"])
    assert isinstance(data["none"].images.pixels, cache.Decoder) and isinstance(
        data["disk"].images.pixels, cache.PixelFile
    )
    changed = MapStyle(train=partial(Stripes, seed=7), size=8, cache="disk", num_workers=0)
    assert not torch.equal(changed.samples("train")[:].images, batches["disk"])


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ({"class_path": f"{__name__}.Strips"}, "has no class 'Strips'. Did you mean 'Stripes'?"),
        (
            {"class_path": PATH, "init_args": {"size": 3}},
            "cannot be built: TypeError: .*unexpected keyword argument 'size'",
        ),
        ({"class_path": PATH, "init_args": {"count": 0}}, "Stripes has no images"),
        ({"class_path": "builtins.object"}, "builtins.object has no __len__ and no __getitem__"),
        ({"root": "x"}, "train needs class_path and init_args of a dataset"),
        (partial(Stripes, kind="broken"), "must return .image, label. with a whole number as label: IndexError"),
        (
            partial(Stripes, kind="float"),
            "'train/000000': a tensor must be uint8, got torch.float32. Leave out `transform`",
        ),
    ],
)
def test_mistakes_are_named(train: object, text: str) -> None:
    with pytest.raises(UprightError, match=text):
        _ = MapStyle(train=train).source
