"""The folder that `upright web` writes. These tests need no browser; `test_web_page.py` opens the page in one."""

import hashlib
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Answer, Upright
from tests.runtime.bundles import write_bundle, write_multilabel_bundle, write_orientation_bundle
from upright.architectures.lenet import LeNet
from upright.images import ImageSpec
from upright.runtime import web
from upright.runtime.bundle import EXPECTED, SUMS, checksums, write_archive

SCRIPT, WASM = web.RUNTIME


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """A folder with the file names of onnxruntime-web."""
    folder = tmp_path / "onnxruntime-web/dist"
    folder.mkdir(parents=True)
    for name in (SCRIPT, WASM, "ort.all.mjs"):
        (folder / name).write_text(f"content of {name}")
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_page_has_the_files_it_needs_and_no_others(upright: Upright, bundle: Path, dist: Path) -> None:
    answer = upright("web", bundle, "--runtime", dist)
    assert answer.code == 0 and answer.err == ""
    assert "Page: web/small/index.html (" in answer.out
    assert "Note: to show the output of the transformer, export with --outputs warped." in answer.out
    samples = {f"samples/{number:02d}.png" for number in range(16)}
    runtime = {f"runtime/{SCRIPT}", f"runtime/{WASM}"}
    page = Path("web/small")
    assert files_in(page) == {"index.html", "style.css", "app.js", "model.json", "model.onnx"} | samples | runtime
    assert (page / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    facts = json.loads((page / "model.json").read_text())
    assert facts["bytes"][facts["model"]] == (page / "model.onnx").stat().st_size
    assert "<title>small · Upright</title>" in (page / "index.html").read_text()
    assert list(Path("web").iterdir()) == [page]
    before = {name: (page / name).read_bytes() for name in files_in(page)}
    write_archive(bundle, Path("small.upright.zip"))
    assert upright("web", "small.upright.zip", "--runtime", dist).code == 0
    assert {name: (page / name).read_bytes() for name in files_in(page)} == before


def test_the_page_of_an_orientation_bundle(upright: Upright, tmp_path: Path, dist: Path) -> None:
    bundle = write_orientation_bundle(tmp_path / "export/sky")
    assert upright("web", bundle, "--runtime", dist).code == 0
    facts = json.loads(Path("web/sky/model.json").read_text())
    rows = [sample["orientation"]["fp32"] for sample in json.loads((bundle / EXPECTED).read_text())]
    assert (facts["task"], facts["classes"], facts["threshold"]) == ("orientation", [], 0)
    assert facts["samples"] == [{"file": f"samples/{n:02d}.png", "expected": row} for n, row in enumerate(rows)]
    manifest = json.loads((bundle / "manifest.json").read_text()) | {"orientation": {"threshold": 0.4}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / SUMS).write_text(checksums(bundle))
    assert upright("web", bundle, "--runtime", dist).code == 0
    assert json.loads(Path("web/sky/model.json").read_text())["threshold"] == 0.4


def test_the_page_of_a_bundle_with_several_classes(upright: Upright, tmp_path: Path, dist: Path) -> None:
    bundle = write_multilabel_bundle(tmp_path / "export/tags")
    assert upright("web", bundle, "--runtime", dist).code == 0
    facts = json.loads(Path("web/tags/model.json").read_text())
    thresholds = json.loads((bundle / "manifest.json").read_text())["multilabel"]["thresholds"]
    assert (facts["task"], facts["thresholds"]) == ("multilabel", thresholds)


def test_a_page_contains_no_paths_of_the_training_machine(upright: Upright, tmp_path: Path, dist: Path) -> None:
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))
    bundle = write_bundle(tmp_path / "export/made", spec, LeNet)
    assert "/home/somebody" in (bundle / "manifest.json").read_text()
    assert "Note" not in upright("web", bundle, "--runtime", dist).out
    texts = [path.read_bytes() for path in Path("web/made").rglob("*") if path.is_file()]
    assert not any(b"/home/somebody" in text for text in texts)


def test_names_are_escaped_in_the_page(upright: Upright, tmp_path: Path, dist: Path) -> None:
    name = "<b>&amp;"
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))
    write_bundle(tmp_path / "export" / name, spec, LeNet)
    assert upright("web", tmp_path / "export" / name, "--runtime", dist).code == 0
    assert "<h1>&lt;b&gt;&amp;amp;</h1>" in (Path("web") / name / "index.html").read_text()


