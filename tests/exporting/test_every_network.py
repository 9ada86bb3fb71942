"""Every network in every form: images of one size, other outputs, and lower precision."""

import pytest
import torch

from tests.architectures.variants import SLOW_TO_EXPORT, VARIANTS, Variant
from upright.recipes import build
from upright.testing import check_forms, example_spec

CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow or SLOW_TO_EXPORT.match(case.name) else [])
    for case in VARIANTS
]


@pytest.mark.parametrize("case", CASES)
def test_fixed_size_other_outputs_and_lower_precision(case: Variant) -> None:
    torch.manual_seed(0)
    # A transformer stays in float32. In front of a network, its parameters are the same in every precision.
    alone = "transformer" in case.init_args and "transformers" not in str(case.init_args)
    unchanged = ("theta",) if alone and case.init_args["places"] == ["input"] else ()
    check_forms(build(case.recipe), example_spec(case.input_shape, classes=3), unchanged, case.name == "polar")
