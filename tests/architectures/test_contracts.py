"""Every contract of `upright.testing`, over every YAML in configs/ and every variant."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn

from tests.architectures.variants import (
    CANNOT_LEARN,
    SLOW_TO_EXPORT,
    SLOW_TO_LEARN,
    VARIANTS,
    WITHOUT_GRADIENT,
    Variant,
)
from tests.conftest import CONFIGS
from upright.describe import network_and_spec
from upright.images import ImageSpec
from upright.recipes import build
from upright.testing import (
    CLASSES,
    check_gradients,
    check_graph,
    check_logits,
    check_memory,
    check_rows,
    check_state,
    example_spec,
)


class Case(NamedTuple):
    name: str
    network: nn.Module
    spec: ImageSpec


QUICK = [*CONFIGS, *(variant for variant in VARIANTS if not variant.slow)]
SLOW = [pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS if variant.slow]


def name_of(case: Path | Variant) -> str:
    return case.stem if isinstance(case, Path) else case.name


def quick_and_slow(slow: re.Pattern[str]) -> list[Any]:
    """Return all cases. A config is slow if variants hold all classes of its network to every contract."""

    def is_slow(case: Path | Variant) -> bool:
        if isinstance(case, Variant):
            return slow.match(case.name) is not None
        network = yaml.safe_load(case.read_text())["model"]["network"]
        return all(f"'{part}'" in repr(VARIANTS) for part in re.findall(r"'class_path': '([\w.]+)'", repr(network)))

    return [*(pytest.param(case, marks=[pytest.mark.slow] if is_slow(case) else []) for case in QUICK), *SLOW]


@pytest.fixture(params=[*QUICK, *SLOW], ids=name_of)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    if isinstance(request.param, Variant):
        recipe, shape = request.param.recipe, request.param.input_shape
    else:
        recipe, spec, _ = network_and_spec(request.param)
        shape = spec.input_shape
    return Case(name_of(request.param), build(recipe)(shape, CLASSES), example_spec(shape))


def test_logits_for_an_unusual_number_of_classes(case: Case) -> None:
    check_logits(case.network, case.spec)


def test_rows_are_independent_in_evaluation(case: Case) -> None:
    check_rows(case.network, case.spec)


def test_every_parameter_learns(case: Case) -> None:
    check_gradients(case.network, case.spec, WITHOUT_GRADIENT.get(case.name, "nothing"))


@pytest.mark.parametrize("case", quick_and_slow(SLOW_TO_LEARN), indirect=True, ids=name_of)
def test_one_batch_can_be_memorised(case: Case) -> None:
    if case.name in CANNOT_LEARN:
        pytest.skip(CANNOT_LEARN[case.name])
    check_memory(case.network, case.spec)


def test_state_dict_round_trip(case: Case) -> None:
    check_state(case.network, case.spec)


@pytest.mark.parametrize("case", quick_and_slow(SLOW_TO_EXPORT), indirect=True, ids=name_of)
@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.slow)])
def test_onnx_equals_pytorch_at_any_batch_and_size(case: Case, opset: int) -> None:
    check_graph(case.network, case.spec, opset)
