import csv
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from PIL import Image

from tests.conftest import Upright
from tests.runtime.bundles import write_unresized_bundle
from upright.errors import EngineError
from upright.runtime import infer as infer_module
from upright.runtime.predictor import Predictor


@pytest.fixture
def expected(bundle: Path) -> dict[str, dict[str, object]]:
    return {sample["file"]: sample for sample in json.loads((bundle / "samples/expected.json").read_text())}


def best(sample: dict[str, object]) -> tuple[str, float]:
    probabilities = sample["probabilities"]["fp32"]
    return str(int(np.argmax(probabilities))), max(probabilities)


def test_every_format_gives_the_answers_of_the_bundle(upright: Upright, bundle: Path, expected: dict) -> None:
    images = [bundle / file for file in expected]
    jsonl = [json.loads(line) for line in upright("infer", bundle, *images, "--format", "jsonl").out.splitlines()]
    rows = list(csv.DictReader(upright("infer", bundle, bundle / "samples", "--format", "csv").out.splitlines()))
    table = upright("infer", bundle, *images).out.splitlines()
    for sample, path, record, row, line in zip(expected.values(), images, jsonl, rows, table, strict=True):
        label, probability = best(sample)
        assert (record["path"], record["label"]) == (str(path), label)
        assert record["probability"] == pytest.approx(probability, abs=1e-4)
        assert (row["path"], row["label"]) == (str(path), label)
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-4)
        assert line.split() == [label, f"{probability:.4f}", str(path)]


def test_top(upright: Upright, bundle: Path) -> None:
    answer = upright("infer", bundle, bundle / "samples/00.png", "--top", 3, "--format", "jsonl")
    top = json.loads(answer.out)["top"]
    assert len(top) == 3 and top == sorted(top, key=lambda entry: -entry["probability"])
    header, row = upright("infer", bundle, bundle / "samples/00.png", "--top", 2, "--format", "csv").out.splitlines()
    assert header == "path,label_1,probability_1,label_2,probability_2" and len(row.split(",")) == 5
    answer = upright("infer", bundle, bundle / "samples/00.png", "--top", 11)
    assert answer.code == 2 and "--top must be from 1 to 10" in answer.err


