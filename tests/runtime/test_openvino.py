"""OpenVINO as an engine: the same answers as onnxruntime, or a refusal."""

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_orientation_bundle, write_unresized_bundle
from tests.runtime.test_server import serving
from tests.test_house import loaded_by
from upright import OrientationPredictor, Predictor
from upright.errors import EngineError, GateError, ImageError, UserError
from upright.runtime import benchmark, openvino, speed
from upright.runtime.bundle import EXPECTED, SUMS, checksums
from upright.runtime.predictor import open_session, run_batch
from upright.runtime.speed import machine

DIGITS = ROOT / "export/digits"
ENGINE = ("--engine", "openvino")


pytestmark = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")


@pytest.fixture
def other_answers(tmp_path: Path) -> Path:
    """A bundle that records an answer that no engine gives, like an engine that computes something else."""
    bundle = tmp_path / "export/digits"
    shutil.copytree(DIGITS, bundle)
    samples = json.loads((bundle / EXPECTED).read_text())
    samples[3]["probabilities"]["fp32"][7] += 2e-4
    (bundle / EXPECTED).write_text(json.dumps(samples))
    (bundle / SUMS).write_text(checksums(bundle))
    return bundle


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_answers_are_those_of_onnxruntime(precision: str) -> None:
    engines: list[Any] = ["onnxruntime", "openvino"]
    reference, predictor = (Predictor(DIGITS, precision, threads=1, engine=engine) for engine in engines)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 1), np.uint8) for size in [(28, 28)] * 5 + [(40, 31)] * 3 + [(8, 9)]]
    expected, actual = (np.stack(list(each.rows(images))) for each in (reference, predictor))
    assert np.abs(expected - actual).max() < (1e-5 if precision == "fp32" else 5e-3)
    assert predictor.check_samples() < (1e-5 if precision == "fp32" else 5e-3)
    with pytest.raises(ImageError, match=r"does not accept images of \(H, W, C\) 28x28x3, only \?x\?x1"):
        predictor.run(np.zeros((1, 28, 28, 3), np.uint8))


def test_orientation_and_all_outputs_of_a_fixed_graph(tmp_path: Path) -> None:
    bundle = write_orientation_bundle(tmp_path / "sky", side=40, batch=3)
    engines: list[Any] = ["onnxruntime", "openvino"]
    reference, predictor = (OrientationPredictor(bundle, threads=1, engine=engine) for engine in engines)
    assert predictor.output_names == reference.output_names == ["orientation", "theta"]
    for one, other in zip(predictor.session.get_inputs(), reference.session.get_inputs(), strict=True):
        assert (one.name, one.type, one.shape) == (other.name, other.type, other.shape)
    files = predictor.bundle.sample_files
    assert len(files) == 4
    expected, actual = reference.outputs(files), predictor.outputs(files, ["theta", "orientation"])
    assert list(actual) == ["theta", "orientation"]
    for name, rows in actual.items():
        assert rows.shape == expected[name].shape
        np.testing.assert_allclose(rows, expected[name], atol=0.05)  # degrees
    assert abs(predictor(files[1]).angle) > 1


def test_threads_share_a_predictor_and_another_process_opens_it() -> None:
    predictor = Predictor(DIGITS, threads=1, engine="openvino")
    images = [np.full((1, 28, 28, 1), value, np.uint8) for value in range(0, 250, 10)]
    expected = list(map(predictor.run, images))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(predictor.run, images * 8))
    np.testing.assert_allclose(together, expected * 8, atol=1e-6)
    again = pickle.loads(pickle.dumps(predictor))
    assert isinstance(again.session, openvino.OpenVINOSession)
    np.testing.assert_allclose(again.run(images[3]), expected[3], atol=1e-6)


def test_the_settings_reach_openvino() -> None:
    model = Predictor(DIGITS, threads=1, engine="openvino").session._model
    assert model.get_property("INFERENCE_NUM_THREADS") == 1 and not model.get_property("ENABLE_CPU_PINNING")
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


@pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & set(machine()["instructions"]), reason="this processor has no bfloat16"
)
def test_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(openvino.SETTINGS, "INFERENCE_PRECISION_HINT")
    with pytest.raises(GateError, match=r"\(openvino, fp32, batches of 1\): .* Use the engine onnxruntime\."):
        Predictor(DIGITS, engine="openvino")


def test_an_engine_with_other_answers_is_refused(
    upright: Upright, other_answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = other_answers / "samples/00.png"
    assert upright("infer", other_answers, image).code == 0
    message = "(openvino, fp32, batches of 1): 1 of 16 samples differ by up to 0.0002 (allowed 0.0001)"
    for command in (("infer", other_answers, image), ("serve", other_answers, "--port", 0)):
        answer = upright(*command, *ENGINE)
        assert answer.code == 1 and answer.out == "" and answer.err.count("\n") == 1
        assert message in answer.err and answer.err.endswith(": samples/03.png. Use the engine onnxruntime.\n")
    # The other precision agrees.
    assert upright("infer", other_answers, image, "--precision", "int8", *ENGINE).code == 0
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "STARTS", 1)
    answer = upright("benchmark", other_answers, "--batches", 1, *ENGINE)
    assert answer.code == 0, answer.err
    assert "- OpenVINO fp32 was not measured: its process ended with 1: " in answer.out and message in answer.out
    assert "| OpenVINO fp32 " not in answer.out and "| OpenVINO int8 " in answer.out
    assert "| ONNX Runtime fp32 " in answer.out and "| ONNX Runtime int8 " not in answer.out


