"""Bundles at an address. A server on this machine stands for one on the internet, and an object for W&B's API."""

import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, Upright
from upright.cli import COMMANDS
from upright.errors import UserError
from upright.runtime import address
from upright.runtime.address import local_bundle
from upright.runtime.bundle import SUMS, write_archive

DIGITS = ROOT / "export/digits"
ELSEWHERE = "http://example.org/digits.upright.zip"


class Server(ThreadingHTTPServer):
    """A server of one archive. The first part of the path chooses how it answers."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.hash, self.requests = content, sha256(content).hexdigest(), 0

    def address(self, kind: str = "plain") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{kind}/digits.upright.zip"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        kind, content = self.path.split("/")[1], self.server.content
        self.send_response({"gone": 404, "elsewhere": 302, "file": 302, "moved": 302}.get(kind, 200))
        targets = {"elsewhere": ELSEWHERE, "file": "file:///etc/passwd", "moved": self.server.address()}
        if kind in targets:
            self.send_header("Location", targets[kind])
        if kind != "endless":
            self.send_header("Content-Length", str(0 if kind in targets else len(content)))
        self.end_headers()
        if kind not in targets:
            self.wfile.write(content[:1000] if kind == "truncated" else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_archive(DIGITS, tmp_path / "digits.upright.zip")
    with Server((tmp_path / "digits.upright.zip").read_bytes()) as server:
        thread = threading.Thread(target=partial(server.serve_forever, 0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_every_command_that_takes_a_bundle_takes_an_address() -> None:
    takes = {}
    for name, command in COMMANDS.items():
        settings = {each.name: each.metadata for each in fields(command.options)}
        takes[name] = any(each.get("address") for each in settings.values())
        assert takes[name] == ("bundle" in settings or name in ("report", "attach"))
    assert {name for name in takes if takes[name]} == {
        *("verify", "infer", "straighten", "benchmark", "serve", "web", "report", "attach")
    }


def test_an_archive_is_downloaded_once(server: Server, cache: Path, upright: Upright) -> None:
    answer = upright("verify", server.address(), "--sha256", server.hash.upper())
    assert answer.code == 0 and "Verified" in answer.out, answer.err
    assert answer.err == f"Downloading {server.address()} ...\n"
    (stored,) = files(cache)
    assert stored == cache / "bundles" / server.hash / "digits.upright.zip"
    answer = upright("infer", f"{server.address()}#sha256={server.hash}", DIGITS / "samples/00.png")
    assert answer.code == 0 and answer.err == "" and server.requests == 1
    stored.write_bytes(b"damaged")
    assert local_bundle(server.address("moved"), server.hash) == str(stored)
    assert server.requests == 3 and stored.read_bytes() == server.content


def test_the_name_of_a_download_is_a_plain_file_name(server: Server, cache: Path) -> None:
    top = server.address().rpartition("/")[0]
    names = {"": "bundle", "..%2F..%2Fx.upright.zip?key=1": "-..-x", "a b": "a-b"}
    for path, name in names.items():
        assert local_bundle(f"{top}/{path.replace(' ', '%20')}", server.hash).endswith(
            f"/{server.hash}/{name}.upright.zip"
        )


def test_several_processes_download_at_the_same_time(server: Server, cache: Path) -> None:
    threads = [threading.Thread(target=local_bundle, args=(server.address(), server.hash)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (stored,) = files(cache)
    assert stored.read_bytes() == server.content


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gone", r"cannot be downloaded \(HTTP Error 404: Not Found\)\. Check address and network, or"),
        ("elsewhere", f"leads to '{ELSEWHERE}', which does not begin with https://"),
        ("file", r"file:///etc/passwd"),
        ("truncated", r"cannot be downloaded \(the connection ended after 1000 of \d+ bytes\)"),
    ],
)
def test_a_download_that_fails_stores_nothing(server: Server, cache: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        local_bundle(server.address(kind), server.hash)
    assert files(cache) == []


def test_another_hash_and_a_larger_archive_are_not_stored(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"has the SHA-256 {server.hash}, not {'0' * 64}; it is not stored"):
        local_bundle(server.address(), "0" * 64)
    for limit in (len(server.content) - 1, 1000):
        monkeypatch.setattr(address, "MAX_BYTES", limit)
        for kind in ("plain", "endless"):
            with pytest.raises(UserError, match="GiB, the limit; it is not stored"):
                local_bundle(server.address(kind), server.hash)
    monkeypatch.setattr(address, "MAX_BYTES", len(server.content))
    assert files(cache) == []
    local_bundle(server.address("endless"), server.hash)


@pytest.mark.parametrize(
    ("source", "hash", "message"),
    [
        ("https://example.org/x.upright.zip", None, r"needs the hash of the archive: give --sha256 HASH, or append"),
        ("https://example.org/x.upright.zip", "12", "must be a SHA-256, 64 hexadecimal digits, got '12'"),
        (ELSEWHERE, "0" * 64, "must begin with https:// or wandb-artifact://"),
        ("s3://bucket/x", None, "must begin with https:// or wandb-artifact://"),
        ("https://[", "0" * 64, r"'https://\[' is no address of a bundle"),
        (str(DIGITS), "0" * 64, "is the hash of an archive, and '.*digits' is none; use --expect"),
        ("wandb-artifact://a/b/c:v0", "0" * 64, "is the hash of an archive"),
    ],
)
def test_wrong_addresses(source: str, hash: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        local_bundle(source, hash)


def test_the_hash_of_a_local_archive(tmp_path: Path, upright: Upright) -> None:
    write_archive(DIGITS, tmp_path / "digits.upright.zip")
    actual = sha256((tmp_path / "digits.upright.zip").read_bytes()).hexdigest()
    assert upright("verify", "digits.upright.zip", "--sha256", actual).code == 0
    answer = upright("verify", "digits.upright.zip", "--sha256", "0" * 64)
    assert answer.code == 2 and f"'digits.upright.zip' has the SHA-256 {actual}, not {'0' * 64}." in answer.err
    answer = upright("verify", "nope.upright.zip", "--sha256", "0" * 64)
    assert answer.code == 2 and "No such file or directory: 'nope.upright.zip'" in answer.err


class Artifact(SimpleNamespace):
    def download(self, root: str, skip_cache: bool) -> None:
        assert skip_cache
        shutil.copytree(DIGITS, root)
        (Path(root) / self.extra).touch()


@pytest.fixture
def artifact(monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The artifact that W&B's API returns for me/upright/bundle-digits:latest."""
    artifact = Artifact(name="bundle-digits:v3", digest="ab12", size=1000, extra=SUMS)
    artifacts = {"me/upright/bundle-digits:latest": artifact}
    api = SimpleNamespace(Api=lambda: SimpleNamespace(artifact=artifacts.__getitem__))
    monkeypatch.setitem(sys.modules, "wandb", api)
    return artifact