def test_a_bad_picture_is_reported_and_the_rest_goes_on(upright: Upright, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((bundle / "samples/01.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    good = [bundle / "samples/00.png", bundle / "samples/02.png"]
    answer = upright("infer", bundle, good[0], "text.png", "nope.png", "empty", "cut.png", good[1], "--format", "jsonl")
    assert answer.code == 2
    assert [json.loads(line)["path"] for line in answer.out.splitlines()] == [str(path) for path in good]
    errors = answer.err.splitlines()
    assert len(errors) == 4 and all(line.startswith("upright: error: ") for line in errors)
    for line, text in zip(
        errors, ("'text.png' is not an image", "'nope.png' does not", "'empty' holds no", "cut.png"), strict=True
    ):
        assert text in line


def test_pictures_of_any_kind_and_size(upright: Upright, bundle: Path, tmp_path: Path, expected: dict) -> None:
    pixels = np.asarray(Image.open(bundle / "samples/00.png"))
    label, _ = best(expected["samples/00.png"])
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.merge("RGBA", [Image.new("L", (28, 28), 255)] * 3 + [Image.fromarray(pixels)]).save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "exif.png", exif=exif)
    Image.fromarray(pixels).resize((84, 84), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    names = ["rgb.png", "deep.png", "alpha.png", "exif.png", "cmyk.tif", "large.png"]
    answer = upright("infer", bundle, *names, "--format", "jsonl")
    records = [json.loads(line) for line in answer.out.splitlines()]
    assert answer.code == 0 and [record["path"] for record in records] == names
    assert [record["label"] for record in records] == [label] * 6
    same = [record["probability"] for record in records[:5]]
    assert max(same) - min(same) < 1e-4


def test_predictor_takes_whatever_there_is(bundle: Path, expected: dict) -> None:
    predictor, path = Predictor(bundle), bundle / "samples/05.png"
    label, probability = best(expected["samples/05.png"])
    for source in (path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        prediction = predictor(source)
        assert prediction.label == label and prediction.probability == pytest.approx(probability, abs=1e-4)
    assert list(prediction.probabilities) == list("0123456789")
    assert prediction.top(1) == [(prediction.label, prediction.probability)]


def test_batches_do_not_change_answers(bundle: Path) -> None:
    predictor = Predictor(bundle)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, size, dtype=np.uint8) for size in [(28, 28)] * 5 + [(40, 12)] * 3 + [(28, 28)]]
    alone = [predictor(image).probabilities for image in images]
    for batch_size in (1, 2, 7, 64):
        for one, other in zip(alone, predictor.predict(images, batch_size), strict=True):
            assert one == pytest.approx(other.probabilities, abs=1e-5)


def test_large_pictures_go_through_in_small_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upright.images.MAX_BATCH_PIXELS", 5000)
    sizes = []
    predictor = Predictor(bundle)
    session = predictor.session
    predictor.session = SimpleNamespace(
        get_inputs=session.get_inputs,
        run=lambda names, feed: sizes.append(feed["images"].shape) or session.run(names, feed),
    )
    pictures = [np.zeros((40, 50), np.uint8)] * 5 + [np.zeros((100, 100), np.uint8)] * 2
    assert len(predictor.predict(pictures)) == 7
    assert [shape[0] for shape in sizes] == [2, 2, 1, 1, 1]


def test_threads_share_a_predictor(bundle: Path) -> None:
    predictor, images = Predictor(bundle), sorted((bundle / "samples").glob("*.png"))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(predictor, images * 10))
    assert [prediction.label for prediction in together] == [predictor(image).label for image in images] * 10


def test_patterns_that_no_shell_has_expanded(upright: Upright, bundle: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for name in ("a/1.png", "a/b/2.png", "a[1].png", "c.txt"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / "samples/00.png", pictures / name)

    def found(*patterns: str) -> list[str]:
        records = upright("infer", bundle, *(f"pictures/{p}" for p in patterns), "--format", "jsonl").out.splitlines()
        return [Path(json.loads(line)["path"]).relative_to("pictures").as_posix() for line in records]

    assert found("**/*.png") == ["a/1.png", "a/b/2.png", "a[1].png"]
    assert found("?/*.png") == ["a/1.png"] and found("a/*") == ["a/1.png"]
    # What is there goes before what it would match.
    assert found("a[1].png") == ["a[1].png"]
    answer = upright("infer", bundle, "pictures/*.jpg", "pictures/c.txt")
    assert answer.code == 2 and "'pictures/*.jpg' does not exist, and as a pattern it matches no file." in answer.err
    assert answer.out.count("\n") == 1


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_paths_on_standard_input(upright: Upright, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bundle / "samples/00.png", bundle / "samples/01.png"
    give(monkeypatch, f"{first}\r\n\nnope.png\n{bundle / 'samples'}\n{second}".encode())
    answer = upright("infer", bundle, second, "-", first, "--format", "jsonl")
    paths = [json.loads(line)["path"] for line in answer.out.splitlines()]
    inside = sorted(str(path) for path in (bundle / "samples").glob("*.png"))
    assert paths == [str(second), str(first), *inside, str(second), str(first)]
    assert answer.code == 2 and answer.err == "upright: error: 'nope.png' does not exist.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_name_that_is_no_text(bundle: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(bundle / "samples/00.png", name)
    command = [sys.executable, "-m", "upright", "infer", str(bundle), "-", "--format", "jsonl"]
    done = subprocess.run(command, input=name + b"\n", capture_output=True, check=True)
    assert os.fsencode(json.loads(done.stdout)["path"]) == name


def test_answers_come_while_pictures_are_still_given(bundle: Path) -> None:
    command = [sys.executable, "-m", "upright", "infer", str(bundle), "-", "--format", "csv"]
    lines = f"{bundle / 'samples/00.png'}\n".encode() * 200
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(lines)
        process.stdin.flush()
        # The input is not at its end.
        assert process.stdout.readline() == b"path,label,probability\n"
        assert all(process.stdout.readline() for _ in range(128))
        process.stdin.close()
        assert len(process.stdout.readlines()) == 72
    assert process.returncode == 0


def test_no_more_pictures_are_in_memory_than_go_through_together(bundle: Path) -> None:
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def pictures() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for _ in range(1000):
            pixels = np.zeros((28, 28, 1), np.uint8)
            weakref.finalize(pixels, gone)
            alive += 1
            most = max(most, alive)
            yield pixels
            del pixels

    assert sum(1 for _ in Predictor(bundle).probabilities(pictures(), 32)) == 1000
    assert 32 <= most <= 66


def test_a_size_that_the_network_cannot_take_is_a_bad_image(upright: Upright, tmp_path: Path) -> None:
    bundle = write_unresized_bundle(tmp_path / "export/nin")
    for number, size in enumerate((28, 2, 2, 28)):
        Image.new("L", (size, size)).save(tmp_path / f"{number}.png")
    answer = upright("infer", bundle, *(f"{n}.png" for n in range(4)), "--format", "jsonl")
    assert answer.code == 2 and [json.loads(line)["path"] for line in answer.out.splitlines()] == ["0.png", "3.png"]
    for number, line in zip((1, 2), answer.err.splitlines(), strict=True):
        assert line.startswith(f"upright: error: '{number}.png': The model cannot take images of 2x2 pixels: ")


@pytest.mark.parametrize("resized", [True, False])
def test_a_failure_of_the_engine_is_not_a_bad_image(
    upright: Upright, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resized: bool
) -> None:
    bundle = bundle if resized else write_unresized_bundle(tmp_path / "export/nin")
    Image.new("L", (2, 2)).save(tmp_path / "x.png")

    def run(*_: object) -> None:
        raise Fail("[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:360\nFailed to allocate memory")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    for command in (("infer", bundle, "x.png"), ("verify", bundle)):
        answer = upright(*command)
        assert answer.code == 1 and answer.out == "" and answer.err.count("\n") == 1
        assert answer.err.startswith("upright: error: onnxruntime failed on 1 images of (H, W, C) ")
        assert "bfc_arena.cc:360 Failed to allocate memory" in answer.err
    with pytest.raises(EngineError):
        Predictor(bundle)(tmp_path / "x.png")


def test_onnxruntime_is_told_how_to_run(upright: Upright, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bundle / "samples/00.png"
    for provider in ("cpu", "CPU", "CPUExecutionProvider"):
        assert upright("infer", bundle, image, "--providers", provider, "--threads", 2).code == 0
    session = Predictor(bundle, threads=3, providers=("cpu",)).session
    assert session.get_session_options().intra_op_num_threads == 3
    answer = upright("infer", bundle, image, "--providers", "tensorrt", "cpu")
    assert answer.code == 2 and "has no provider 'tensorrt', only " in answer.err and "cpu" in answer.err
    # Built with it, but without its libraries.
    here = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *here])
    real = onnxruntime.InferenceSession
    opened = lambda *given, providers, **rest: real(*given, providers=["CPUExecutionProvider"])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    answer = upright("infer", bundle, image, "--providers", "cuda")
    assert answer.code == 2 and "onnxruntime cannot start cuda here: its driver or libraries are missing" in answer.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--threads", "0"), "threads must be at least 1, got 0; without it, there are as many as cores."),
        (("--max-pixels", "0"), "max_pixels must be at least 1, got 0."),
        (("--max-pixels", "100"), "28x28 pixels are more than the limit of 100"),
    ],
)
def test_limits(options: tuple[str, ...], text: str, upright: Upright, bundle: Path) -> None:
    answer = upright("infer", bundle, bundle / "samples/00.png", *options)
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    for total, text in (
        (4, "[#######                       ] 25%, 1 images, 1 per second, 3 s left"),
        (None, "1 images"),
    ):
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        progress = infer_module.Progress(total)
        progress.step()
        progress.clear()
        assert terminal.getvalue().startswith(f"\r\033[K{text}") and terminal.getvalue().endswith("\r\033[K")
    monkeypatch.setattr("sys.stdout", Terminal())
    for quiet in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", quiet)
        infer_module.Progress(4).step()
        assert quiet.getvalue() == ""
        monkeypatch.setattr("sys.stdout", io.StringIO())


@pytest.mark.parametrize("told", [{}, {"ORT_DISABLE_TELEMETRY": "0"}])
def test_onnxruntime_tells_nobody_unless_told_to(told: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    # Where it may, it begins with an identifier in the home; never where it sees a variable of continuous integration.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "upright", "infer", str(bundle), str(bundle / "samples/00.png")]
    subprocess.run(command, env=environment | told | {"HOME": str(home)}, capture_output=True, check=True)
    assert bool(list(home.rglob("deviceid"))) == bool(told)
