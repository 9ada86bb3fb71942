"""Every network with a fixed size, with other outputs, and in lower precision."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from tests.architectures.variants import SLOW_TO_EXPORT, VARIANTS, Variant
from upright.exporting.graph import Form, Graph, module_of, write_graph
from upright.exporting.precision import Float16, Int8
from upright.images import ImageSpec
from upright.recipes import build
from upright.runtime.predictor import open_session, run_batch
from upright.training.classifier import ImageClassifier
from upright.training.finetuning import head

CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow or SLOW_TO_EXPORT.match(case.name) else [])
    for case in VARIANTS
]
OUTSIDE_OPERATORS = {"Transpose", "Cast", "Sub", "Div", "Softmax", "Identity"}
"""Operators outside of the network if the images have its size: none of them resizes."""


@pytest.mark.parametrize("case", CASES)
def test_fixed_size_other_outputs_and_lower_precision(case: Variant, tmp_path: Path) -> None:
    torch.manual_seed(0)
    channels, height, width = case.input_shape
    spec = ImageSpec(channels, height, width, ("a", "b", "c"), (0.3,) * channels, (0.2,) * channels)
    classifier = ImageClassifier(spec, build(case.recipe), partial(torch.optim.SGD, lr=0.1)).eval()
    model = classifier.model
    if case.recipe["init_args"].get("depth", 0) > 100:
        # Without training, the sums of so many blocks overflow in float16. One batch sets the normalisations.
        with torch.no_grad():
            model.train()(torch.randint(256, (8, *case.input_shape), dtype=torch.uint8))
        model.eval()
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in sorted(head(classifier))))
    theta = ("theta",) if classifier.transformers else ()
    form = Form(batch=3, size=(height, width), outputs=("logits", "features", *theta), head=modules)
    path = tmp_path / "model.onnx"
    write_graph(model, path, form)

    graph = onnx.load(path).graph
    assert {node.op_type for node in graph.node if not module_of(node)} <= OUTSIDE_OPERATORS
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), dtype=np.uint8)
    deployed = Graph(model, form).eval()
    with torch.no_grad():
        expected = [output.numpy() for output in deployed(torch.from_numpy(pixels))]
    exact = run_batch(open_session(path), pixels, deployed.names)
    for name, one, other in zip(deployed.names, expected, exact, strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-4 * max(1, np.abs(one).max())), name

    def calibration() -> Iterator[npt.NDArray[np.uint8]]:
        yield pixels

    for converter in (Float16(path, model.network), Int8(path, model.network, calibration, tmp_path)):
        content = converter.convert(converter.layers)
        # Layers have the names of modules. A folded normalisation belongs to the layer before it.
        names = dict(model.network.named_modules())
        assert not any(isinstance(names[name], nn.BatchNorm2d) for name in converter.layers if name != ".")
        kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
        assert converter.name == "fp16" or kinds & {"QuantizeLinear", "DynamicQuantizeLSTM"}
        actual = run_batch(open_session(content), pixels, deployed.names)
        assert all(output.dtype == np.float32 for output in actual)
        assert np.abs(actual[0] - exact[0]).max() < 0.1
        for name, one, other in zip(deployed.names, exact, actual, strict=True):
            # The parameters of a transformer do not depend on later layers.
            if name == "theta" and "inside" not in case.name:
                assert np.allclose(one, other, atol=1e-6)
