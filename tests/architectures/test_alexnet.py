import pytest
import torch
from torch import nn

from upright.architectures.alexnet import AlexNet

NARROW = {"widths": (4, 4, 6, 6, 4), "units": (8, 8)}


@pytest.mark.parametrize("size", [224, 227])
@pytest.mark.parametrize(("groups", "count"), [(1, 62_378_344), (2, 60_965_224)])
def test_parameters_of_the_paper(size: int, groups, count: int) -> None:
    with torch.device("meta"):
        network = AlexNet((3, size, size), 1000, groups=groups)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("stem", "least"), [((11, 4, 2), 63), ((3, 1, 1), 15), ((5, 2, 0), 33)])
def test_any_size_from_the_smallest(stem: tuple[int, int, int], least: int) -> None:
    network = AlexNet((1, least, least + 9), 3, stem=stem, **NARROW)
    assert network(torch.zeros(2, 1, least, least + 9)).shape == (2, 3)
    with pytest.raises(ValueError, match=rf"at least {least}x{least} pixels, got {least}x{least - 1}\."):
        AlexNet((1, least, least - 1), 3, stem=stem, **NARROW)


def test_response_normalisation_is_the_formula_of_the_paper() -> None:
    network = AlexNet((1, 63, 63), 3, **NARROW)
    norm, _ = (module for module in network.modules() if isinstance(module, nn.LocalResponseNorm))
    maps = 100 * torch.rand(2, 8, 3, 3)
    expected = torch.stack(
        [
            maps[:, i] / (2 + 1e-4 * maps[:, max(0, i - 2) : min(7, i + 2) + 1].square().sum(dim=1)) ** 0.75
            for i in range(8)
        ],
        dim=1,
    )
    torch.testing.assert_close(norm(maps), expected)
    without = AlexNet((1, 63, 63), 3, local_response_norm=False, **NARROW)
    assert not any(isinstance(module, nn.LocalResponseNorm) for module in without.modules())


def test_the_initialisation_of_the_paper() -> None:
    network = AlexNet((1, 63, 63), 3, paper_start=True, **NARROW)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [layer.bias.unique().tolist() for layer in layers] == [[0], [1], [0], [1], [1], [1], [1], [0]]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert weights.std().item() == pytest.approx(0.01, rel=0.1)


def test_three_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 or 2 groups, got 3\."):
        AlexNet((1, 63, 63), 3, groups=3)
