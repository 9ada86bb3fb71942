from typing import get_args

import pytest
import torch
from torch import nn

from upright.architectures.initialisation import Scheme, initialise


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_weights_have_the_deviation_of_the_scheme(scheme: Scheme) -> None:
    torch.manual_seed(0)
    fan_in, fan_out = 400, 200
    network = nn.Sequential(nn.Linear(fan_in, fan_out), nn.Conv2d(16, 8, 5), nn.BatchNorm2d(8), nn.LSTM(64, 64))
    network.requires_grad_(False)
    initialise(network, scheme)
    kind = scheme.partition("_")[0]
    variances = {"xavier": 2 / (fan_in + fan_out), "he": 2 / fan_in, "lecun": 1 / fan_in, "orthogonal": 1 / fan_in}
    assert network[0].weight.std() == pytest.approx(variances.get(kind, 0.01**2) ** 0.5, rel=0.05)
    if kind in ("he", "lecun"):
        assert network[1].weight.std() == pytest.approx(((2 if kind == "he" else 1) / (16 * 25)) ** 0.5, rel=0.05)
    biases = [parameter for name, parameter in network.named_parameters() if "bias" in name]
    assert len(biases) == 5 and all((bias == 0).all() for bias in biases)
    assert (network[2].weight == 1).all()
    # The matrix of a recurrent layer stacks its gates, and each gate is initialised like a layer.
    variances = {"xavier": 2 / 128, "he": 2 / 64, "lecun": 1 / 64, "orthogonal": 1 / 64}
    for gate in network[3].weight_hh_l0.chunk(4):
        assert gate.std() == pytest.approx(variances.get(kind, 0.01**2) ** 0.5, rel=0.07)
        if kind == "orthogonal":
            torch.testing.assert_close(gate @ gate.T, torch.eye(64), atol=1e-4, rtol=0)
