import pytest
import torch
from torch import nn

from upright.architectures.vgg import VGG

COUNTS = {11: 132_863_336, 13: 133_047_848, 16: 138_357_544, 19: 143_667_240}


@pytest.mark.parametrize("depth", COUNTS)
def test_parameters_of_the_paper(depth: int) -> None:
    with torch.device("meta"):
        network = VGG((3, 224, 224), 1000, depth=depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[depth]
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_batch_normalisation_replaces_the_biases() -> None:
    with torch.device("meta"):
        network = VGG((3, 224, 224), 1000, depth=11, batch_norm=True)
    maps = 64 + 128 + 2 * 256 + 4 * 512
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[11] + maps


@pytest.mark.parametrize(("widths", "least"), [((4, 4, 4, 4, 4), 32), ((4, 6, 8, 8), 16), ((4,), 2)])
def test_the_smallest_size_halves_with_every_stage_less(widths: tuple[int, ...], least: int) -> None:
    network = VGG((1, least, least + 5), 3, widths=widths, units=(8, 8))
    assert network(torch.zeros(2, 1, least, least + 5)).shape == (2, 3)
    with pytest.raises(ValueError, match=rf"at least {least}x{least} pixels, got {least - 1}x{least}\."):
        VGG((1, least - 1, least), 3, widths=widths, units=(8, 8))


def test_other_depths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a depth of 11, 13, 16, 19, got 12\."):
        VGG((3, 32, 32), 10, depth=12)


@pytest.mark.parametrize("widths", [(), (4,) * 6])
def test_other_numbers_of_stages_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"1 to 5 stages, got {len(widths)} widths\."):
        VGG((3, 64, 64), 10, widths=widths)
