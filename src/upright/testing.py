"""Contracts of networks and of the whole line, for the tests of your own project.

    from upright.testing import check_line, check_network

    def test_my_config(tmp_path):
        check_network("configs/mine.yaml")
        check_line("configs/mine.yaml", tmp_path)

A function returns if the contract holds, and raises an `AssertionError` with the reason if not. pytest is not needed.
"""

import copy
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from upright.architectures.localisers import Network
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.cli import main
from upright.describe import network_and_spec
from upright.exporting.export import head_modules
from upright.exporting.graph import Form, Graph, Output, module_of, write_graph
from upright.exporting.precision import Float16, Int8
from upright.images import ImageSpec
from upright.recipes import build
from upright.runtime.predictor import open_session, run_batch
from upright.training.classifier import ImageClassifier
from upright.training.model import Model

CLASSES = 7
"""Number of classes of the tested networks: unusual, so that a fixed number is noticed."""
QUICK = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--wandb", "off")
"""Options of `upright fit` for a run of seconds."""
AROUND = {
    "Transpose",
    "Cast",
    "Sub",
    "Div",
    "Softmax",
    "Identity",
    "MatMul",
    "ReduceL2",
    "Unsqueeze",
    "ReduceSum",
    "Min",
}
"""ONNX operators outside the network in a graph for images of the network's own size: none of them resizes. The last
five compute the confidence of votes."""


def check_network(config: str | Path) -> None:
    """Hold the network of the YAML of an experiment to every contract below, with random images.

    Raises:
        AssertionError: if a contract is broken.
        UserError: if the network or its data cannot be built.
    """
    recipe, spec, _ = network_and_spec(Path(config))
    spec = example_spec(spec.input_shape)
    with torch.random.fork_rng(devices=[]):
        for check in (check_logits, check_rows, check_gradients, check_memory, check_state, check_graph):
            torch.manual_seed(0)
            check(build(recipe)(spec.input_shape, CLASSES), spec)
        torch.manual_seed(0)
        check_forms(build(recipe), spec)


def check_line(config: str | Path, folder: Path, *options: str) -> Path:
    """Run `fit` for two steps, `test`, `export` and `verify`.

    Args:
        config: the YAML of an experiment.
        folder: the folder that gets ``checkpoints/NAME`` and ``export/NAME``; NAME is that of the config.
        *options: more options of `upright fit`.

    Returns:
        The folder of the bundle.

    Raises:
        AssertionError: if a command does not exit with 0.
    """
    name = Path(config).stem
    run, bundle = folder / "checkpoints" / name, folder / "export" / name
    for command in (
        ["fit", "--config", str(config), "--trainer.default_root_dir", str(run.parent), *QUICK, *options],
        ["test", "--ckpt_path", str(run / "best.ckpt")],
        ["export", str(run), "--to", str(bundle.parent)],
        ["verify", str(bundle)],
    ):
        code = main(command)
        assert code == 0, f"`upright {shlex.join(command)}` exits with {code}; its error is on standard error"
    return bundle


def example_spec(input_shape: tuple[int, int, int], classes: int = CLASSES) -> ImageSpec:
    """Return the spec of random test images of a shape ``(C, H, W)``."""
    channels, height, width = input_shape
    names = tuple(str(number) for number in range(classes))
    return ImageSpec(channels, height, width, names, (0.3,) * channels, (0.2,) * channels)


def check_logits(network: nn.Module, spec: ImageSpec) -> None:
    """Check that the network returns one float32 logit per image and class, in training and in evaluation."""
    for training in (True, False):
        logits = network.train(training)(_images(spec))
        assert isinstance(logits, Tensor), f"forward returns a {type(logits).__name__}, not a tensor of logits"
        expected = (len(_images(spec)), len(spec.classes))
        assert logits.shape == expected, f"logits have shape {tuple(logits.shape)}, expected {expected}"
        assert logits.dtype == torch.float32, f"logits are {logits.dtype}, expected torch.float32"


def check_rows(network: nn.Module, spec: ImageSpec) -> None:
    """Check that in evaluation the logits of an image do not depend on the other images of the batch."""
    network.eval()
    images = _images(spec)
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]), atol=1e-5, rtol=1e-4)


def check_gradients(network: nn.Module, spec: ImageSpec, without: str = "nothing") -> None:
    """Check that every parameter gets a finite gradient that is not zero, in three steps of training.

    ``without`` is a regular expression for names of parameters whose gradient may be zero.
    """
    # A spatial transformer starts with weights of zero, and so has no gradient behind them in the first steps.
    _train(network, spec, torch.optim.SGD(network.parameters(), lr=0.01), 3)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"parameter {name} is not used in forward"
        assert parameter.grad.isfinite().all(), f"the gradient of parameter {name} is not finite"
        assert parameter.grad.any() or re.match(without, name), f"the gradient of parameter {name} is zero"


def check_memory(network: nn.Module, spec: ImageSpec) -> None:
    """Check that the network learns one batch of random images by heart, in at most 400 steps."""
    images, labels = _images(spec), _labels(spec)
    for _ in range(8):
        _train(network, spec, torch.optim.Adam(network.parameters(), lr=1e-3), 50)
        with torch.no_grad():
            predictions = network.eval()(images).argmax(dim=1)
        if torch.equal(predictions, labels):
            return
    wrong = int((predictions != labels).sum())
    raise AssertionError(f"after 400 steps on one batch of {len(labels)} images, {wrong} are classified wrongly")


