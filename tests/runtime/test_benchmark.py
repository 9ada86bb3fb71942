"""`upright benchmark`: its table, its requirements, and its notes on runtimes that could not be measured."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_orientation_bundle
from upright.runtime import benchmark as benchmark_module
from upright.runtime import speed
from upright.runtime.benchmark import Runtime, find_runtimes
from upright.runtime.bundle import Bundle
from upright.runtime.task import OrientationEstimation
from upright.runtime.worker import Worker

DIGITS = ROOT / "export/digits"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(benchmark_module, "STARTS", 1)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Measure only these runtimes, because compiling takes half a minute."""
    real = find_runtimes
    find = lambda *arguments: [runtime for runtime in real(*arguments) if runtime.name in names]  # noqa: E731
    monkeypatch.setattr(benchmark_module, "find_runtimes", find)


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
        assert row["agrees"]
    assert re.search(r"within the tolerance of the bundle: ONNX Runtime \w+ for batches of 1 on 1 thread; ", answer.out)
    assert report["machine"]["processor"] and {"python", "upright", "onnxruntime"} == set(report["versions"])
    assert answer.out == Path("report/benchmark.md").read_text()
    assert answer.out.count("| ONNX Runtime ") == 8 and report["machine"]["processor"] in answer.out
    with Image.open("report/benchmark.png") as plot:
        assert plot.format == "PNG" and plot.width > plot.height


