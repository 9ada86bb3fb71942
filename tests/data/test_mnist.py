import struct
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_idx
from upright.data import mnist
from upright.data.mnist import FILES, MNIST, read_idx
from upright.errors import UprightError


@pytest.fixture
def root(small_mnist: Path, tmp_path: Path) -> Path:
    """An own copy of the small MNIST, two files packed and two not."""
    for name in FILES:
        array = read_idx(small_mnist / f"mnist/{name}.gz")
        write_idx(tmp_path / (name if "labels" in name else f"{name}.gz"), array)
    return tmp_path


def test_the_four_files_are_read_as_published(root: Path) -> None:
    data = MNIST(root=str(root), val_fraction=0.2)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 320, "val": 80, "test": 100}
    pixels, labels = (read_idx(next(root.glob(f"t10k-{kind}*"))) for kind in ("images", "labels"))
    samples = data.samples("test")[:]
    assert (samples.images[:, 0].numpy() == pixels).all() and (samples.labels.numpy() == labels).all()
    assert next(data.names("test")) == "test-00000" and set(data.names("val")) <= {f"train-{i:05d}" for i in range(400)}


def test_without_a_root_they_come_from_the_users_cache(small_mnist: Path) -> None:
    data = MNIST()
    assert len(data.source.labels) == 500 and data.recipe["init_args"] == {}


@pytest.fixture
def mirror(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of packed files, whose checksums are the published ones."""
    served = root / "served"
    for name in FILES:
        array = read_idx(next(path for path in root.glob(f"{name}*")))
        write_idx(served / f"{name}.gz", array)
        monkeypatch.setitem(FILES, name, md5((served / f"{name}.gz").read_bytes()).hexdigest())
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(mnist, "MIRROR", f"http://127.0.0.1:{server.server_port}")
        yield served
        server.shutdown()


def test_what_is_not_there_is_downloaded_once(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIGHT_DATA", str(tmp_path / "cache"))
    MNIST().prepare_data()
    assert {path.name for path in (tmp_path / "cache/mnist").iterdir()} == {f"{name}.gz" for name in FILES}
    for path in mirror.iterdir():
        path.unlink()
    assert len(MNIST().source.labels) == 500


def test_a_wrong_download_is_refused_and_not_kept(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPRIGHT_DATA", str(tmp_path / "cache"))
    file = mirror / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(
        UprightError, match=r"cannot be downloaded \(.*does not match.*Put the four IDX files into '.*mnist"
    ):
        MNIST().prepare_data()
    assert not (tmp_path / "cache/mnist" / file.name).exists()


def test_no_network_says_where_to_put_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(mnist, "MIRROR", "http://127.0.0.1:9")
    with pytest.raises(UprightError, match=rf"Put the four IDX files into '{tmp_path}/mnist', or say with --data.root"):
        MNIST().prepare_data()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not an IDX file"),
        (b"\x89PNG and so on", "is not an IDX file"),
        (struct.pack(">HBB2I", 0, 13, 2, 1, 1) + b"\0" * 4, "is not an IDX file of unsigned bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"\0" * 7, r"says that it holds \(2, 2, 2\) bytes, and holds 7"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"\0" * 9, "and holds 9: it is not whole"),
        (struct.pack(">HBB", 0, 8, 200), "is not an IDX file"),
    ],
)
def test_foreign_and_cut_off_files_are_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UprightError, match=text):
        read_idx(tmp_path / "x")


def test_a_cut_off_archive_is_refused(root: Path) -> None:
    path = root / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UprightError, match=r"t10k-images-idx3-ubyte.gz' cannot be read"):
        _ = MNIST(root=str(root)).source


@pytest.mark.parametrize("labels", [np.zeros(99, np.uint8), np.full(100, 10, np.uint8), np.zeros((100, 1), np.uint8)])
def test_labels_that_do_not_fit_are_refused(root: Path, labels: np.ndarray) -> None:
    write_idx(root / "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(UprightError, match=r"The t10k files do not fit together: .* got \(100, 28, 28\) and"):
        _ = MNIST(root=str(root)).source


def test_a_folder_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UprightError, match=r"holds neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"):
        _ = MNIST(root=str(tmp_path)).source
