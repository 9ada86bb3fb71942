import pytest
import torch
from torch import nn

from upright.architectures.googlenet import GoogLeNet
from upright.architectures.layers import Concat


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        assert count(GoogLeNet((3, 224, 224), 1000)) == 6_998_552


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("stem", "size"), [((7, 2, 3), 224), ((3, 1, 1), 112)])
def test_the_blocks_have_the_sizes_of_table_1_with_both_stems(stem, size, batch_norm) -> None:
    with torch.device("meta"):
        network = GoogLeNet((3, size, size), 10, stem=stem, batch_norm=batch_norm)
        maps, shapes = torch.empty(1, 3, size, size), []
        for step in network.features:
            maps = step(maps)
            if isinstance(step, Concat):
                shapes.append(tuple(maps.shape[1:]))
    assert shapes == [
        *[(256, 28, 28), (480, 28, 28)],
        *[(512, 14, 14), (512, 14, 14), (512, 14, 14), (528, 14, 14), (832, 14, 14)],
        *[(832, 7, 7), (1024, 7, 7)],
    ]


def test_batch_norm_replaces_biases_and_local_response_normalisation() -> None:
    def kinds(network: nn.Module) -> list[int]:
        modules = list(network.modules())
        biases = sum(isinstance(module, nn.Conv2d) and module.bias is not None for module in modules)
        return [biases, *(sum(isinstance(m, kind) for m in modules) for kind in (nn.BatchNorm2d, nn.LocalResponseNorm))]

    # Three convolutions of the stem, six of each of nine blocks.
    assert kinds(GoogLeNet((3, 32, 32), 10, width=0.1)) == [57, 0, 2]
    assert kinds(GoogLeNet((3, 32, 32), 10, width=0.1, batch_norm=True)) == [0, 57, 0]


def test_width_and_dropout() -> None:
    narrow = GoogLeNet((1, 28, 28), 10, width=0.001, dropout=0.1)
    assert {module.out_channels for module in narrow.modules() if isinstance(module, nn.Conv2d)} == {1}
    assert [module.p for module in narrow.modules() if isinstance(module, nn.Dropout)] == [0.1]
    with torch.device("meta"):
        assert GoogLeNet((1, 28, 28), 10, width=0.5).classifier[1].in_features == 512
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        GoogLeNet((1, 28, 28), 10, width=0)


@pytest.mark.parametrize("stem", [(7, 2, 3), (3, 1, 1)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 31)])
def test_any_size(stem, shape) -> None:
    assert GoogLeNet(shape, 3, stem=stem, width=0.05)(torch.zeros(2, *shape)).shape == (2, 3)
