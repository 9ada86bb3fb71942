import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import ANGLES, photograph, write_orientation_bundle, write_unresized_bundle
from upright.errors import BundleError, EngineError, ImageError, UserError
from upright.runtime import infer as infer_module
from upright.runtime.bundle import SUMS, checksums, write_archive
from upright.runtime.predictor import OrientationPredictor, Predictor, open_predictor
from upright.runtime.task import Orientation, Prediction


@pytest.fixture
def expected(bundle: Path) -> dict[str, dict[str, object]]:
    return {sample["file"]: sample for sample in json.loads((bundle / "samples/expected.json").read_text())}


def best(sample: dict[str, object]) -> tuple[str, float]:
    probabilities = sample["probabilities"]["fp32"]
    return str(int(np.argmax(probabilities))), max(probabilities)


def test_every_format_gives_the_predictions_of_the_bundle(upright: Upright, bundle: Path, expected: dict) -> None:
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


def test_the_orientation_in_every_format(upright: Upright, tmp_path: Path) -> None:
    bundle = write_orientation_bundle(tmp_path / "export/sky")
    images = [bundle / f"samples/{number:02d}.png" for number in range(len(ANGLES))]
    jsonl = upright("infer", bundle, *images, "--format", "jsonl", "--outputs", "theta", "--npz", "all.npz").out
    rows = list(csv.DictReader(upright("infer", bundle, *images, "--format", "csv").out.splitlines()))
    table = upright("infer", bundle, *images).out.splitlines()
    with np.load("all.npz") as arrays:
        assert set(arrays) == {"paths", "orientation", "theta"}
        stored = arrays["orientation"], arrays["theta"]
    for angle, path, text, row, line, (stored_angle, confidence), theta in zip(
        ANGLES, images, jsonl.splitlines(), rows, table, *stored, strict=True
    ):
        record = json.loads(text)
        assert list(record) == ["path", "angle", "confidence", "outputs"] and record["path"] == str(path)
        # 180 and -180 degrees are the same angle.
        assert abs(record["angle"] - angle) % 360 == pytest.approx(0, abs=0.01)
        assert (record["angle"], record["confidence"]) == (stored_angle, confidence)
        assert record["outputs"]["theta"] == pytest.approx(theta.tolist())
        assert row == {"path": str(path), "angle": f"{stored_angle:z.4f}", "confidence": f"{confidence:.6f}"}
        assert line.split() == [f"{stored_angle:z.2f}°", f"{confidence:.4f}", str(path)]
    answer = upright("infer", bundle, images[0], "--top", 1)
    message = f"--top is for bundles with one class per image, and '{bundle}' estimates the orientation; omit --top."
    assert (answer.code, answer.out, answer.err) == (2, "", f"upright: error: {message}\n")


def test_each_task_has_its_predictor(bundle: Path, tmp_path: Path) -> None:
    sky = write_orientation_bundle(tmp_path / "export/sky")
    with pytest.raises(UserError, match=f"'{sky}' estimates the orientation; give one that classifies images"):
        Predictor(sky)
    with pytest.raises(UserError, match=f"'{bundle}' classifies images; give one that estimates the orientation"):
        OrientationPredictor(bundle)
    predictor = open_predictor(sky, threads=1)
    assert isinstance(predictor, OrientationPredictor) and isinstance(open_predictor(bundle), Predictor)
    angles = [-135, -20, 75, 160]
    results = pickle.loads(pickle.dumps(predictor)).predict([*map(photograph, angles), b""], errors="return")
    assert isinstance(results.pop(), ImageError) and {type(result) for result in results} == {Orientation}
    assert [result.angle for result in results] == pytest.approx(angles, abs=0.05)
    assert predictor(photograph(30)).confidence == pytest.approx(predictor(photograph(0)).confidence, abs=1e-3)
    assert predictor(np.zeros((8, 8), np.uint8)).confidence == 0
    fixed = OrientationPredictor(write_orientation_bundle(tmp_path / "export/fixed", channels=3, side=32, batch=2))
    results = fixed.predict([photograph(angle, 32, 3) for angle in angles[1:]])
    assert [result.angle for result in results] == pytest.approx(angles[1:], abs=0.05)
    with pytest.raises(ImageError, match="this model only accepts 32x32"):
        fixed(photograph(0, 40, 3))


