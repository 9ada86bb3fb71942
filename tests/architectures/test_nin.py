import pytest
import torch

from upright.architectures.nin import NiN


def test_parameters_of_the_authors() -> None:
    with torch.device("meta"):
        network = NiN((3, 224, 224), 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_595_176


@pytest.mark.parametrize(
    ("widths", "stem", "least"),
    [((4, 4, 4, 4), (11, 4, 0), 67), ((4, 4, 4), (5, 1, 2), 7), ((4,), (5, 1, 0), 5)],
)
def test_any_size_from_the_smallest(widths: tuple[int, ...], stem: tuple[int, int, int], least: int) -> None:
    network = NiN((3, least, least), 5, widths=widths, stem=stem)
    for size in (least, 2 * least + 1):
        assert network(torch.zeros(2, 3, size, least)).shape == (2, 5)
    with pytest.raises(ValueError, match=rf"at least {least}x{least} pixels, got {least - 1}x{least}\."):
        NiN((3, least - 1, least), 5, widths=widths, stem=stem)


def test_logits_may_be_negative() -> None:
    torch.manual_seed(0)
    logits = NiN((3, 8, 8), 5, widths=(8, 8), stem=(5, 1, 2))(torch.randn(16, 3, 8, 8))
    assert (logits < 0).any() and (logits > 0).any()


@pytest.mark.parametrize("widths", [(), (4,) * 5])
def test_other_numbers_of_blocks_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"1 to 4 blocks, got {len(widths)} widths\."):
        NiN((3, 224, 224), 10, widths=widths)