def test_an_artifact_of_wandb(artifact: Artifact, cache: Path, upright: Upright) -> None:
    source = "wandb-artifact://me/upright/bundle-digits:latest"
    for _ in range(2):
        assert local_bundle(source) == str(cache / "bundles/ab12/digits")
    assert upright("verify", source).code == 0
    artifact.digest, artifact.extra = "cd34", "nope/file"  # a new version, whose download fails
    answer = upright("verify", source)
    assert answer.code == 2 and f"'{source}' cannot be downloaded" in answer.err
    assert list((cache / "bundles/cd34").iterdir()) == []
    artifact.digest, artifact.name, artifact.extra = "../..", "../x", SUMS
    assert local_bundle(source) == str(cache / "bundles/-../-x")
    artifact.size = 2**40
    answer = upright("verify", source)
    assert answer.code == 2 and "is larger than 8 GiB, the limit" in answer.err
    answer = upright("verify", "wandb-artifact://digits")
    assert answer.code == 2 and "It must be wandb-artifact://ENTITY/PROJECT/NAME:ALIAS, and `wandb login`" in answer.err


def test_an_artifact_needs_wandb(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    answer = upright("verify", "wandb-artifact://me/upright/bundle-digits:v3")
    assert answer.code == 2 and "needs the package 'wandb': pip install 'upright[wandb]'" in answer.err
