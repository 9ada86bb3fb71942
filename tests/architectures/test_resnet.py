import pytest
import torch
from torch import nn

from upright.architectures.resnet import ResNet, SmallResNet, Subsampling

IMAGENET = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
CIFAR = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def depth_of(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())


@pytest.mark.parametrize("depth", IMAGENET)
def test_parameters_of_table_1(depth: int) -> None:
    with torch.device("meta"):
        assert count(ResNet((3, 224, 224), 1000, depth=depth)) == IMAGENET[depth]
        assert depth_of(ResNet((3, 224, 224), 1000, depth=depth, shortcuts=False)) == depth


@pytest.mark.parametrize("depth", CIFAR)
def test_parameters_of_section_4_2(depth: int) -> None:
    with torch.device("meta"):
        network, plain = (SmallResNet((3, 32, 32), 10, depth=depth, shortcuts=shortcuts) for shortcuts in (True, False))
    assert count(network) == count(plain) == CIFAR[depth]
    assert depth_of(network) == depth


def test_plain_networks_lack_only_the_projections() -> None:
    with torch.device("meta"):
        plain = ResNet((3, 224, 224), 1000, shortcuts=False)
    projections = sum(outputs * outputs // 2 + 2 * outputs for outputs in (128, 256, 512))
    assert count(plain) == IMAGENET[18] - projections


@pytest.mark.parametrize("small", [True, False])
def test_blocks_with_a_zero_body_are_their_shortcut(small: bool) -> None:
    network = SmallResNet((3, 8, 8), 5) if small else ResNet((3, 8, 8), 5, widths=(8,), stem="small")
    for name, parameter in network.blocks.named_parameters():
        if ".body." in name:
            nn.init.zeros_(parameter)
    maps = network.stem.eval()(torch.randn(2, 3, 8, 8))
    output = network.blocks.eval()(maps)
    if small:
        assert output.shape == (2, 64, 2, 2)
        torch.testing.assert_close(output[:, :16], maps[:, :, ::4, ::4])
        assert not output[:, 16:].any()
    else:
        torch.testing.assert_close(output, maps)


def test_subsampling() -> None:
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    assert Subsampling(1, 2, 2)(maps).tolist() == [[[[0, 2, 4], [10, 12, 14]], [[0, 0, 0], [0, 0, 0]]]]


@pytest.mark.parametrize(
    "network",
    [
        ResNet((3, 32, 32), 5, depth=50, widths=(4, 8)),
        ResNet((3, 32, 32), 5, widths=(4, 6, 8, 10), stem="small", shortcuts=False),
        SmallResNet((3, 32, 32), 5, depth=8, width=4),
    ],
    ids=["imagenet", "small-stem", "small"],
)
def test_any_size_at_run_time(network: nn.Module) -> None:
    for size in ((1, 1), (7, 30), (33, 33)):
        assert network.eval()(torch.zeros(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 4), ("small", 1)])
def test_stem(stem, stride: int) -> None:
    assert ResNet((1, 32, 32), 5, widths=(4,), stem=stem).stem(torch.zeros(2, 1, 32, 32)).shape[2] == 32 // stride


def test_other_depths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a depth of 18, 34, 50, 101, 152, got 20\."):
        ResNet((3, 32, 32), 10, depth=20)
    for depth in (2, 18):
        with pytest.raises(ValueError, match=rf"a depth of 6n \+ 2 \(8, 14, 20, \.\.\.\), got {depth}\."):
            SmallResNet((3, 32, 32), 10, depth=depth)


def test_unknown_stems_and_too_many_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stem must be one of imagenet, small; got 'cifar'\."):
        ResNet((3, 32, 32), 10, stem="cifar")
    for widths in ((), (4,) * 5):
        with pytest.raises(ValueError, match=rf"1 to 4 stages, got {len(widths)} widths\."):
            ResNet((3, 32, 32), 10, widths=widths)