def test_signals_find_their_stack_after_models_are_gone() -> None:
    # A process of its own, because a failure ends it.
    program = (
        "import faulthandler, os, signal\n"
        "from upright import Predictor\n"
        "faulthandler.enable()  # a stack for signals\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "first = Predictor('export/digits', engine='openvino')\n"
        "second = Predictor('export/digits', engine='openvino')\n"
        "del first, second\n"
        "os.kill(os.getpid(), signal.SIGCHLD)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_infer_and_verify(upright: Upright) -> None:
    options = (DIGITS, DIGITS / "samples", "--format", "jsonl")
    lines = [upright("infer", *options, *engine).out.splitlines() for engine in ((), ENGINE)]
    assert len(lines[0]) == len(lines[1]) == 16
    for one, other in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert one["label"] == other["label"] and one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    answer = upright("verify", DIGITS, *ENGINE)
    assert answer.code == 0 and ", fp32 within " in answer.out.replace("; ", ", ") and "int8 in openvino" in answer.out


def test_infer_loads_no_other_heavy_package() -> None:
    arguments = ["infer", str(DIGITS), str(DIGITS / "samples/00.png"), *ENGINE]
    assert loaded_by(f"from upright.cli import main\nassert main({arguments!r}) == 0") == {"openvino"}


def test_serve() -> None:
    with serving(DIGITS, *ENGINE) as running:
        assert running.ask("GET", "/v2/models/digits").json["platform"] == "openvino"
        image = DIGITS / "samples/00.png"
        (result,) = running.classify(image.read_bytes()).json["results"]
        assert result["label"] == Predictor(DIGITS)(image).label


@pytest.mark.slow
def test_small_images_of_a_network_that_does_not_resize(tmp_path: Path) -> None:
    bundle = write_unresized_bundle(tmp_path / "unresized")
    reference, predictor = Predictor(bundle, threads=1), Predictor(bundle, threads=1, engine="openvino")
    for size in ((20, 20), (40, 20), (37, 51)):
        image = np.random.default_rng(0).integers(0, 256, (1, *size, 1), np.uint8)
        np.testing.assert_allclose(predictor.run(image), reference.run(image), atol=1e-5)
    with pytest.raises(ImageError, match=r"not resize images of 19x20 pixels, .* needs at least 20x20; use the engine"):
        predictor(np.zeros((19, 20), np.uint8))
    # The reason: OpenVINO itself does not refuse an image of 2x2 pixels.
    large, small = (run_batch(predictor.session, np.full((1, n, n, 1), 50, np.uint8))[0] for n in (20, 2))
    assert (small == large).all()


def test_a_model_that_openvino_cannot_load() -> None:
    node = helper.make_node("Unknown", ["images"], ["y"], domain="nobody")
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [1]) for name in ("images", "y")]
    model = helper.make_model(helper.make_graph([node], "graph", ends[:1], ends[1:]))
    with pytest.raises(EngineError, match=r"^openvino 20\S+ cannot load the model: .*Unknown"):
        open_session(model.SerializeToString(), engine="openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ["cuda", "cpu"]}, "providers are for the engine onnxruntime, got cuda, cpu; omit them."),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"engine": "tensorrt"}, "engine must be onnxruntime or openvino, got 'tensorrt'."),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Predictor(DIGITS, **{"engine": "openvino"} | options)


def test_the_error_names_the_extra(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert find_spec("openvino") is None
    image = DIGITS / "samples/00.png"
    for command in (
        ("infer", DIGITS, image),
        ("verify", DIGITS),
        ("benchmark", DIGITS),
        ("serve", DIGITS, "--port", 0),
    ):
        answer = upright(*command, *ENGINE)
        assert answer.code == 2 and answer.err.count("\n") == 1
        assert "The engine openvino needs the package 'openvino': pip install 'upright[openvino]'." in answer.err
    assert upright("infer", DIGITS, image).code == 0


SIZES = """
import sys
import numpy as np
from upright import Predictor

def resident():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

predictor, generator = Predictor(sys.argv[1], threads=1, engine="openvino"), np.random.default_rng(0)
for count in (600, 600):
    for height, width in generator.integers(20, 400, (count, 2)):
        predictor.run(np.zeros((1, height, width, 1), np.uint8))
    print(resident())
predictor.run(np.zeros((1, 4000, 4000, 1), np.uint8))
print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_images_of_many_sizes_do_not_fill_the_memory() -> None:
    command = [sys.executable, "-c", SIZES, str(DIGITS)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    first, second, after_large = map(float, process.stdout.split())
    print(f"{first:.0f} MB after 600 sizes, {second:.0f} MB after 1200, {after_large:.0f} MB after a large image")
    # Each size would take 0.8 MB more with the default of OpenVINO's cache.
    assert second < first + 60 and after_large < second + 30