def test_an_orientation_bundle_is_compared_in_degrees(upright: Upright, tmp_path: Path) -> None:
    answer = upright("benchmark", write_orientation_bundle(tmp_path / "export/sky"), "--batches", 2, "--to", "report")
    assert answer.code == 0, answer.err
    rows = json.loads(Path("report/benchmark.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == ["ONNX Runtime fp32", "OpenVINO fp32"][: 1 + bool(find_spec("openvino"))]
    for row in rows:
        assert row["agreement"] == "4/4" and row["agrees"] and row["largest_degrees"] < 0.1
    assert "4/4, 0.00\N{DEGREE SIGN} |" in answer.out and "degrees" in answer.out and "probability" not in answer.out
    task, rows = OrientationEstimation(), np.array([[179.9, 0.5], [10, 0.5]])
    agreement = benchmark_module._agreement(task, rows, np.array([[-179.9, 0.5], [13, 0.5]]), tolerance=0.02)
    assert agreement.pop("largest_difference") == pytest.approx(2 * 0.5 * np.sin(np.deg2rad(1.5)))
    assert agreement == {"agreement": "1/2", "agrees": False, "largest_degrees": pytest.approx(3)}


def test_the_fastest_runtime_must_agree() -> None:
    values = [
        ("a", 1, 1.0, True),
        ("b", 1, 3.0, False),
        ("c", 1, 2.0, True),
        ("a", 64, 1.0, True),
        ("c", 64, 0.5, True),
    ]
    rows = [dict(zip(("runtime", "batch", "times_fp32", "agrees"), each, strict=True), threads=1) for each in values]
    assert benchmark_module._fastest(rows).endswith(": c for batches of 1; a for batches of 64")


def test_pytorch_is_measured_with_a_checkpoint(
    upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # The process of onnxruntime does not load torch, which would need more memory.
    assert eager["cold_memory"] is None or report["rows"][0]["peak_memory"] < eager["cold_memory"]
    answer = upright("benchmark", DIGITS, "--checkpoint", run)
    assert answer.code == 2 and "belongs to run 'small'" in answer.err and "was exported from 'digits'" in answer.err


@pytest.mark.slow
def test_pytorch_compiled(upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ONNX Runtime fp32", "PyTorch compiled")
    bundle, run = trained / "export/small", trained / "checkpoints/small"
    answer = upright("benchmark", bundle, "--checkpoint", run, "--batches", 2)
    assert "| PyTorch compiled  |" in answer.out or "- PyTorch compiled was not measured: " in answer.out


def test_runtimes_that_fail_are_named_and_the_others_are_measured(
    upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = find_runtimes(Bundle.open(DIGITS), None)[0]
    broken = [
        Runtime("Raising", "numpy", "upright.runtime.worker:predictor", {"bundle": 5}, 0, 0.0),
        Runtime("Ending", "numpy", "os:_exit", {"status": 3}, 0, 0.0),
    ]
    monkeypatch.setattr(benchmark_module, "find_runtimes", lambda *_: [exact, *broken])
    answer = upright("benchmark", DIGITS, "--batches", 1)
    assert answer.code == 0 and answer.out.count("| ONNX Runtime fp32 ") == 1
    assert "- Raising was not measured: " in answer.out
    assert "- Ending was not measured: " in answer.out


def test_the_last_message_of_a_dead_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os, sys\ndef load():\n  sys.stderr.write('no more\\n')\n  os._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    with pytest.raises(RuntimeError, match="its process ended with 3: no more"):
        Worker("dying:load", {}, Bundle(DIGITS))


def test_a_bundle_of_a_fixed_batch(upright: Upright, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upright("export", trained / "checkpoints/small", "--batch", 3, "--size", "28x28").code == 0
    only(monkeypatch, "ONNX Runtime fp32", "OpenVINO fp32")
    answer = upright("benchmark", "export/small", "--to", "report")
    assert answer.code == 0, answer.err
    rows = json.loads(Path("report/benchmark.json").read_text())["rows"]
    assert {row["batch"] for row in rows} == {3} and len(rows) == 1 + bool(find_spec("openvino"))
    answer = upright("benchmark", "export/small", "--batches", 1, 3)
    assert answer.code == 2 and "only accepts batches of 3 images; omit --batches" in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batches", 0), "--batches must be at least 1, got 0."),
        (("--threads", 2, -1), "--threads must be at least 1, got -1."),
        (("--checkpoint", "nope"), "Checkpoint 'nope' does not exist."),
        (("--batches", "x"), "argument --batches: invalid int value: 'x'"),
    ],
)
def test_wrong_options(options: tuple[object, ...], message: str, upright: Upright) -> None:
    answer = upright("benchmark", DIGITS, *options)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1


def test_implementations_take_turns_and_the_first_one_is_the_reference() -> None:
    calls = []

    def record(name: str, seconds: float) -> list[float]:
        calls.append(name)
        return [seconds, seconds, 9 * seconds]

    speeds = speed.side_by_side({"a": lambda: record("a", 0.004), "b": lambda: record("b", 0.001)})
    # The first round is a warm-up.
    assert calls == ["a", "b"] * (1 + speed.ROUNDS)
    assert speeds["b"].times == pytest.approx(4) and speeds["b"].quartiles == pytest.approx((4, 4))
    assert speeds["b"].p50 == pytest.approx(1) and speeds["b"].p95 == pytest.approx(9, rel=0.2)
    assert speeds["a"].per_second == pytest.approx(3 / 0.044) and speeds["a"].times == 1


def test_the_committed_bundle_is_complete_and_small(upright: Upright) -> None:
    answer = upright("verify", DIGITS)
    assert answer.code == 0 and "fp32 within" in answer.out and "int8 within" in answer.out
    assert sum(path.stat().st_size for path in DIGITS.rglob("*") if path.is_file()) < 500_000
    for precision in ("fp32", "int8"):
        records = upright("infer", DIGITS, DIGITS / "samples", "--precision", precision, "--format", "jsonl").out
        labels = [json.loads(line)["label"] for line in records.splitlines()]
        assert labels == [str(row.argmax()) for row in Bundle.open(DIGITS).expected(precision)]


def test_git_tracks_all_files_of_the_committed_bundle() -> None:
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a repository")
    tracked = subprocess.run(["git", "ls-files", "export"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    present = {path.relative_to(ROOT).as_posix() for path in DIGITS.rglob("*") if path.is_file()}
    assert set(tracked.split()) == present | {"export/README.md"}
    # Git does not convert line endings, which would break the hashes.
    assert "/export/** -text" in (ROOT / ".gitattributes").read_text()
