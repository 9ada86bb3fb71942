"""Graphs with a fixed size, a fixed batch, other outputs, or another opset."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.conftest import Upright
from upright.architectures.lenet import LeNet
from upright.architectures.nin import NiN
from upright.errors import UprightError
from upright.exporting import graph as graph_module
from upright.exporting.graph import Form, Graph, module_of, write_graph
from upright.images import ImageSpec
from upright.runtime.predictor import Predictor, open_session, run_batch
from upright.training.model import Model
from upright.training.restoring import restore

pytestmark = pytest.mark.usefixtures("traced_once")


def lenet(size: int = 28, **options: object) -> Model:
    torch.manual_seed(0)
    spec = ImageSpec(1, size, size, ("a", "b", "c"), (0.4,), (0.5,), **options)
    return Model(spec, LeNet(spec.input_shape, 3)).eval()


def operators_outside(path: Path) -> set[str]:
    """Return the operators of a graph outside of its network."""
    return {node.op_type for node in onnx.load(path).graph.node if not module_of(node)}


def test_a_graph_of_another_fixed_size_resizes_by_constants(tmp_path: Path) -> None:
    model, path = lenet(), tmp_path / "model.onnx"
    for size, resizes in (((28, 28), False), ((40, 30), True)):
        write_graph(model, path, Form(size=size))
        assert ("MatMul" in operators_outside(path)) == resizes and not operators_outside(path) & {
            "Range",
            "Shape",
            "Abs",
            "ReduceSum",
        }
        pixels = np.random.default_rng(0).integers(0, 256, (5, *size, 1), dtype=np.uint8)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        (actual,) = run_batch(open_session(path), pixels)
        assert np.abs(actual - expected).max() < 1e-5
    write_graph(model, path)
    assert {"MatMul", "Range", "Shape"} <= operators_outside(path)


def test_other_sizes_are_refused_and_smaller_batches_are_filled(tmp_path: Path) -> None:
    write_graph(lenet(), tmp_path / "model.onnx", Form(batch=4, size=(28, 28)))
    session = open_session(tmp_path / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    (together,) = run_batch(session, pixels)
    for count in (1, 3):
        (actual,) = run_batch(session, pixels[:count])
        assert actual.shape == (count, 3) and np.allclose(actual, together[:count], atol=1e-6)
    with pytest.raises(UprightError, match=r"The model does not accept images of \(H, W, C\) 30x28x1, only "):
        run_batch(session, np.zeros((1, 30, 28, 1), np.uint8))


@pytest.mark.parametrize("opset", [20, 25, *(pytest.param(n, marks=pytest.mark.slow) for n in (19, 21, 22, 23, 24))])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    model = lenet(resize="pad", background=99, interpolation="bicubic")  # the rule with the most operators
    write_graph(model, tmp_path / "model.onnx", Form(opset=opset))
    graph = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]
    # The oldest IR version by the table "Released Versions" of ONNX's Versioning.md.
    assert graph.ir_version == {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}[opset]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 31, 20, 1), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
    (actual,) = run_batch(open_session(tmp_path / "model.onnx"), pixels)
    assert np.abs(actual - expected).max() < 1e-5


def test_features_are_the_input_of_the_head() -> None:
    model, pixels = lenet(), torch.randint(0, 256, (2, 28, 28, 1), dtype=torch.uint8)
    graph = Graph(model, Form(outputs=("features", "logits"), head=("classifier.5",)))
    assert graph.names == ["probabilities", "features", "logits"]
    probabilities, features, logits = graph(pixels)
    torch.testing.assert_close(model.network.classifier[5](features), logits)
    torch.testing.assert_close(logits.softmax(dim=1), probabilities)
    with pytest.raises(UprightError, match="LeNet has no separate module for its head, so it has no output features"):
        Graph(model, Form(outputs=("features",), head=("",)))


def test_a_size_that_the_network_does_not_accept(tmp_path: Path) -> None:
    spec = ImageSpec(1, 20, 20, ("a", "b"), (0.4,), (0.5,), resize="none")
    model = Model(spec, NiN((1, 20, 20), 2, widths=(4, 4, 4), stem=(5, 1, 2))).eval()
    with pytest.raises(UprightError, match="The network does not accept images of 2x2: "):
        write_graph(model, tmp_path / "model.onnx", Form(size=(2, 2)))


def test_more_weights_than_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_BYTES", 200_000)
    with pytest.raises(UprightError, match=r"network have 0.00 GB, but an ONNX file holds at most 0.00 GB; "):
        write_graph(lenet(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_bundle_of_one_form(run_folder: Path, upright: Upright, tmp_path: Path) -> None:
    """The validation images are 28 x 28, and `export` resizes them for a graph that accepts three of 32 x 30."""
    form = ("--batch", "3", "--size", "32x30", "--opset", "20", "--outputs", "features", "logits")
    answer = upright("export", run_folder, "--to", "elsewhere", *form)
    assert answer.code == 0, answer.err
    assert upright("verify", "elsewhere/small").code == 0 and not Path("export").exists()
    manifest = json.loads(Path("elsewhere/small/manifest.json").read_text())
    assert manifest["input"]["shape"] == [3, 32, 30, 1] and manifest["output"]["shape"] == [3, 10]
    assert manifest["interpolation"] == "bilinear" and not {"mask", "interpolation"} & manifest["spec"].keys()
    assert manifest["opset"] == 20 and manifest["other_outputs"] == ["features", "logits"]
    card = Path("elsewhere/small/README.md").read_text()
    assert "uint8 (3, 32, 30, 1), only this size |" in card
    assert "| Preprocessing inside the model | stretch to 28 x 28 and normalisation |" in card
    assert str(Path(graph_module.__file__).parent).encode() not in Path("elsewhere/small/model.onnx").read_bytes()
    samples = sorted(Path("elsewhere/small/samples").glob("*.png"))
    with Image.open(samples[0]) as sample:
        assert sample.size == (30, 32)
    predictor = Predictor("elsewhere/small")
    labels = [predictor(path).label for path in samples]
    assert labels == [prediction.label for prediction in predictor.predict(samples)]
    Image.new("L", (28, 28)).save(tmp_path / "other.png")
    answer = upright("infer", "elsewhere/small", samples[0], "other.png", samples[1])
    assert answer.code == 2 and len(answer.out.splitlines()) == 2
    assert "'other.png' has 28x28 pixels, but this model only accepts 32x30; resize the image" in answer.err


def test_features_of_a_run_in_a_bundle(run_folder: Path, upright: Upright) -> None:
    assert upright("export", run_folder, "--outputs", "features", "--size", "28x28").code == 0
    model = restore(run_folder).classifier.model
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    probabilities, features = run_batch(
        open_session(Path("export/small/model.onnx")), pixels, ["probabilities", "features"]
    )
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        assert np.abs(last(torch.from_numpy(features)).softmax(dim=1).numpy() - probabilities).max() < 1e-5
    assert not operators_outside(Path("export/small/model.onnx")) & {"MatMul", "Range"}
