"""These tests fail when torch renames what `upright.internals.torch` uses."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from upright.internals.torch import ADAPTIVE_POOLS, BATCH_NORM, OperatorObserver, aten


class RecordArguments(OperatorObserver):
    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Any, dict[str, Any]] = {}

    def observe(self, operator: Any, arguments: dict[str, Any], result: Any) -> None:
        self.arguments[operator.overloadpacket] = arguments


def test_operators_and_their_arguments_have_these_names() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(3), nn.MaxPool2d(2)).eval()
    # The counter decomposes operators before they are observed, as in `upright.anatomy`.
    with torch.no_grad(), RecordArguments() as observer, FlopCounterMode(display=False):
        network(torch.zeros(1, 1, 8, 8))[:, :, ::2]
    assert BATCH_NORM in observer.arguments and ADAPTIVE_POOLS[0] in observer.arguments
    assert {"weight", "stride", "dilation", "transposed"} <= set(observer.arguments[aten.convolution])
    assert {"kernel_size", "stride"} <= set(observer.arguments[aten.max_pool2d_with_indices])
    assert {"dim", "step"} <= set(observer.arguments[aten.slice])
