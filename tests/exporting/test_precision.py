"""What else than float32: the gate, and bundles that hold several precisions."""

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

pytestmark = pytest.mark.usefixtures("traced_once")

DIGITS = ("--data", str(ROOT / "configs/data/digits.yaml"), "--wandb", "off", "--trainer.max_epochs")


def right(lost: int, gained: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of ``n`` images, of which the first were lost and the next gained."""
    was, now = np.ones(n, bool), np.ones(n, bool)
    was[lost : lost + gained] = now[:lost] = False
    return was, now


@pytest.mark.parametrize(("lost", "gained", "n"), [(9, 2, 6000), (0, 0, 300), (30, 10, 500)])
def test_the_interval_is_that_of_bonett_and_price(lost: int, gained: int, n: int) -> None:
    drop = Drop.of(*right(lost, gained, n), np.arange(n))
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.96 * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert drop.points == pytest.approx(100 * (lost - gained) / n)
    assert (drop.low, drop.high) == pytest.approx((100 * (p - q - half), 100 * (p - q + half)))


def test_views_of_one_image_are_no_new_evidence() -> None:
    was, now = right(9, 2, 600)
    alone = Drop.of(was, now, np.arange(600))
    repeated = Drop.of(was.repeat(5), now.repeat(5), np.arange(600).repeat(5))
    assert repeated == pytest.approx(alone)


def test_what_decides_where_a_split_is_too_small() -> None:
    drop = Drop.of(*right(0, 0, 300), np.arange(300))
    assert drop.too_small(0.5) and drop.high > 0.5 and drop.holds(0.5) and not drop.too_small(1.0)
    assert not Drop.of(*right(2, 0, 300), np.arange(300)).holds(0.5)
    # Large enough to tell: what was seen is within 0.5 points, what may be is not.
    drop = Drop.of(*right(8, 0, 2000), np.arange(2000))
    assert drop.points == pytest.approx(0.4) and not drop.too_small(0.5) and not drop.holds(0.5)


def test_calibration_knows_no_judge() -> None:
    data = Digits(angles=(0.0, 30.0))
    ours = [hash(image.tobytes()) for image in map(np.asarray, data.source.images)]
    allowed = {ours[i] for i in data.splits["train"]}
    # As if the checkpoint had been judged by some of what these data call training images.
    judges = torch.from_numpy(data.images.facts["hash"][data.splits["train"][:400]])
    allowed -= {ours[i] for i in data.splits["train"][:400]}
    images = [image for batch in calibration_batches(data, judges, Form(), 300) for image in batch]
    assert len(images) == 300 and {hash(image.tobytes()) for image in images} <= allowed
    batches = list(calibration_batches(data, judges, Form(batch=7, size=(20, 24)), 10))
    assert [batch.shape for batch in batches] == [(7, 20, 24, 1)] * 2


class Fake:
    """Three layers of which the second one does the harm."""

    name = "int8"
    layers = dict.fromkeys("abcd", ("node",))

    def convert(self, layers) -> frozenset[str]:
        return frozenset(layers)


def comparison(lost: int) -> Comparison:
    was, now = right(lost, 0, 1000)
    said = [np.stack([~answers, answers], axis=1).astype(float) for answers in (was, now)]
    return Comparison([str(i) for i in range(1000)], np.ones(1000, np.int64), np.arange(1000), *said, {})


@pytest.fixture
def harms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "open_session", lambda content: content)
    # The mean change of a probability: 0.4 by b, 0.2 by a, none by the others.
    change = {"a": 0.2, "b": 0.4}
    monkeypatch.setattr(
        gate, "run_batch", lambda session, batch: [np.full((2, 2), sum(change.get(layer, 0) for layer in session))]
    )


def test_the_most_harmful_layer_goes_back_first(harms: None, capsys) -> None:
    images = lambda: iter([np.zeros((2, 1, 1, 1), np.uint8)])  # noqa: E731
    passed = gate.convert_within(Fake(), lambda layers: comparison(20 * ("b" in layers)), frozenset(), images, 0.5)
    assert passed.content == {"a", "c", "d"} and passed.float_layers == {"b": pytest.approx(0.4)}
    assert "b stays float32: alone it changes probabilities by 0.4." in capsys.readouterr().out
    passed = gate.convert_within(Fake(), lambda layers: comparison(0), frozenset(), images, 0.5)
    assert passed.content == set(Fake.layers) and passed.float_layers == {}
    with pytest.raises(
        GateError, match=r"loses 2.00 points .* even with 2 of 4 layers in float32, .*: b 0.4, a 0.2, c"
    ):
        gate.convert_within(Fake(), lambda layers: comparison(20), frozenset(), images, 0.5)


def test_layers_that_there_is_no_time_for_come_last(harms: None, monkeypatch) -> None:
    monkeypatch.setattr(gate, "RANKING_SECONDS", -1.0)
    found = gate.rank_layers(Fake(), frozenset(), lambda: iter([np.zeros((2, 1, 1, 1), np.uint8)]))
    assert found == dict.fromkeys("abcd", 0.0)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A folder with the bundles `cnn`, `stn` and `lstm` of all precisions. Tests do not write into it."""
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
    assert bundle.precisions == ["fp32", "fp16", "int8"]
    parity = json.loads((several / name / "parity.json").read_text())
    for precision, figures in parity["precisions"].items():
        assert figures["bytes"] == bundle.model(precision).stat().st_size
        assert set(figures["speed"]) == {"1", "64"} and figures["drop"] <= 5
        assert len(figures["flipped"]) == round((1 - figures["agreement"]) * parity["images"])
        assert all(
            set(sample) == {"name", "label", "pytorch", "onnxruntime", "difference"} for sample in figures["flipped"]
        )
        predictor = Predictor(several / name, precision)
        found = [predictor(bundle.folder / sample["file"]).label for sample in bundle.samples]
        assert found == [bundle.spec.classes[row.argmax()] for row in bundle.expected(precision)]
    sizes = [parity["precisions"][precision]["bytes"] for precision in ("fp32", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    card = (several / name / "README.md").read_text()
    assert "| int8      | `model.int8.onnx` |" in card and "7 bits (reduced range)" in card


def test_what_is_quantised_and_what_is_not(several: Path) -> None:
    graphs = {name: onnx.load(several / name / "model.int8.onnx").graph for name in ("cnn", "stn", "lstm")}
    made = {name: {output: node for node in graph.node for output in node.output} for name, graph in graphs.items()}
    # Of the transformer's four layers none.
    for name, floats in (("cnn", 0), ("stn", 4)):
        weights = {tensor.name: tensor for tensor in graphs[name].initializer}
        layers = [node for node in graphs[name].node if node.op_type in ("Conv", "Gemm")]
        lowered = [node for node in layers if made[name].get(node.input[1], node).op_type == "DequantizeLinear"]
        assert len(lowered) == 5 and len(layers) == 5 + floats
        for node in lowered:
            source = made[name][node.input[1]]
            values = onnx.numpy_helper.to_array(weights[source.input[0]])
            scales = onnx.numpy_helper.to_array(weights[source.input[1]])
            # A scale for each channel; 7 bits, whose products no processor sums wrongly.
            assert values.dtype == np.int8 and np.abs(values).max() <= 64 and scales.shape == (len(values),)
            zero = made[name][node.input[0]].input[2]
            assert onnx.numpy_helper.to_array(weights[zero]).dtype == np.uint8
    kinds = [node.op_type for node in graphs["lstm"].node]
    assert kinds.count("DynamicQuantizeLSTM") == 1 and "LSTM" not in kinds


def test_half_precision_is_within_the_network_alone(several: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(several / "stn/model.fp16.onnx"))
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Cast":
            continue
        halves = any(types.get(name) == onnx.TensorProto.FLOAT16 for name in node.output)
        assert halves == module_of(node).startswith("network"), node.name
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in model.graph.output)


def test_verify_finds_a_processor_on_which_int8_is_another(several: Path, tmp_path: Path, upright: Upright) -> None:
    shutil.copytree(several / "cnn", tmp_path / "cnn")
    path = tmp_path / "cnn/samples/expected.json"
    expected = json.loads(path.read_text())
    expected[3]["probabilities"]["int8"].reverse()
    path.write_text(json.dumps(expected))
    (tmp_path / "cnn" / SUMS).write_text(checksums(tmp_path / "cnn"))
    answer = upright("verify", tmp_path / "cnn")
    assert answer.code == 1 and "(int8, batches of 1): 1 of 16 samples" in answer.err
    assert "in the first class: samples/03.png. Where a processor has no instructions" in answer.err


def test_infer_by_another_precision(several: Path, upright: Upright, bundle: Path) -> None:
    pictures = several / "cnn/samples"
    rows = {p: upright("infer", several / "cnn", pictures, "--precision", p).out for p in ("fp32", "int8")}
    assert rows["fp32"].count("\n") == rows["int8"].count("\n") == 16 and rows["fp32"] != rows["int8"]
    answer = upright("infer", bundle, pictures, "--precision", "int8")
    assert answer.code == 2 and "holds fp32, not int8; `upright export CHECKPOINT --precision int8` makes" in answer.err


def test_a_precision_that_loses_too_much_leaves_nothing(
    run_folder: Path, upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = Reference.compare

    def compare_wrongly(*arguments) -> Comparison:
        comparison = compare(*arguments)
        same = comparison.differences.max() < 1e-5
        return comparison if same else replace(comparison, actual=1 - comparison.actual)

    monkeypatch.setattr(Reference, "compare", compare_wrongly)
    answer = upright("export", run_folder, "--precision", "int8")
    assert (
        answer.code == 1
        and "int8 loses" in answer.err
        and "of 5 layers in float32, so no bundle was written" in answer.err
    )
    assert "stays float32" in answer.out and list(Path("export").iterdir()) == []


def test_a_processor_may_be_trusted_with_the_full_range(run_folder: Path, upright: Upright) -> None:
    answer = upright("export", run_folder, "--precision", "int8", "--full-range", "--max-drop", "5")
    assert answer.code == 0, answer.err
    graph = onnx.load("export/small/model.int8.onnx").graph
    assert (
        max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in graph.initializer if t.data_type == 3) > 64
    )
    manifest = json.loads(Path("export/small/manifest.json").read_text())
    assert "8 bits (full range: needs VNNI or similar)" in manifest["precisions"]["int8"]["how"]
    assert "270 source images are too few" not in answer.out and "does not pay on this machine" in answer.out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--max-drop", "-1"), "--max-drop is in points of accuracy, from 0 to 100; got -1."),
        (("--full-range",), "--full-range changes int8's weights; it needs --precision int8."),
        (("--precision", "int4"), "invalid choice: 'int4'"),
        (("--opset", "17"), "--opset must be from 18 to 25, got 17."),
        (("--opset", "99"), "--opset must be from 18 to 25, got 99."),
        (("--batch", "0"), "--batch must be at least 1, got 0; omit it to allow any batch."),
        (("--size", "28"), "argument --size: must be HEIGHTxWIDTH in pixels, like 28x28; got '28'"),
        (("--size", "0x28"), "--size must be at least 1x1, got 0x28."),
        (("--name", "a/b"), "--name 'a/b' must be a plain folder name."),
    ],
)
def test_wrong_options_are_said_before_anything_is_read(options: tuple[str, ...], text: str, upright: Upright) -> None:
    answer = upright("export", "no-such-checkpoint", *options)
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1
