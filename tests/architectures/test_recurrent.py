from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from upright.architectures.recurrent import Recurrent, to_sequence
from upright.exporting.graph import write_graph
from upright.images import ImageSpec
from upright.training.model import Model

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize(("order", "inputs"), [("rows", 3 * 7), ("columns", 3 * 5), ("pixels", 3)])
@pytest.mark.parametrize(("layers", "d"), [(1, 1), (1, 2), (3, 2)])
def test_parameters_of_the_formula(cell, order, inputs: int, layers: int, d: int) -> None:
    network = Recurrent((3, 5, 7), 10, cell=cell, order=order, hidden=6, layers=layers, bidirectional=d == 2)
    expected = sum(d * GATES[cell] * 6 * (n + 6 + 2) for n in (inputs, *[d * 6] * (layers - 1))) + 10 * (d * 6 + 1)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_parameters_on_mnist() -> None:
    assert sum(parameter.numel() for parameter in Recurrent((1, 28, 28), 10).parameters()) == 82_186


def test_order_of_reading() -> None:
    images = torch.arange(12).view(1, 2, 2, 3)  # channel one: 0 1 2, 3 4 5; channel two: 6 7 8, 9 10 11
    assert to_sequence(images, "rows").tolist() == [[[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]]
    assert to_sequence(images, "columns").tolist() == [[[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]]
    assert to_sequence(images, "pixels").tolist() == [[[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]]


@pytest.mark.parametrize("cell", GATES)
def test_the_state_is_that_of_the_last_layer_after_the_last_step_of_each_direction(cell) -> None:
    network = Recurrent((1, 4, 3), 2, cell=cell, hidden=5, layers=2, bidirectional=True)
    images = torch.randn(2, 1, 4, 3)
    states, _ = network.recurrent(to_sequence(images, "rows"))
    expected = network.classifier(torch.cat([states[:, -1, :5], states[:, 0, 5:]], dim=1))
    torch.testing.assert_close(network(images), expected)


def test_dropout_is_between_layers_and_before_the_output() -> None:
    network = Recurrent((1, 4, 3), 2, layers=2, dropout=0.5)
    assert network.recurrent.dropout == 0.5
    # One layer gives no warning, which would be an error in tests.
    network = Recurrent((1, 4, 3), 2, dropout=0.5)
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.5]


@pytest.mark.parametrize(
    ("cell", "order", "layers", "bidirectional"),
    [
        ("lstm", "rows", 2, True),
        pytest.param("gru", "pixels", 1, False, marks=pytest.mark.slow),
        ("rnn", "columns", 1, True),
    ],
)
def test_onnx_equals_pytorch_at_any_batch(cell, order, layers: int, bidirectional: bool, tmp_path: Path) -> None:
    spec = ImageSpec(1, 6, 5, ("a", "b", "c"), (0.5,), (0.2,))
    network = Recurrent(
        spec.input_shape, 3, cell=cell, order=order, hidden=8, layers=layers, bidirectional=bidirectional
    )
    model = Model(spec, network).eval()
    path = tmp_path / "model.onnx"
    write_graph(model, path)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count(cell.upper()) == (0 if cell == "rnn" else layers)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        pixels = np.random.default_rng(batch).integers(0, 256, (batch, 6, 5, 1), dtype=np.uint8)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        (probabilities,) = session.run(["probabilities"], {"images": pixels})
        assert np.abs(probabilities - expected).max() < 1e-5


def test_unknown_cells_and_orders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of lstm, gru, rnn; got 'tanh'\."):
        Recurrent((1, 4, 3), 2, cell="tanh")
    with pytest.raises(ValueError, match=r"order must be one of rows, columns, pixels; got 'spiral'\."):
        Recurrent((1, 4, 3), 2, order="spiral")
