"""Downloads of every published dataset, from a local server."""

import threading
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from upright.data.cifar import CIFAR10, CIFAR100
from upright.data.download import download
from upright.data.emnist import EMNIST
from upright.data.mnist import KMNIST, MNIST, FashionMNIST
from upright.data.published import Published
from upright.errors import UprightError

PUBLISHED = [MNIST, FashionMNIST, KMNIST, EMNIST, CIFAR10, CIFAR100]


class Handler(SimpleHTTPRequestHandler):
    """Serve a folder; for a file called broken, send fewer bytes than declared."""

    def do_GET(self) -> None:
        if "broken" not in self.path:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 50)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder; yield it and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=PUBLISHED, ids=lambda published: published.__name__)
def published(
    request: pytest.FixtureRequest,
    served: tuple[Path, str],
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> type[Published]:
    """Return a dataset class whose published files are small, with an empty cache."""
    folder, address = served
    checksums = {}
    for name in request.param.checksums:
        content = (small_data / request.param.cached_as / name).read_bytes()
        (folder / name).write_bytes(content)
        checksums[name] = md5(content).hexdigest()
    monkeypatch.setattr(request.param, "checksums", checksums)
    monkeypatch.setattr(request.param, "address", address)
    monkeypatch.setenv("UPRIGHT_DATA", str(tmp_path / "cache"))
    return request.param


def test_missing_files_are_downloaded_once(published: type[Published], served: tuple[Path, str]) -> None:
    published().prepare_data()
    data = published()
    assert {path.name for path in data.folder.iterdir()} == set(published.checksums)
    for path in served[0].iterdir():
        path.unlink()
    data.prepare_data()
    assert {len(data.source.images), len(data.source.names)} == {len(data.source.labels)}


def test_a_wrong_download_is_refused_and_deleted(published: type[Published], served: tuple[Path, str]) -> None:
    *_, name = published.checksums
    with (served[0] / name).open("ab") as file:
        file.write(b"x")
    data = published()
    with pytest.raises(UprightError) as error:
        data.prepare_data()
    text = str(error.value)
    assert text.startswith(f"{served[1]}/{name} cannot be downloaded (MD5 hash of downloaded file ({name}) does not ")
    assert text.endswith(f"Put {published.wanted_files} into '{data.folder}', or name their folder with --data.root.")
    assert {path.name for path in data.folder.iterdir()} == set(published.checksums) - {name}


def test_nothing_is_downloaded_into_a_folder_of_the_user(published: type[Published], tmp_path: Path) -> None:
    empty = tmp_path / "mine"
    empty.mkdir()
    with pytest.raises(UprightError, match=rf"'{empty}' does not hold .* \(no .*gz.*\); `root` \(--data.root\) is"):
        published(root=str(empty)).prepare_data()
    assert not list(empty.iterdir())


def test_published_arguments_are_absolute_and_arrays_stay_arrays(published: type[Published], tmp_path: Path) -> None:
    data = published(root="here")
    assert data.recipe["init_args"]["root"] == data.root == str(Path.cwd() / "here")
    source = published().source
    assert source.images.shape == (len(source.labels), *published().spec.input_shape[1:], published().spec.channels)
    assert source.images.flags.c_contiguous and source.files is None


def test_without_a_network_the_error_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(MNIST, "address", "http://127.0.0.1:9")
    with pytest.raises(
        UprightError,
        match=rf"^http://127.0.0.1:9/train-images-idx3-ubyte.gz cannot be downloaded \(.*refused.*\)\. "
        rf"Put the four IDX files into '{tmp_path}/mnist', or name their folder with --data.root\.$",
    ):
        MNIST().prepare_data()
    assert not list((tmp_path / "mnist").iterdir())


def test_an_interrupted_download_leaves_nothing(served: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(UprightError, match=r"/broken cannot be downloaded \(.*50 bytes read, 50 more expected"):
        download("broken", "0" * 32, served[1], tmp_path / "cache", "it")
    assert not list((tmp_path / "cache").iterdir())


def test_a_keyboard_interrupt_leaves_nothing(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pooch.core.hash_matches", interrupt)
    (served[0] / "x").write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt):
        download("x", "0" * 32, served[1], tmp_path / "cache", "it")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    (served[0] / "x").write_bytes(b"x")
    with pytest.raises(UprightError, match=r"/x cannot be downloaded \(.*cache.*Put it into"):
        download("x", md5(b"x").hexdigest(), served[1], tmp_path / "cache", "it")
