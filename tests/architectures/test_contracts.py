"""Contracts of every architecture, tested over every YAML in configs/: a new YAML needs no new test."""

import copy
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import nn

from tests.architectures.variants import CANNOT_LEARN, SLOW_TO_EXPORT, VARIANTS, WITHOUT_GRADIENT, Variant
from tests.conftest import CONFIGS, ROOT
from upright.architectures.spatial_transformer import Regression
from upright.exporting.graph import Form, write_graph
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.model import Model

CLASSES = 7


class Case(NamedTuple):
    name: str
    spec: ImageSpec
    network: nn.Module


QUICK = [*CONFIGS, *(variant for variant in VARIANTS if not variant.slow)]
SLOW = [pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS if variant.slow]


def name_of(case: Path | Variant) -> str:
    return case.stem if isinstance(case, Path) else case.name


def slow_to_export(case: Path | Variant) -> bool:
    """Return whether an export is long, or other variants hold all of the network's classes to every contract."""
    if isinstance(case, Variant):
        return SLOW_TO_EXPORT.match(case.name) is not None
    network = yaml.safe_load(case.read_text())["model"]["network"]
    return all(f"'{part}'" in repr(VARIANTS) for part in re.findall(r"'class_path': '([\w.]+)'", repr(network)))


@pytest.fixture(params=[*QUICK, *SLOW], ids=name_of)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    if isinstance(request.param, Variant):
        name, recipe, (channels, height, width) = request.param.name, request.param.recipe, request.param.input_shape
    else:
        config = yaml.safe_load(request.param.read_text())
        data = build(yaml.safe_load((ROOT / "configs" / config["data"]).read_text()))()
        name, recipe, (channels, height, width) = request.param.stem, config["model"]["network"], data.spec.input_shape
    classes = tuple(str(label) for label in range(CLASSES))
    spec = ImageSpec(channels, height, width, classes, (0.3,) * channels, (0.2,) * channels)
    return Case(name, spec, build(recipe)(spec.input_shape, CLASSES))


@pytest.fixture
def images(case: Case) -> torch.Tensor:
    return torch.randn(5, *case.spec.input_shape, generator=torch.Generator().manual_seed(1))


def test_logits_for_an_unusual_number_of_classes(case: Case, images: torch.Tensor) -> None:
    network = case.network
    for training in (True, False):
        logits = network.train(training)(images)
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (5, CLASSES) and logits.dtype == torch.float32


def test_rows_are_independent_in_evaluation(case: Case, images: torch.Tensor) -> None:
    network = case.network.eval()
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]), atol=1e-5, rtol=1e-4)


def test_every_parameter_learns(case: Case, images: torch.Tensor) -> None:
    network = case.network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    labels = torch.arange(5) % CLASSES
    # What a transformer starts with is zero, and so are gradients behind it in the first steps.
    for _ in range(3 if any(isinstance(module, Regression) for module in network.modules()) else 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    without = WITHOUT_GRADIENT.get(case.name, "nothing")
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or re.match(without, name), name


def learn(network: nn.Module, images: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), torch.arange(len(images)) % CLASSES).backward()
        optimizer.step()


def test_one_batch_can_be_learnt_by_heart(case: Case, images: torch.Tensor) -> None:
    if case.name in CANNOT_LEARN:
        pytest.skip(CANNOT_LEARN[case.name])
    for _ in range(8):
        learn(case.network, images, 50)
        with torch.no_grad():
            predicted = case.network.eval()(images).argmax(dim=1)
        if predicted.tolist() == list(range(5)):
            return
    pytest.fail(f"after 400 steps: {predicted.tolist()}")


def test_state_dict_round_trip(case: Case, images: torch.Tensor) -> None:
    spec, network = case.spec, case.network
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        one, two = Model(spec, network).eval(), Model(spec, other).eval()
        assert not torch.equal(one(images), two(images))
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(images), two(images))


EXPORTED = [pytest.param(one, marks=[pytest.mark.slow] if slow_to_export(one) else []) for one in QUICK]


@pytest.mark.parametrize("case", [*EXPORTED, *SLOW], indirect=True, ids=name_of)
@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.slow)])
def test_onnx_equals_pytorch_at_any_batch_and_size(
    case: Case, images: torch.Tensor, opset: int, tmp_path: Path
) -> None:
    spec, network = case.spec, case.network
    # At its start a network says the same of every image, and a transformer does nothing.
    learn(network, images, 30)
    model = Model(spec, network).eval()
    write_graph(model, tmp_path / "model.onnx", Form(opset=opset))
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
        (probabilities,) = session.run(["probabilities"], {"images": pixels})
        assert probabilities.shape == (batch, CLASSES) and probabilities.dtype == np.float32
        assert np.abs(probabilities - expected).max() < 1e-4, (batch, size)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
