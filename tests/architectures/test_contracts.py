"""What every architecture promises, over every YAML in configs/: a new one is tested the moment its YAML exists."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import nn

from tests.conftest import CONFIGS, ROOT
from upright.exporting.graph import write_graph
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.model import Model

CLASSES = 7


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def spec_and_network(request: pytest.FixtureRequest) -> tuple[ImageSpec, nn.Module]:
    config = yaml.safe_load(request.param.read_text())
    data = build(yaml.safe_load((ROOT / "configs" / config["data"]).read_text()))()
    spec = ImageSpec.from_dict(data.spec.to_dict() | {"classes": [str(label) for label in range(CLASSES)]})
    torch.manual_seed(0)
    return spec, build(config["model"]["network"])(spec.input_shape, CLASSES)


@pytest.fixture
def images(spec_and_network: tuple[ImageSpec, nn.Module]) -> torch.Tensor:
    return torch.randn(5, *spec_and_network[0].input_shape, generator=torch.Generator().manual_seed(1))


def test_logits_for_an_unusual_number_of_classes(spec_and_network, images) -> None:
    network = spec_and_network[1]
    for training in (True, False):
        logits = network.train(training)(images)
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (5, CLASSES) and logits.dtype == torch.float32


def test_rows_are_independent_in_evaluation(spec_and_network, images) -> None:
    network = spec_and_network[1].eval()
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]), atol=1e-5, rtol=1e-4)


def test_every_parameter_learns(spec_and_network, images) -> None:
    network = spec_and_network[1].train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    labels = torch.arange(5) % CLASSES
    # What a transformer starts with is zero, and so are gradients behind it in the first step.
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_one_batch_can_be_learnt_by_heart(spec_and_network, images) -> None:
    network = spec_and_network[1].train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    labels = torch.arange(5) % CLASSES
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert (network.eval()(images).argmax(dim=1) == labels).all()


def test_state_dict_round_trip(spec_and_network, images) -> None:
    spec, network = spec_and_network
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        one, two = Model(spec, network).eval(), Model(spec, other).eval()
        assert not torch.equal(one(images), two(images))
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(images), two(images))


def test_onnx_equals_pytorch_at_any_batch_and_size(spec_and_network, tmp_path: Path) -> None:
    spec, network = spec_and_network
    # A transformer at its identity would prove little.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model = Model(spec, network).eval()
    write_graph(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    native = (spec.height, spec.width)
    for batch, size in (
        (1, native),
        (2, native),
        (7, native),
        (1, (11, 17)),
        (2, (64, 50)),
        (7, (200, 3)),
        (1, (1, 1)),
    ):
        pixels = generator.integers(0, 256, (batch, *size, spec.channels), dtype=np.uint8)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        (found,) = session.run(["probabilities"], {"images": pixels})
        assert found.shape == (batch, CLASSES) and found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-4, (batch, size)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
