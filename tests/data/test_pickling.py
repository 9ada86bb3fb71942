"""The parts of a datamodule can be pickled for spawned processes."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upright.data.cache import PixelFile
from upright.data.cifar import CIFAR10
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.distorted_mnist import DistortedMNIST
from upright.data.emnist import EMNIST
from upright.data.folder import Folder
from upright.data.table import Table

SIDE = 64


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write forty images of noise in two classes, and a table of them."""
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    lines = ["path,label"]
    for number in range(40):
        file = tmp_path / f"images/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
        lines.append(f"{file},{number % 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return tmp_path


MODULES: dict[str, Callable[[Path], ImageDataModule]] = {
    "digits": lambda _: Digits(angles=(-30, 0, 30)),
    "emnist": lambda _: EMNIST(),
    "cifar10": lambda _: CIFAR10(),
    "distorted": lambda _: DistortedMNIST(task="TC", draws=2),
    "spline": lambda _: DistortedMNIST(task="E"),
    "folder": lambda root: Folder(root=str(root / "images"), size=SIDE, cache="memory"),
    "folder on disk": lambda root: Folder(root=str(root / "images"), size=SIDE, cache="disk", angles=(0, 90)),
    "table, streamed": lambda root: Table(file=str(root / "table.csv"), size=SIDE, cache="none", num_workers=0),
}


@pytest.mark.parametrize("name", MODULES)
def test_source_cache_views_and_loaders_survive_pickling(name: str, images: Path) -> None:
    data = MODULES[name](images)
    loaders = [data.loader("train", shuffle=True), data.loader("test")]
    parts = (data.source, data.images, data.views("test"), data.manifest, loaders)
    source, cache, views, manifest, again = pickle.loads(pickle.dumps(parts))
    assert (source.images[3] == data.source.images[3]).all() and source.names == data.source.names
    assert (cache.facts == data.images.facts).all() and type(cache.pixels) is type(data.images.pixels)
    assert views.names == data.views("test").names and manifest.digest == data.manifest.digest
    for one, other in zip(loaders, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))
            assert a.seed == b.seed


def test_a_pickled_loader_has_its_position() -> None:
    loader = Digits().loader("train", shuffle=True)
    iterator = iter(loader)
    next(iterator)
    loader = pickle.loads(pickle.dumps(loader))
    assert loader.state_dict() == {"epoch": 0, "position": 1}


def test_a_mapped_file_pickles_as_its_path(images: Path) -> None:
    data = MODULES["folder on disk"](images)
    cache = data.images
    assert isinstance(cache.pixels, PixelFile) and cache.pixels.pixels.nbytes == 40 * 3 * SIDE**2
    content = pickle.dumps(cache)
    assert len(content) < 20_000 and b"cache" in content
    again = pickle.loads(content).pixels
    assert isinstance(again.pixels, np.memmap)
    positions = np.arange(40)
    assert torch.equal(again.take(positions, 0 * positions), cache.pixels.take(positions, 0 * positions))