def test_samples_are_only_read_from_the_bundle(upright: Upright, bundle: Path, dist: Path) -> None:
    (bundle.parent / "secret.png").write_text("secret")
    samples = json.loads((bundle / EXPECTED).read_text())
    samples[0]["file"] = "../secret.png"
    (bundle / EXPECTED).write_text(json.dumps(samples))
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("web", bundle, "--runtime", dist)
    assert (
        answer.code == 2
        and "the file or the label of sample '../secret.png' is missing" in answer.err
        and not Path("web").exists()
    )


def test_one_file(upright: Upright, bundle: Path, dist: Path) -> None:
    answer = upright("web", bundle, "--runtime", dist, "--one-file")
    assert answer.code == 0 and "Next: open web/small/index.html in a browser" in answer.out
    assert files_in(Path("web/small")) == {"index.html"}
    text = Path("web/small/index.html").read_text()
    assert "default-src 'none'" in text and "src=" not in text and "stylesheet" not in text
    # A page in one file is replaced by a page in a folder.
    assert upright("web", bundle, "--runtime", dist).code == 0
    assert "app.js" in files_in(Path("web/small"))


def test_only_a_page_is_replaced(upright: Upright, bundle: Path, dist: Path) -> None:
    mine = Path("web/small/mine.txt")
    mine.parent.mkdir(parents=True)
    assert upright("web", bundle, "--runtime", dist).code == 0  # an empty folder is replaced
    assert not mine.exists()
    Path("web/small/index.html").write_text("my own page")
    answer = upright("web", bundle, "--runtime", dist)
    assert answer.code == 2 and answer.err.startswith(
        "upright: error: 'web/small' is not a page that `upright web` wrote, so it is not replaced; give another folder"
    )
    assert Path("web/small/index.html").read_text() == "my own page"
    assert upright("web", bundle, "--runtime", dist, "--to", "other").code == 0


def test_a_missing_precision(upright: Upright, bundle: Path, dist: Path) -> None:
    answer = upright("web", bundle, "--runtime", dist, "--precision", "int8")
    assert answer.code == 2 and "holds fp32, not int8" in answer.err and not Path("web").exists()


def test_the_runtime_in_every_form(upright: Upright, bundle: Path, dist: Path) -> None:
    with tarfile.open("onnxruntime-web.tgz", "w:gz") as package:
        package.add(dist, "package/dist")
    for source in (dist, dist.parent, "onnxruntime-web.tgz"):
        assert upright("web", bundle, "--runtime", source).code == 0
        assert Path("web/small/runtime", WASM).read_text() == f"content of {WASM}"


@pytest.mark.parametrize("source", ["nowhere", "empty", "broken.tgz", "other.tgz"])
def test_other_files_are_not_a_runtime(upright: Upright, bundle: Path, source: str) -> None:
    Path("empty").mkdir()
    Path("broken.tgz").write_text("no archive")
    with tarfile.open("other.tgz", "w:gz") as package:
        package.add("broken.tgz", "package/README.md")
    answer = upright("web", bundle, "--runtime", source)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert f"--runtime '{source}'" in answer.err and "`npm pack onnxruntime-web@" in answer.err
    assert not Path("web").exists()


@pytest.fixture
def mirror(dist: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=dist)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def sums(dist: Path) -> dict[str, str]:
    return {name: hashlib.sha256((dist / name).read_bytes()).hexdigest() for name in (SCRIPT, WASM)}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"onnxruntime-web-{web.RUNTIME_VERSION}"


def test_the_runtime_is_downloaded_once(
    upright: Upright, bundle: Path, dist: Path, mirror: str, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "RUNTIME", sums(dist))
    monkeypatch.setattr(web, "MIRRORS", (f"{mirror}/gone", mirror))
    first, second = upright("web", bundle), upright("web", bundle)
    assert first.code == 0 and f"Downloading {mirror}/{WASM} ..." in first.err
    assert second.code == 0 and "Downloading" not in second.err
    assert files_in(cached) == {SCRIPT, WASM}
    (cached / WASM).write_text("damaged")
    assert f"/{WASM} ..." in upright("web", bundle).err
    assert Path("web/small/runtime", WASM).read_text() == f"content of {WASM}"


def test_a_file_with_another_hash_is_not_stored(upright: Upright, bundle: Path, mirror: str, cached: Path) -> None:
    answer = upright("web", bundle, "--runtime", mirror)
    assert answer.code == 2 and f"'{mirror}/{SCRIPT}' has the SHA-256 " in answer.err
    assert "`npm pack onnxruntime-web@" in answer.err
    assert not list(cached.iterdir()) and not Path("web").exists()


def test_no_network(upright: Upright, bundle: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", refused)
    answer: Answer = upright("web", bundle)
    assert answer.code == 2 and answer.err.count("cannot be downloaded (no network)") == 2
    assert not Path("web").exists()
