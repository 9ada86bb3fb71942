"""Parquet files in the Hub's layout, and a dataset of a Hub that a local server plays."""

import hashlib
import http.server
import io
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from upright.data import cache
from upright.data.hub import Hub
from upright.errors import UprightError

COUNT = 24
NAMES = ["cat", "dog"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, first: int, count: int, *, names: bool = True, **columns: list[object]) -> Path:
    """Write a file as `datasets` does: structs with bytes, class numbers, and their names in the metadata."""
    numbers = range(first, first + count)
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    table = pyarrow.table({"image": images, "label": [number % 2 for number in numbers]} | columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write(tmp_path / "pets/data/train-00000-of-00002.parquet", 0, COUNT // 2)
    write(tmp_path / "pets/data/train-00001-of-00002-0123456789abcdef.parquet", COUNT // 2, COUNT // 2)
    write(tmp_path / "pets/data/validation-00000-of-00001.parquet", 100, 4)
    write(tmp_path / "pets/data/unsupervised-00000-of-00001.parquet", 200, 4)
    write(tmp_path / "pets/data/test-00000-of-00001.parquet", 300, 4, label=[-1] * 4)
    return tmp_path / "pets"


def test_splits_classes_and_images_of_the_layout_of_the_hub(pets: Path) -> None:
    data = Hub(name=str(pets), size=10)
    assert data.spec.classes == ("cat", "dog") and data.recipe["init_args"]["name"] == str(pets)
    source = data.source
    assert source.splits == {"train": [*range(COUNT)], "val": [*range(COUNT, COUNT + 4)]}
    assert source.labels == [0, 1] * (COUNT // 2 + 2) and source.names[COUNT - 1 : COUNT + 1] == [
        "train/000023",
        "val/000000",
    ]
    for index in (0, COUNT - 1, COUNT + 3):
        number = index if index < COUNT else 100 + index - COUNT
        assert np.array_equal(source.images[index], Image.open(io.BytesIO(encoded(number))))
    assert list(source.remarks) == [
        f"Splits unsupervised of '{pets}' are left out.",
        "Splits without labels are left out: test.",
    ]
    assert len(data.splits["test"]) > 0  # a part of the training images


@pytest.mark.parametrize("names", ["train/0000", "partial-train/0000", "train", "Train-00000-of-00001"])
def test_other_layouts(tmp_path: Path, names: str) -> None:
    write(tmp_path / f"x/one/{names}.parquet", 0, 20)
    write(tmp_path / f"x/two/{names}.parquet", 0, 20)
    with pytest.raises(UprightError, match=r"has several subsets: one, two\. Give one as subset"):
        _ = Hub(name=str(tmp_path / "x")).spec
    with pytest.raises(UprightError, match=r"no subset 'on', only one, two\. Did you mean 'one'\?"):
        _ = Hub(name=str(tmp_path / "x"), subset="on").spec
    assert Hub(name=str(tmp_path / "x"), subset="one").source.splits == {"train": [*range(20)]}


def test_a_file_without_names_and_with_text_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "own.parquet", 0, 20, names=False, label=["tea", "cafe\u0301"] * 10)
    data = Hub(name=str(file), val_fraction=0.2)
    assert data.classes() == ("caf\u00e9", "tea") and data.source.splits is None and data.source.labels[:2] == [1, 0]


def test_every_cache_gives_the_same_batches_and_none_keeps_no_pixels(pets: Path, own_cache: Path) -> None:
    data = {
        storage: Hub(name=str(pets), size=8, cache=storage, num_workers=0) for storage in ("memory", "disk", "none")
    }
    batches = {storage: each.samples("train")[:].images for storage, each in data.items()}
    assert torch.equal(batches["memory"], batches["disk"]) and torch.equal(batches["memory"], batches["none"])
    assert isinstance(data["none"].images.pixels, cache.Decoder) and isinstance(
        data["disk"].images.pixels, cache.PixelFile
    )
    assert len(list(own_cache.glob("parquet-[0-9a-f]*"))) == 1
    again = pickle.loads(pickle.dumps(data["none"].source.images))
    assert (again[5] == data["none"].source.images[5]).all() and len(pickle.dumps(again)) < 3000


def test_changed_files_are_read_again(pets: Path) -> None:
    before = Hub(name=str(pets), cache="disk").manifest.digest
    write(pets / "data/train-00000-of-00002.parquet", 50, COUNT // 2)
    assert Hub(name=str(pets), cache="disk").manifest.digest != before


def test_mistakes_are_named(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str, path: Path, **options: str) -> None:
        with pytest.raises(UprightError, match=text):
            _ = Hub(name=str(path), **options).source

    refused(
        r"no/where/at/all' does not exist, and is not a name of the Hub such as owner/dataset", Path("no/where/at/all")
    )
    refused(r"revision 'main': '.*/pets' is a local path; only the Hub has revisions", pets, revision="main")
    refused(r"has no column 'img'; its columns are image, label\. Give one as image", pets, image="img")
    two = write(tmp_path / "two.parquet", 0, 20, names=False, fine=list(range(20)))
    refused(r"has 2 columns of labels; its columns are image, label, fine\. Give one as label", two)
    broken = write(tmp_path / "broken.parquet", 0, 4, label=[0, 1, -1, 1])
    refused(r"Row 2 of split '' of .* has no label, nor have 0 more", broken)
    missing = write(tmp_path / "missing.parquet", 0, 2, image=[{"bytes": encoded(0)}, {"bytes": None}])
    refused(r"Row 1 of '.*missing.parquet' has no bytes of an image in column 'image'", missing)
    (tmp_path / "empty").mkdir()
    refused(r"empty' has no Parquet files\. .* revision refs/convert/parquet", tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("hello")
    refused(r"text.parquet' cannot be read as Parquet", tmp_path / "text.parquet")
    bad = write(tmp_path / "bad.parquet", 0, 20, image=[{"bytes": b"hello"}] * 20)
    with pytest.raises(UprightError, match=r"'row/000000': The image is in none of the formats"):
        _ = Hub(name=str(bad)).images
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"the Hub needs the package 'huggingface_hub': pip install 'upright\[hub\]'", Path("owner/pets"))


@pytest.fixture
def hub(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """Serve the folder as the dataset owner/pets of a Hub."""
    pytest.importorskip("huggingface_hub", reason="no huggingface_hub: pip install 'upright[hub]'")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = {file.relative_to(pets).as_posix(): file for file in pets.rglob("*.parquet")}
            if path.startswith("/api/datasets/owner/pets"):
                names = [{"rfilename": name} for name in ("README.md", *files)]
                content = json.dumps({"id": "owner/pets", "sha": COMMIT, "siblings": names}).encode()
            elif (name := path.removeprefix(f"/datasets/owner/pets/resolve/{COMMIT}/")) in files:
                content = files[name].read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def read_in_a_new_process(**options: object) -> str:
    """Return commit and digest, or the error. The library reads its environment when it is imported."""
    code = f"""
from upright.data.hub import Hub
from upright.errors import UserError
try:
    data = Hub(**{options!r})
    print(data.recipe["init_args"]["revision"], data.manifest.digest)
except UserError as error:
    print(error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow  # four processes that import torch
def test_a_dataset_of_the_hub_records_its_commit_and_then_needs_no_network(
    hub: http.server.HTTPServer, pets: Path
) -> None:
    expected = f"{COMMIT} {Hub(name=str(pets), size=10).manifest.digest}"
    assert read_in_a_new_process(name="owner/pets", size=10) == expected
    unknown = read_in_a_new_process(name="owner/dogs")
    assert unknown.startswith("Dataset 'owner/dogs' cannot be read from the Hub: ") and "\n" not in unknown
    hub.shutdown()
    hub.server_close()
    assert read_in_a_new_process(name="owner/pets", size=10, revision=COMMIT) == expected
    assert "or give a local folder of its Parquet files." in read_in_a_new_process(name="owner/pets")