def test_bad_images_are_reported_and_the_others_are_classified(upright: Upright, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((bundle / "samples/01.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    good = [bundle / "samples/00.png", bundle / "samples/02.png"]
    answer = upright("infer", bundle, good[0], "text.png", "nope.png", "empty", "cut.png", good[1], "--format", "jsonl")
    assert answer.code == 2
    assert [json.loads(line)["path"] for line in answer.out.splitlines()] == [str(path) for path in good]
    errors = answer.err.splitlines()
    assert len(errors) == 4 and all(line.startswith("upright: error: ") for line in errors)
    messages = ("'text.png' is in none of the formats", "'nope.png' does not", "'empty' holds no", "cut.png")
    for line, message in zip(errors, messages, strict=True):
        assert message in line


def test_images_of_any_kind_and_size(upright: Upright, bundle: Path, tmp_path: Path, expected: dict) -> None:
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


def pipe_with(content: bytes) -> io.BufferedReader:
    """Return a file that cannot seek."""
    reader, writer = map(os.fdopen, os.pipe(), ("rb", "wb"))
    with writer:
        writer.write(content)
    return reader


def test_the_predictor_accepts_every_kind_of_source(bundle: Path, expected: dict) -> None:
    predictor, path = Predictor(bundle), bundle / "samples/05.png"
    label, probability = best(expected["samples/05.png"])
    content = path.read_bytes()
    with path.open("rb") as file, pipe_with(content) as pipe, Image.open(path) as image:
        sources = [path, str(path), content, bytearray(content), io.BytesIO(content), file, pipe, np.asarray(image)]
        for source in (*sources, image):
            prediction = predictor(source)
            assert prediction.label == label and prediction.probability == pytest.approx(probability, abs=1e-4)
    assert list(prediction.probabilities) == list("0123456789")
    assert prediction.top(1) == [(prediction.label, prediction.probability)]


def test_batches_do_not_change_predictions(bundle: Path) -> None:
    predictor = Predictor(bundle)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, size, dtype=np.uint8) for size in [(28, 28)] * 5 + [(40, 12)] * 3 + [(28, 28)]]
    expected = [predictor(image).probabilities for image in images]
    for batch_size in (1, 2, 7, 64):
        for one, other in zip(expected, predictor.predict(images, batch_size), strict=True):
            assert one == pytest.approx(other.probabilities, abs=1e-5)


def test_a_stream_without_an_end_yields_after_each_batch(bundle: Path) -> None:
    predictor, paths = Predictor(bundle), sorted((bundle / "samples").glob("*.png"))
    for batch_size, count in ((4, 10), (1, 10)):
        read = []
        stream = predictor.stream((read.append(path) or path for path in cycle(paths)), batch_size)
        labels = [prediction.label for prediction in islice(stream, count)]
        assert labels == [each.label for each in predictor.predict(paths)][:count]
        assert len(read) == {4: 12, 1: 10}[batch_size]


def test_errors_of_images_as_values(bundle: Path) -> None:
    predictor, path = Predictor(bundle), bundle / "samples/05.png"
    images = [path, "nope.png", b"no image", path, io.StringIO("text"), np.zeros((2, 2)), path]
    answers = predictor.predict(images, errors="return")
    messages = {1: "'nope.png' does not exist.", 2: "The image is in none of the formats", 4: "cannot be", 5: "uint8"}
    for i, answer in enumerate(answers):
        if i in messages:
            assert isinstance(answer, ImageError) and messages[i] in str(answer)
        else:
            assert answer == answers[0] and answer.label == predictor(path).label
    with pytest.raises(ImageError, match=r"nope\.png"):
        predictor.predict(images)
    # Only onnxruntime finds out that these images are too small.
    unresized = Predictor(write_unresized_bundle(bundle.parent / "unresized"))
    small, large = np.zeros((2, 2), np.uint8), np.zeros((20, 20), np.uint8)
    kinds = [type(each) for each in unresized.predict([large, small, small, large], errors="return")]
    assert kinds == [Prediction, ImageError, ImageError, Prediction]


def test_another_process_gets_the_predictor(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    write_archive(bundle, tmp_path / "one.upright.zip")
    paths = sorted((bundle / "samples").glob("*.png"))
    predictor = Predictor(bundle.name, threads=1, max_pixels=5000)
    expected = [prediction.label for prediction in predictor.predict(paths)]
    with ProcessPoolExecutor(1, get_context("spawn"), os.chdir, ("/",)) as processes:
        for each in (predictor, Predictor(tmp_path / "one.upright.zip", threads=1)):
            assert [prediction.label for prediction in processes.map(each, paths, chunksize=8)] == expected
    again = pickle.loads(pickle.dumps(predictor))
    assert again.max_pixels == 5000 and again.session.get_session_options().intra_op_num_threads == 1
    (bundle / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"damaged or was changed: model\.onnx"):
        pickle.loads(pickle.dumps(predictor))
    shutil.copyfile(ROOT / "export/digits/model.onnx", bundle / "model.onnx")
    (bundle / SUMS).write_text(checksums(bundle))
    Predictor(bundle)
    with pytest.raises(BundleError, match=r"is not the expected bundle: its SHA256SUMS has the SHA-256 [0-9a-f]{64}"):
        pickle.loads(pickle.dumps(predictor))


def test_joblib_and_spark_send_the_predictor_to_workers(bundle: Path) -> None:
    import cloudpickle
    from joblib import Parallel, delayed

    predictor, paths = Predictor(bundle, threads=1), sorted((bundle / "samples").glob("*.png"))
    expected = [prediction.label for prediction in predictor.predict(paths)]
    answers = Parallel(2, backend="loky", batch_size=8)(map(delayed(predictor), paths))
    assert [answer.label for answer in answers] == expected
    # Spark pickles a function by value, with the predictor that it uses.
    program = "import pickle, sys; print(*map(pickle.load(sys.stdin.buffer), sys.argv[1:]))"
    content = cloudpickle.dumps(lambda path: predictor(path).label)
    command = [sys.executable, "-c", program, *map(str, paths)]
    assert subprocess.run(command, input=content, capture_output=True, check=True).stdout.decode().split() == expected


PROGRAM = """
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import assert_type

from upright import OrientationPredictor, Predictor
from upright.errors import ImageError
from upright.runtime.task import Orientation, Prediction

def paths() -> Iterator[Path]:
    yield Path("x.png")

predictor = Predictor("export/digits")
assert_type(predictor(bytearray(b"")), Prediction)
assert_type(predictor.predict([BytesIO(b"")]), list[Prediction])
assert_type(predictor.stream(paths()), Iterator[Prediction])
assert_type(predictor.stream(paths(), errors="return"), Iterator[Prediction | ImageError])
for answer in predictor.stream(paths(), errors="return"):
    print(answer if isinstance(answer, ImageError) else answer.label)
angle: float = OrientationPredictor("export/sky")("x.png").angle
assert_type(OrientationPredictor("export/sky").predict([b""], errors="return"), list[Orientation | ImageError])
predictor.predict(paths(), errors="ignore")
"""


@pytest.mark.slow
def test_the_types_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--strict", "--follow-imports", "silent", "--config-file", ROOT / "pyproject.toml", "program.py"]
    command = [sys.executable, "-m", "mypy", *options]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = checked.stdout.splitlines()
    assert "program.py:23: error: No overload variant" in lines[0], checked.stdout
    assert lines[-1].startswith("Found 1 error")


def test_large_images_form_small_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upright.images.MAX_BATCH_PIXELS", 5000)
    sizes = []
    predictor = Predictor(bundle)
    session = predictor.session
    predictor.session = SimpleNamespace(
        get_inputs=session.get_inputs,
        run=lambda names, feed: sizes.append(feed["images"].shape) or session.run(names, feed),
    )
    images = [np.zeros((40, 50), np.uint8)] * 5 + [np.zeros((100, 100), np.uint8)] * 2
    assert len(predictor.predict(images)) == 7
    assert [shape[0] for shape in sizes] == [2, 2, 1, 1, 1]


def test_threads_share_a_predictor(bundle: Path) -> None:
    predictor, images = Predictor(bundle), sorted((bundle / "samples").glob("*.png"))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(predictor, images * 10))
    assert [prediction.label for prediction in together] == [predictor(image).label for image in images] * 10


def test_patterns_that_the_shell_did_not_expand(upright: Upright, bundle: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for name in ("a/1.png", "a/b/2.png", "a[1].png", "c.txt"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / "samples/00.png", pictures / name)

    def matches(*patterns: str) -> list[str]:
        records = upright("infer", bundle, *(f"pictures/{p}" for p in patterns), "--format", "jsonl").out.splitlines()
        return [Path(json.loads(line)["path"]).relative_to("pictures").as_posix() for line in records]

    assert matches("**/*.png") == ["a/1.png", "a/b/2.png", "a[1].png"]
    assert matches("?/*.png") == ["a/1.png"] and matches("a/*") == ["a/1.png"]
    # A path that exists is not a pattern.
    assert matches("a[1].png") == ["a[1].png"]
    answer = upright("infer", bundle, "pictures/*.jpg", "pictures/c.txt")
    assert answer.code == 2 and "'pictures/*.jpg' does not exist, and no file matches it as a pattern." in answer.err
    assert answer.out.count("\n") == 1


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_paths_on_standard_input(upright: Upright, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bundle / "samples/00.png", bundle / "samples/01.png"
    set_stdin(monkeypatch, f"{first}\r\n\nnope.png\n{bundle / 'samples'}\n{second}".encode())
    answer = upright("infer", bundle, second, "-", first, "--format", "jsonl")
    paths = [json.loads(line)["path"] for line in answer.out.splitlines()]
    inside = sorted(str(path) for path in (bundle / "samples").glob("*.png"))
    assert paths == [str(second), str(first), *inside, str(second), str(first)]
    assert answer.code == 2 and answer.err == "upright: error: 'nope.png' does not exist.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_a_file_name_that_is_not_text(bundle: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(bundle / "samples/00.png", name)
    command = [sys.executable, "-m", "upright", "infer", str(bundle), "-", "--format", "jsonl"]
    process = subprocess.run(command, input=name + b"\n", capture_output=True, check=True)
    assert os.fsencode(json.loads(process.stdout)["path"]) == name


def test_predictions_are_printed_before_the_input_ends(bundle: Path) -> None:
    command = [sys.executable, "-m", "upright", "infer", str(bundle), "-", "--format", "csv"]
    lines = f"{bundle / 'samples/00.png'}\n".encode() * 200
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(lines)
        process.stdin.flush()
        # Standard input is still open.
        assert process.stdout.readline() == b"path,label,probability\n"
        assert all(process.stdout.readline() for _ in range(128))
        process.stdin.close()
        assert len(process.stdout.readlines()) == 72
    assert process.returncode == 0


def test_only_one_batch_of_images_is_in_memory(bundle: Path) -> None:
    alive = peak = 0

    def count_deleted() -> None:
        nonlocal alive
        alive -= 1

    def images() -> Iterator[np.ndarray]:
        nonlocal alive, peak
        for _ in range(1000):
            pixels = np.zeros((28, 28, 1), np.uint8)
            weakref.finalize(pixels, count_deleted)
            alive += 1
            peak = max(peak, alive)
            yield pixels
            del pixels

    assert sum(1 for _ in Predictor(bundle).rows(images(), 32)) == 1000
    assert 32 <= peak <= 66


def test_a_size_that_the_network_does_not_accept_is_a_bad_image(upright: Upright, tmp_path: Path) -> None:
    bundle = write_unresized_bundle(tmp_path / "export/nin")
    for number, size in enumerate((28, 2, 2, 28)):
        Image.new("L", (size, size)).save(tmp_path / f"{number}.png")
    answer = upright("infer", bundle, *(f"{n}.png" for n in range(4)), "--format", "jsonl")
    assert answer.code == 2 and [json.loads(line)["path"] for line in answer.out.splitlines()] == ["0.png", "3.png"]
    for number, line in zip((1, 2), answer.err.splitlines(), strict=True):
        assert line.startswith(f"upright: error: '{number}.png': The model does not accept images of 2x2 pixels: ")


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


def test_threads_and_providers_reach_onnxruntime(
    upright: Upright, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bundle / "samples/00.png"
    for provider in ("cpu", "CPU", "CPUExecutionProvider"):
        assert upright("infer", bundle, image, "--providers", provider, "--threads", 2).code == 0
    session = Predictor(bundle, threads=3, providers=("cpu",)).session
    assert session.get_session_options().intra_op_num_threads == 3
    answer = upright("infer", bundle, image, "--providers", "tensorrt", "cpu")
    assert answer.code == 2 and "has no provider 'tensorrt', only " in answer.err and "cpu" in answer.err
    # A build with CUDA on a machine without CUDA's libraries.
    available = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *available])
    real = onnxruntime.InferenceSession
    cpu_only = lambda *args, providers, **kwargs: real(*args, providers=["CPUExecutionProvider"])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", cpu_only)
    answer = upright("infer", bundle, image, "--providers", "cuda")
    message = "onnxruntime cannot start the provider cuda: its driver or libraries are missing"
    assert answer.code == 2 and message in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "0"), "threads must be at least 1, got 0; without it, there are as many as cores."),
        (("--max-pixels", "0"), "max_pixels must be at least 1, got 0."),
        (("--max-pixels", "100"), "28x28 pixels are more than the limit of 100"),
    ],
)
def test_limits(options: tuple[str, ...], message: str, upright: Upright, bundle: Path) -> None:
    answer = upright("infer", bundle, bundle / "samples/00.png", *options)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("settings", [{}, {"ORT_DISABLE_TELEMETRY": "0"}])
def test_telemetry_of_onnxruntime_is_off_by_default(settings: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    # Telemetry first writes an identifier into the home folder. Variables of continuous integration also disable it.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "upright", "infer", str(bundle), str(bundle / "samples/00.png")]
    subprocess.run(command, env=environment | settings | {"HOME": str(home)}, capture_output=True, check=True)
    assert bool(list(home.rglob("deviceid"))) == bool(settings)
