"""The table of runtimes: what it says, what it needs, and that it names what it could not measure."""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.images import ImageSpec
from upright.runtime import benchmark as benchmark_module
from upright.runtime import speed
from upright.runtime.benchmark import Runtime, find_runtimes
from upright.runtime.bundle import Bundle
from upright.runtime.worker import Worker

DIGITS = ROOT / "export/digits"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(benchmark_module, "STARTS", 1)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave the others out: compiling takes half a minute."""
    real = find_runtimes
    chosen = lambda *given: [runtime for runtime in real(*given) if runtime.name in names]  # noqa: E731
    monkeypatch.setattr(benchmark_module, "find_runtimes", chosen)


def test_a_table_of_the_base_install(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ONNX Runtime fp32", "ONNX Runtime int8")
    answer = upright("benchmark", DIGITS, "--batches", 4, 1, "--threads", 1, 2, "--to", "report")
    assert answer.code == 0, answer.err
    report = json.loads(Path("report/benchmark.json").read_text())
    rows = report["rows"]
    expected = [(f"ONNX Runtime {name}", n, batch) for n in (1, 2) for batch in (1, 4) for name in ("fp32", "int8")]
    assert [(row["runtime"], row["threads"], row["batch"]) for row in rows] == expected
    sizes = {f"ONNX Runtime {name}": Bundle.open(DIGITS).model(name).stat().st_size for name in ("fp32", "int8")}
    for row in rows:
        assert 0 < row["p50_milliseconds"] <= row["p95_milliseconds"] and row["images_per_second"] > 0
        assert row["bytes"] == sizes[row["runtime"]] and row["cold_seconds"] > 0
        assert row["quartiles"][0] <= row["times_fp32"] <= row["quartiles"][1]
        assert row["cold_memory"] is None or 1e7 < row["cold_memory"] <= row["peak_memory"] < 1e9
        exact = row["runtime"] == "ONNX Runtime fp32"
        assert not exact or (row["agreement"], row["largest_difference"], row["times_fp32"]) == ("16/16", 0.0, 1.0)
        assert exact or 1e-6 < row["largest_difference"] < 0.1
    assert report["machine"]["processor"] and {"python", "upright", "onnxruntime"} == set(report["versions"])
    assert answer.out == Path("report/benchmark.md").read_text()
    assert answer.out.count("| ONNX Runtime ") == 8 and report["machine"]["processor"] in answer.out
    with Image.open("report/benchmark.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_pytorch_beside_it(upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ONNX Runtime fp32", "PyTorch eager")
    bundle, run = trained / "export/small", trained / "checkpoints/small"
    for checkpoint in (run, run / "best.ckpt"):
        answer = upright("benchmark", bundle, "--checkpoint", checkpoint, "--batches", 2, "--to", "report")
        assert answer.code == 0, answer.err
    report = json.loads(Path("report/benchmark.json").read_text())
    _, eager = report["rows"]
    assert eager["runtime"] == "PyTorch eager" and eager["largest_difference"] < 1e-4
    assert eager["agreement"] == "16/16" and eager["bytes"] == (run / "best.ckpt").stat().st_size
    assert report["versions"]["torch"]
    # Onnxruntime is in a process without torch, which would take more.
    assert eager["cold_memory"] is None or report["rows"][0]["peak_memory"] < eager["cold_memory"]
    answer = upright("benchmark", DIGITS, "--checkpoint", run)
    assert answer.code == 2 and "is of run 'small'" in answer.err and "was exported from 'digits'" in answer.err


@pytest.mark.slow
def test_pytorch_compiled(upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ONNX Runtime fp32", "PyTorch compiled")
    bundle, run = trained / "export/small", trained / "checkpoints/small"
    answer = upright("benchmark", bundle, "--checkpoint", run, "--batches", 2)
    assert "| PyTorch compiled  |" in answer.out or "- PyTorch compiled was not measured: " in answer.out


def test_what_does_not_run_is_named_and_the_rest_goes_on(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = find_runtimes(Bundle.open(DIGITS), None)[0]
    broken = [
        Runtime("Raising", "numpy", "upright.runtime.worker:openvino", {"model": 5}, exact.file),
        Runtime("Ending", "numpy", "os:_exit", {"status": 3}, exact.file),
    ]
    monkeypatch.setattr(benchmark_module, "find_runtimes", lambda *given: [exact, *broken])
    answer = upright("benchmark", DIGITS, "--batches", 1)
    assert answer.code == 0 and answer.out.count("| ONNX Runtime fp32 ") == 1
    assert "- Raising was not measured: " in answer.out
    assert "- Ending was not measured: " in answer.out


def test_a_worker_that_dies_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os, sys\ndef load():\n  sys.stderr.write('no more\\n')\n  os._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    with pytest.raises(RuntimeError, match="its process ended with 3: no more"):
        Worker("dying:load", {}, ImageSpec(1, 2, 2, ("a", "b"), (0.5,), (0.5,)), [])


def test_a_bundle_of_a_fixed_batch(upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upright("export", trained / "checkpoints/small", "--batch", 3, "--size", "28x28").code == 0
    only(monkeypatch, "ONNX Runtime fp32", "OpenVINO fp32")
    answer = upright("benchmark", "export/small", "--to", "report")
    assert answer.code == 0, answer.err
    rows = json.loads(Path("report/benchmark.json").read_text())["rows"]
    assert {row["batch"] for row in rows} == {3} and len(rows) == 1 + bool(find_spec("openvino"))
    answer = upright("benchmark", "export/small", "--batches", 1, 3)
    assert answer.code == 2 and "takes 3 images at once and no other number; leave --batches out" in answer.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--batches", 0), "--batches must be at least 1, got 0."),
        (("--threads", 2, -1), "--threads must be at least 1, got -1."),
        (("--checkpoint", "nope"), "Checkpoint 'nope' does not exist."),
        (("--batches", "x"), "argument --batches: invalid int value: 'x'"),
    ],
)
def test_wrong_options(options: tuple[object, ...], text: str, upright: Upright) -> None:
    answer = upright("benchmark", DIGITS, *options)
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1


def test_turns_are_taken_in_turn_and_the_first_one_measures() -> None:
    calls = []

    def taking(name: str, seconds: float) -> list[float]:
        calls.append(name)
        return [seconds, seconds, 9 * seconds]

    found = speed.side_by_side({"a": lambda: taking("a", 0.004), "b": lambda: taking("b", 0.001)})
    # One round more than counts.
    assert calls == ["a", "b"] * (1 + speed.ROUNDS)
    assert found["b"].times == pytest.approx(4) and found["b"].quartiles == pytest.approx((4, 4))
    assert found["b"].p50 == pytest.approx(1) and found["b"].p95 == pytest.approx(9, rel=0.2)
    assert found["a"].per_second == pytest.approx(3 / 0.044) and found["a"].times == 1


def test_the_committed_bundle_is_whole_and_small(upright: Upright) -> None:
    answer = upright("verify", DIGITS)
    assert answer.code == 0 and "fp32 within" in answer.out and "int8 within" in answer.out
    assert sum(path.stat().st_size for path in DIGITS.rglob("*") if path.is_file()) < 500_000
    for precision in ("fp32", "int8"):
        records = upright("infer", DIGITS, DIGITS / "samples", "--precision", precision, "--format", "jsonl").out
        said = [json.loads(line)["label"] for line in records.splitlines()]
        assert said == [str(row.argmax()) for row in Bundle.open(DIGITS).expected(precision)]


def test_the_committed_bundle_is_what_git_holds() -> None:
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a repository")
    listed = subprocess.run(["git", "ls-files", "export"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = {path.relative_to(ROOT).as_posix() for path in DIGITS.rglob("*") if path.is_file()}
    assert set(listed.split()) == here | {"export/README.md"}
    # Nothing rewrites its lines on the way.
    assert "/export/** -text" in (ROOT / ".gitattributes").read_text()
