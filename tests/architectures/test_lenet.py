import pytest
import torch
from torch import nn

from upright.architectures.lenet import LeNet


@pytest.mark.parametrize("size", [28, 32])
def test_parameters_of_the_paper(size: int) -> None:
    network = LeNet((1, size, size), 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 61_706


def test_activation_and_pooling_of_the_options_are_used() -> None:
    classic = [type(module) for module in LeNet((1, 28, 28), 10).modules()]
    modern = [type(module) for module in LeNet((1, 28, 28), 10, activation="relu", pooling="max").modules()]
    assert classic.count(nn.Tanh) == modern.count(nn.ReLU) == 4
    assert classic.count(nn.AvgPool2d) == modern.count(nn.MaxPool2d) == 2
    assert nn.ReLU not in classic and nn.Tanh not in modern


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 12, 40), (3, 33, 64)])
def test_any_size_from_the_smallest(shape: tuple[int, int, int]) -> None:
    assert LeNet(shape, 3)(torch.zeros(2, *shape)).shape == (2, 3)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 12x12 pixels, got 11x28"):
        LeNet((1, 11, 28), 10)
