import pytest
import torch
from torch import nn

from upright.architectures.inception import Residual
from upright.architectures.inception_resnet import InceptionResNetV2
from upright.architectures.inception_v3 import InceptionV3
from upright.architectures.inception_v4 import InceptionV4

NETWORKS = [InceptionV3, InceptionV4, InceptionResNetV2]


def shapes(network: nn.Module, size: int) -> list[tuple[int, ...]]:
    """Return height, width and maps after every stage, as the papers write them."""
    maps, sizes = torch.empty(1, 3, size, size), []
    for stage in network.features:
        maps = stage(maps)
        sizes.append((*maps.shape[2:], maps.shape[1]))
    return sizes


@pytest.mark.parametrize(
    ("cls", "parameters", "stages"),
    [
        (
            InceptionV3,
            23_834_568,
            [(35, 35, 192), (35, 35, 288), (17, 17, 768), (17, 17, 768), (8, 8, 1280), (8, 8, 2048)],
        ),
        (
            InceptionV4,
            42_679_816,
            [(35, 35, 384), (35, 35, 384), (17, 17, 1024), (17, 17, 1024), (8, 8, 1536), (8, 8, 1536)],
        ),
        (InceptionResNetV2, 55_843_464, [(35, 35, 320), (17, 17, 1088), (8, 8, 2080), (8, 8, 1536)]),
    ],
)
def test_parameters_and_sizes_of_the_published_network(cls, parameters, stages) -> None:
    with torch.device("meta"):
        network = cls((3, 299, 299), 1000)
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        assert shapes(network, 299) == stages


@pytest.mark.parametrize("cls", NETWORKS)
def test_minimum_size(cls) -> None:
    with torch.device("meta"):
        assert cls((1, 75, 90), 3)(torch.empty(2, 1, 75, 90)).shape == (2, 3)
    with pytest.raises(ValueError, match=rf"{cls.__name__} needs images of at least 75x75 pixels, got 90x74"):
        cls((1, 90, 74), 3)


@pytest.mark.parametrize("cls", NETWORKS)
def test_width_and_dropout(cls) -> None:
    with torch.device("meta"):
        full, half = (cls((3, 75, 75), 3, width=width, dropout=0.4) for width in (1, 0.5))
    assert half.classifier[0].p == 0.4
    assert half.classifier[1].in_features == full.classifier[1].in_features // 2
    with pytest.raises(ValueError, match="must be above 0, got -1"):
        cls((3, 75, 75), 3, width=-1)


@pytest.mark.parametrize("cls", [InceptionV4, InceptionResNetV2])
def test_blocks(cls) -> None:
    with torch.device("meta"):
        small = cls((3, 299, 299), 3, blocks=(1, 2, 1))
        assert shapes(small, 299) == shapes(cls((3, 299, 299), 3), 299)
        assert len(list(small.modules())) < len(list(cls((3, 299, 299), 3).modules()))
    with pytest.raises(ValueError, match=r"at least 1 of each kind, got \(1, 0, 1\)"):
        cls((3, 75, 75), 3, blocks=(1, 0, 1))


def test_residual_blocks_scale_what_they_add_but_for_the_last() -> None:
    with torch.device("meta"):
        network = InceptionResNetV2((3, 75, 75), 3, blocks=(1, 2, 2), width=0.1)
    blocks = [module for module in network.modules() if isinstance(module, Residual)]
    assert [block.scale for block in blocks] == [0.17, 0.10, 0.10, 0.20, 1.0]
    assert [isinstance(block.activation, nn.ReLU) for block in blocks] == [True, True, True, True, False]


def test_a_residual_block_adds_to_its_input() -> None:
    network = InceptionResNetV2((1, 75, 75), 3, blocks=(1, 1, 1), width=0.05).eval()
    block = next(module for module in network.modules() if isinstance(module, Residual))
    maps = torch.rand(2, block.expand.out_channels, 4, 4)
    with torch.no_grad():
        block.expand.weight.zero_()
        block.expand.bias.fill_(1)
        torch.testing.assert_close(block(maps), maps + 0.17)
