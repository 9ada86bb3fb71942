"""Lower precisions: the gate, and bundles with several precisions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.conftest import ROOT, Upright
from upright.data.digits import Digits
from upright.errors import GateError
from upright.exporting import gate
from upright.exporting.graph import Form, module_of
from upright.exporting.parity import Comparison, Drop, Reference, calibration_batches
from upright.runtime.bundle import SUMS, Bundle, checksums
from upright.runtime.predictor import Predictor
from upright.runtime.task import Classification

pytestmark = pytest.mark.usefixtures("traced_once")

DIGITS = ("--data", str(ROOT / "configs/data/digits.yaml"), "--wandb", "off", "--trainer.max_epochs")


def correct(lost: int, gained: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the correct images before and after. The first ``lost`` are lost, and the next ``gained`` are gained."""
    before, after = np.ones(n, bool), np.ones(n, bool)
    before[lost : lost + gained] = after[:lost] = False
    return before, after


@pytest.mark.parametrize(("lost", "gained", "n"), [(9, 2, 6000), (0, 0, 300), (30, 10, 500)])
def test_the_interval_is_that_of_bonett_and_price(lost: int, gained: int, n: int) -> None:
    drop = Drop.of(*correct(lost, gained, n), np.arange(n))
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.96 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert drop.points == pytest.approx(100 * (lost - gained) / n)
    assert (drop.low, drop.high) == pytest.approx((100 * (p - q - half), 100 * (p - q + half)))


def test_views_of_one_image_count_once() -> None:
    before, after = correct(9, 2, 600)
    single = Drop.of(before, after, np.arange(600))
    repeated = Drop.of(before.repeat(5), after.repeat(5), np.arange(600).repeat(5))
    assert repeated == pytest.approx(single)


def test_the_measured_drop_decides_on_a_small_split() -> None:
    drop = Drop.of(*correct(0, 0, 300), np.arange(300))
    assert drop.is_split_too_small(0.5) and drop.high > 0.5 and drop.is_within(0.5)
    assert not drop.is_split_too_small(1.0)
    assert not Drop.of(*correct(2, 0, 300), np.arange(300)).is_within(0.5)
    # This split is large enough. The measured drop is within 0.5 points, but the end of the interval is not.
    drop = Drop.of(*correct(8, 0, 2000), np.arange(2000))
    assert drop.points == pytest.approx(0.4) and not drop.is_split_too_small(0.5) and not drop.is_within(0.5)


def test_calibration_uses_no_validation_or_test_images() -> None:
    data = Digits(angles=(0.0, 30.0))
    hashes = [hash(image.tobytes()) for image in map(np.asarray, data.source.images)]
    allowed = {hashes[i] for i in data.splits["train"]}
    # Assume that the checkpoint was validated on 400 of the images that are training images of these data.
    excluded = torch.from_numpy(data.images.facts["hash"][data.splits["train"][:400]])
    allowed -= {hashes[i] for i in data.splits["train"][:400]}
    images = [image for batch in calibration_batches(data, excluded, Form(), 300) for image in batch]
    assert len(images) == 300 and {hash(image.tobytes()) for image in images} <= allowed
    batches = list(calibration_batches(data, excluded, Form(batch=7, size=(20, 24)), 10))
    assert [batch.shape for batch in batches] == [(7, 20, 24, 1)] * 2


class FakeConverter:
    """A converter of four layers whose graph is the set of converted layers."""

    name = "int8"
    layers = dict.fromkeys("abcd", ("node",))

    def convert(self, layers) -> frozenset[str]:
        return frozenset(layers)


def comparison(lost: int) -> Comparison:
    rows = [np.stack([~each, each], axis=1).astype(float) for each in correct(lost, 0, 1000)]
    return Comparison(
        [str(i) for i in range(1000)],
        np.ones(1000, np.int64),
        np.arange(1000),
        *rows,
        {},
        Classification(("a", "b")),
        np.ones(1000, bool),
    )


@pytest.fixture
def fake_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "open_session", lambda content: content)
    # Layer b changes probabilities by 0.4, layer a by 0.2, and the others do not change them.
    change = {"a": 0.2, "b": 0.4}
    monkeypatch.setattr(
        gate, "run_batch", lambda session, batch: [np.full((2, 2), sum(change.get(layer, 0) for layer in session))]
    )


