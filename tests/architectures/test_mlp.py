import pytest
import torch
from torch import nn

from upright.architectures.mlp import MLP


@pytest.mark.parametrize(("widths", "count"), [((256, 128), 235_146), ((), 7_850), ((16,), 12_730)])
def test_parameters(widths: tuple[int, ...], count: int) -> None:
    assert sum(parameter.numel() for parameter in MLP((1, 28, 28), 10, widths=widths).parameters()) == count


@pytest.mark.parametrize(("name", "layer"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)])
def test_the_activation_of_the_option_is_used(name, layer) -> None:
    network = MLP((3, 1, 1), 2, widths=(4, 4, 4), activation=name)
    assert [type(module) for module in network.modules()].count(layer) == 3
    assert network(torch.zeros(5, 3, 1, 1)).shape == (5, 2)


@pytest.mark.parametrize(("dropout", "rates"), [(0, [0, 0]), (0.5, [0.5, 0.5]), ((0.2, 0.5), [0.2, 0.5])])
def test_dropout_for_all_layers_or_for_each(dropout: float | tuple[float, ...], rates: list[float]) -> None:
    network = MLP((1, 8, 8), 2, widths=(4, 4), dropout=dropout)
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == rates


def test_a_wrong_number_of_dropouts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one dropout or one per hidden layer \(2\), got 1\."):
        MLP((1, 8, 8), 2, widths=(4, 4), dropout=(0.5,))