def check_state(network: nn.Module, spec: ImageSpec) -> None:
    """Check that the state dict holds everything that the logits depend on."""
    images, other = _images(spec), copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        one, two = Model(spec, network).eval(), Model(spec, other).eval()
        assert not torch.equal(one(images), two(images)), "the logits do not depend on the parameters"
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(images), two(images)), "equal state dicts give different logits"


def check_graph(network: nn.Module, spec: ImageSpec, opset: int = Form.opset) -> None:
    """Check that ONNX Runtime reproduces PyTorch for several sizes of batches and images, after 30 steps."""
    # A new network gives all images similar probabilities, and a new transformer changes nothing.
    _train(network, spec, torch.optim.Adam(network.parameters(), lr=1e-3), 30)
    model = Model(spec, network).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_graph(model, path, Form(opset=opset))
        assert list(Path(folder).iterdir()) == [path], "the graph is more than one file"
        session = open_session(path)
    generator, own = np.random.default_rng(0), (spec.height, spec.width)
    for batch, size in ((1, own), (2, own), (7, own), (1, (11, 17)), (2, (64, 50)), (7, (200, 3)), (1, (1, 1))):
        pixels = generator.integers(0, 256, (batch, *size, spec.channels), dtype=np.uint8)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        (probabilities,) = run_batch(session, pixels, ("probabilities",))
        assert probabilities.shape == expected.shape and probabilities.dtype == np.float32
        difference = np.abs(probabilities - expected).max()
        assert difference < 1e-4, f"{batch} images of {size}: ONNX Runtime differs from PyTorch by {difference:.2g}"


def check_forms(network: Network, spec: ImageSpec, unchanged: Sequence[str] = (), lone_norms: bool = False) -> None:
    """Check a graph for images of one size with more outputs, and its conversions to float16 and 8 bits.

    Outputs ``unchanged`` are the same in every precision. With ``lone_norms``, the network has normalisations that
    follow no convolution or linear layer.
    """
    classifier = ImageClassifier(spec, network, partial(torch.optim.SGD, lr=0.1))
    model, shape = classifier.model, spec.input_shape
    # The activations of a very deep network exceed the range of float16, unless its normalisations have seen a batch.
    with torch.no_grad():
        model.train()(torch.randint(256, (8, *shape), dtype=torch.uint8))
    model.eval()
    modules = head_modules(classifier)
    transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
    names: tuple[Output, ...] = ("logits", *(("features",) if modules else ()), *(("theta",) if transformers else ()))
    if any(transformer.voting for transformer in transformers):
        names += ("votes", "confidence")
    form = Form(batch=3, size=shape[1:], outputs=names, head=modules)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape[1:], spec.channels), dtype=np.uint8)
    graph = Graph(model, form).eval()

    def calibration() -> Iterator[npt.NDArray[np.uint8]]:
        yield pixels

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_graph(model, path, form)
        outside = {node.op_type for node in onnx.load(path).graph.node if not module_of(node)}
        assert outside <= AROUND, f"around the network the graph has {sorted(outside - AROUND)}"
        with torch.no_grad():
            expected = [output.numpy() for output in graph(torch.from_numpy(pixels))]
        exact = run_batch(open_session(path), pixels, graph.names)
        for name, ours, theirs in zip(graph.names, expected, exact, strict=True):
            close = np.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1, np.abs(ours).max()))
            assert close, f"output '{name}': ONNX Runtime differs from PyTorch"
        for converter in (Float16(path, model.network), Int8(path, model.network, calibration, Path(folder))):
            content = converter.convert(converter.layers)
            # Layers have the names of modules. A normalisation is part of the layer before it.
            layers = dict(model.network.named_modules())
            norms = [name for name in converter.layers if name != "." and isinstance(layers[name], nn.BatchNorm2d)]
            assert lone_norms or not norms, (
                f"{converter.name}: normalisations are not folded into the layers before: {norms}"
            )
            kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
            quantized = kinds & {"QuantizeLinear", "DynamicQuantizeLSTM"}
            assert converter.name == "fp16" or quantized, "the int8 graph quantizes nothing"
            outputs = run_batch(open_session(content), pixels, graph.names)
            assert all(output.dtype == np.float32 for output in outputs), f"{converter.name}: an output is not float32"
            # Logits of random weights have any size, so the bound is relative.
            place = graph.names.index("logits")
            error = np.linalg.norm(outputs[place] - exact[place]) / np.linalg.norm(exact[place])
            assert error < 0.2, f"{converter.name}: the logits differ from float32 by a share of {error:.2g}"
            for name in unchanged:
                place = graph.names.index(name)
                assert np.allclose(outputs[place], exact[place], atol=1e-6), f"{converter.name}: {name} changes"


def _images(spec: ImageSpec) -> Tensor:
    return torch.randn(5, *spec.input_shape, generator=torch.Generator().manual_seed(1))


def _labels(spec: ImageSpec) -> Tensor:
    return torch.arange(5) % len(spec.classes)


def _train(network: nn.Module, spec: ImageSpec, optimizer: torch.optim.Optimizer, steps: int) -> None:
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(_images(spec)), _labels(spec))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