def test_the_most_harmful_layer_is_set_back_first(fake_sessions: None, capsys) -> None:
    images = lambda: iter([np.zeros((2, 1, 1, 1), np.uint8)])  # noqa: E731
    compare = lambda layers: comparison(20 * ("b" in layers))  # noqa: E731
    passed = gate.convert_within(FakeConverter(), compare, frozenset(), images, 0.5)
    assert passed.content == {"a", "c", "d"} and passed.float_layers == {"b": pytest.approx(0.4)}
    assert "b stays float32: it changes answers by 0.4." in capsys.readouterr().out
    passed = gate.convert_within(FakeConverter(), lambda layers: comparison(0), frozenset(), images, 0.5)
    assert passed.content == set(FakeConverter.layers) and passed.float_layers == {}
    with pytest.raises(
        GateError, match=r"loses 2.00 points .* even with 2 of 4 layers in float32\. .*: b 0.4, a 0.2, c"
    ):
        gate.convert_within(FakeConverter(), lambda layers: comparison(20), frozenset(), images, 0.5)


def test_layers_after_the_time_limit_rank_last(fake_sessions: None, monkeypatch) -> None:
    monkeypatch.setattr(gate, "RANKING_SECONDS", -1.0)
    images = lambda: iter([np.zeros((2, 1, 1, 1), np.uint8)])  # noqa: E731
    harms = gate.rank_layers(FakeConverter(), frozenset(), images, Classification(("a", "b")))
    assert harms == dict.fromkeys("abcd", 0.0)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A folder with the bundles `cnn`, `stn` and `lstm` in all precisions. Tests do not write into it."""
    from upright.cli import main

    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, config in (("cnn", "lenet_mnist"), ("lstm", "lstm")):
            assert main(["fit", "--config", str(ROOT / f"configs/{config}.yaml"), "--name", name, *DIGITS, "2"]) == 0
        for name, run in (
            ("cnn", "checkpoints/cnn"),
            ("lstm", "checkpoints/lstm"),
            ("stn", trained / "checkpoints/small"),
        ):
            options = ["--name", name, "--precision", "int8", "fp16", "--max-drop", "5"]
            assert main(["export", str(run), *options]) == 0
    return folder / "export"


@pytest.mark.parametrize("name", ["cnn", "stn", "lstm"])
def test_a_bundle_of_several_precisions(name: str, several: Path, upright: Upright) -> None:
    answer = upright("verify", several / name)
    assert answer.code == 0 and all(f"{precision} within" in answer.out for precision in ("fp32", "fp16", "int8"))
    bundle = Bundle.open(several / name)
    for precision in bundle.precisions:
        model = onnx.load(bundle.model(precision))
        # Of the quantized graphs, only that of the LSTM needs an operator of onnxruntime.
        domains = {"", "com.microsoft"} if (name, precision) == ("lstm", "int8") else {""}
        assert model.ir_version == 8 and {entry.domain for entry in model.opset_import} == domains
    assert bundle.precisions == ["fp32", "fp16", "int8"]
    parity = json.loads((several / name / "parity.json").read_text())
    for precision, metrics in parity["precisions"].items():
        assert metrics["bytes"] == bundle.model(precision).stat().st_size
        assert set(metrics["speed"]) == {"1", "64"} and metrics["drop"] <= 5
        assert len(metrics["flipped"]) == round((1 - metrics["agreement"]) * parity["images"])
        assert all(
            set(sample) == {"name", "label", "pytorch", "onnxruntime", "difference"} for sample in metrics["flipped"]
        )
        predictor = Predictor(several / name, precision)
        labels = [predictor(bundle.folder / sample["file"]).label for sample in bundle.samples]
        assert labels == [bundle.spec.classes[row.argmax()] for row in bundle.expected(precision)]
    sizes = [parity["precisions"][precision]["bytes"] for precision in ("fp32", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    card = (several / name / "README.md").read_text()
    assert "| int8      | `model.int8.onnx` |" in card and "7 bits (reduced range)" in card


def test_layers_that_are_quantized(several: Path) -> None:
    graphs = {name: onnx.load(several / name / "model.int8.onnx").graph for name in ("cnn", "stn", "lstm")}
    producers = {
        name: {output: node for node in graph.node for output in node.output} for name, graph in graphs.items()
    }
    # The convolutions of the transformer stay float32.
    for name, floats in (("cnn", 0), ("stn", 5)):
        weights = {tensor.name: tensor for tensor in graphs[name].initializer}
        layers = [node for node in graphs[name].node if node.op_type in ("Conv", "Gemm")]
        by_name = producers[name]
        quantized = [node for node in layers if by_name.get(node.input[1], node).op_type == "DequantizeLinear"]
        assert len(quantized) == 5 and len(layers) == 5 + floats
        for node in quantized:
            source = by_name[node.input[1]]
            values = onnx.numpy_helper.to_array(weights[source.input[0]])
            scales = onnx.numpy_helper.to_array(weights[source.input[1]])
            # There is a scale for each channel. Weights have 7 bits, so that no processor overflows.
            assert values.dtype == np.int8 and np.abs(values).max() <= 64 and scales.shape == (len(values),)
            zero = by_name[node.input[0]].input[2]
            assert onnx.numpy_helper.to_array(weights[zero]).dtype == np.uint8
    kinds = [node.op_type for node in graphs["lstm"].node]
    assert kinds.count("DynamicQuantizeLSTM") == 1 and "LSTM" not in kinds


def test_only_the_network_is_in_half_precision(several: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(several / "stn/model.fp16.onnx"))
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Cast":
            continue
        halves = any(types.get(name) == onnx.TensorProto.FLOAT16 for name in node.output)
        assert halves == module_of(node).startswith("network"), node.name
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in model.graph.output)


def test_verify_detects_a_processor_with_other_int8_predictions(
    several: Path, tmp_path: Path, upright: Upright
) -> None:
    shutil.copytree(several / "cnn", tmp_path / "cnn")
    path = tmp_path / "cnn/samples/expected.json"
    expected = json.loads(path.read_text())
    expected[3]["probabilities"]["int8"].reverse()
    path.write_text(json.dumps(expected))
    (tmp_path / "cnn" / SUMS).write_text(checksums(tmp_path / "cnn"))
    answer = upright("verify", tmp_path / "cnn")
    assert answer.code == 1 and "(onnxruntime, int8, batches of 1): 1 of 16 samples" in answer.err
    assert "in the first class: samples/03.png. On a processor without instructions" in answer.err


def test_infer_by_another_precision(several: Path, upright: Upright, bundle: Path) -> None:
    images = several / "cnn/samples"
    rows = {p: upright("infer", several / "cnn", images, "--precision", p).out for p in ("fp32", "int8")}
    assert rows["fp32"].count("\n") == rows["int8"].count("\n") == 16 and rows["fp32"] != rows["int8"]
    answer = upright("infer", bundle, images, "--precision", "int8")
    message = "holds fp32, not int8; `upright export CHECKPOINT --precision int8` writes"
    assert answer.code == 2 and message in answer.err


def test_a_precision_that_loses_too_much_writes_no_bundle(
    run_folder: Path, upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = Reference.compare

    def compare_wrongly(*arguments) -> Comparison:
        comparison = compare(*arguments)
        same = comparison.differences.max() < 5e-5
        return comparison if same else replace(comparison, actual=1 - comparison.actual)

    monkeypatch.setattr(Reference, "compare", compare_wrongly)
    answer = upright("export", run_folder, "--precision", "int8")
    assert (
        answer.code == 1
        and "int8 loses" in answer.err
        and "of 5 layers in float32. No bundle was written." in answer.err
    )
    assert "stays float32" in answer.out and list(Path("export").iterdir()) == []


def test_the_full_range_of_weights(run_folder: Path, upright: Upright) -> None:
    answer = upright("export", run_folder, "--precision", "int8", "--full-range", "--max-drop", "5")
    assert answer.code == 0, answer.err
    graph = onnx.load("export/small/model.int8.onnx").graph
    assert (
        max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in graph.initializer if t.data_type == 3) > 64
    )
    manifest = json.loads(Path("export/small/manifest.json").read_text())
    assert "8 bits (full range: needs VNNI or similar)" in manifest["precisions"]["int8"]["how"]
    assert "270 source images are too few" not in answer.out and "is not faster than fp32 on this machine" in answer.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "-1"), "--max-drop must be from 0 to 100 points of accuracy, got -1."),
        (("--full-range",), "--full-range changes the weights of int8; give --precision int8, too."),
        (("--precision", "int4"), "invalid choice: 'int4'"),
        (("--opset", "17"), "--opset must be from 18 to 25, got 17."),
        (("--opset", "99"), "--opset must be from 18 to 25, got 99."),
        (("--batch", "0"), "--batch must be at least 1, got 0; omit it to allow any batch."),
        (("--size", "28"), "argument --size: must be HEIGHTxWIDTH in pixels, like 28x28; got '28'"),
        (("--size", "0x28"), "--size must be at least 1x1, got 0x28."),
        (("--name", "a/b"), "--name 'a/b' must be a plain folder name."),
    ],
)
def test_options_are_checked_before_files_are_read(options: tuple[str, ...], message: str, upright: Upright) -> None:
    answer = upright("export", "no-such-checkpoint", *options)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
