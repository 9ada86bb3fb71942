"""torchvision's published layouts, copied from its source (models/resnet.py and vgg.py), compared with ours."""

from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from upright.architectures.resnet import ResNet
from upright.architectures.vgg import VGG
from upright.training.published_weights import are_imagenet_classes, merge_pooling, resnet_weights, vgg_weights

Layout = dict[str, tuple[int, ...]]

# Depth: convolutions of a block, blocks of each stage, tensors in the file, parameters.
RESNETS = {
    18: (2, (2, 2, 2, 2), 122, 11_689_512),
    34: (2, (3, 4, 6, 3), 218, 21_797_672),
    50: (3, (3, 4, 6, 3), 320, 25_557_032),
    101: (3, (3, 4, 23, 3), 626, 44_549_160),
    152: (3, (3, 8, 36, 3), 932, 60_192_808),
}
# Depth: maps, 0 for a pooling; parameters without and with batch normalisation.
VGGS = {
    11: ((64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0), 132_863_336, 132_868_840),
    13: ((64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0), 133_047_848, 133_053_736),
    16: (
        (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
        138_357_544,
        138_365_992,
    ),
    19: (
        (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0),
        143_667_240,
        143_678_248,
    ),
}


def norm_layout(name: str, maps: int) -> Layout:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (maps,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def resnet_layout(depth: int) -> Layout:
    convolutions, counts, *_ = RESNETS[depth]
    layout: Layout = {"conv1.weight": (64, 3, 7, 7)} | norm_layout("bn1", 64)
    inputs, expansion = 64, 1 if convolutions == 2 else 4
    for stage, count in enumerate(counts):
        width = 64 * 2**stage
        outputs = expansion * width
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            shapes = [(width, inputs, 3), (width, width, 3)]
            if convolutions == 3:
                shapes = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, (out, into, kernel) in enumerate(shapes, 1):
                layout[f"{name}.conv{number}.weight"] = (out, into, kernel, kernel)
                layout |= norm_layout(f"{name}.bn{number}", out)
            if block == 0 and inputs != outputs:
                layout[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                layout |= norm_layout(f"{name}.downsample.1", outputs)
            inputs = outputs
    return layout | {"fc.weight": (1000, inputs), "fc.bias": (1000,)}


def vgg_layout(depth: int, batch_norm: bool, narrow: int = 1, units: int = 4096, classes: int = 1000) -> Layout:
    layout: Layout = {}
    inputs, number = 3, 0
    for maps in VGGS[depth][0]:
        if maps:
            outputs = maps // narrow
            layout |= {f"features.{number}.weight": (outputs, inputs, 3, 3), f"features.{number}.bias": (outputs,)}
            if batch_norm:
                layout |= norm_layout(f"features.{number + 1}", outputs)
            inputs = outputs
        number += (3 if batch_norm else 2) if maps else 1
    for number, rows, columns in ((0, units, inputs * 49), (3, units, units), (6, classes, units)):
        layout |= {f"classifier.{number}.weight": (rows, columns), f"classifier.{number}.bias": (rows,)}
    return layout


def parameters(layout: Layout) -> int:
    return sum(prod(shape) for name, shape in layout.items() if "running" not in name and "tracked" not in name)


def on_meta(layout: Layout) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


def shapes(state: dict[str, Tensor]) -> Layout:
    return {name: tuple(value.shape) for name, value in state.items()}


def random_weights(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Return weights with no value at its default, scaled so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("tracked"):
            return torch.tensor(7)
        if len(shape) > 1:
            return torch.randn(shape, generator=generator).mul_((2 / prod(shape[1:])) ** 0.5)
        if name.endswith("running_var"):
            return torch.rand(shape, generator=generator) + 0.5
        return torch.randn(shape, generator=generator).mul_(0.2) + (name.endswith("weight"))

    return {name: draw(name, shape) for name, shape in layout.items()}


def normalised(state: dict[str, Tensor], name: str, maps: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(maps, mean, var, weight, bias)


def resnet_forward(state: dict[str, Tensor], images: Tensor, depth: int) -> Tensor:
    convolutions, counts, *_ = RESNETS[depth]
    maps = F.conv2d(images, state["conv1.weight"], stride=2, padding=3)
    maps = F.max_pool2d(F.relu(normalised(state, "bn1", maps)), 3, 2, 1)
    for stage, count in enumerate(counts, 1):
        for block in range(count):
            name, entry = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inputs = maps
            for number in range(1, convolutions + 1):
                weight = state[f"{name}.conv{number}.weight"]
                # The first convolution of a basic block has the stride, and the second of a bottleneck.
                stride = entry if number == convolutions - 1 else 1
                maps = F.conv2d(maps, weight, stride=stride, padding=weight.shape[-1] // 2)
                maps = normalised(state, f"{name}.bn{number}", maps)
                maps = maps if number == convolutions else F.relu(maps)
            if f"{name}.downsample.0.weight" in state:
                inputs = F.conv2d(inputs, state[f"{name}.downsample.0.weight"], stride=entry)
                inputs = normalised(state, f"{name}.downsample.1", inputs)
            maps = F.relu(maps + inputs)
    return F.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1), state["fc.weight"], state["fc.bias"])


def vgg_forward(state: dict[str, Tensor], images: Tensor, depth: int, batch_norm: bool) -> Tensor:
    maps, number = images, 0
    for width in VGGS[depth][0]:
        if width:
            maps = F.conv2d(maps, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1)
            maps = F.relu(normalised(state, f"features.{number + 1}", maps) if batch_norm else maps)
            number += 3 if batch_norm else 2
        else:
            maps, number = F.max_pool2d(maps, 2), number + 1
    units = F.adaptive_avg_pool2d(maps, 7).flatten(1)
    for layer in (0, 3, 6):
        units = F.linear(units, state[f"classifier.{layer}.weight"], state[f"classifier.{layer}.bias"])
        units = F.relu(units) if layer < 6 else units
    return units


@pytest.mark.parametrize("depth", RESNETS)
def test_names_and_shapes_of_a_resnet(depth: int) -> None:
    layout = resnet_layout(depth)
    assert (len(layout), parameters(layout)) == RESNETS[depth][2:]
    with torch.device("meta"):
        ours = ResNet((3, 224, 224), 1000, depth=depth).state_dict()
    assert shapes(resnet_weights(on_meta(layout))) == shapes(ours)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("depth", VGGS)
def test_names_and_shapes_of_a_vgg(depth: int, batch_norm: bool) -> None:
    layout = vgg_layout(depth, batch_norm)
    assert parameters(layout) == VGGS[depth][1 + batch_norm]
    with torch.device("meta"):
        ours = VGG((3, 224, 224), 1000, depth=depth, batch_norm=batch_norm).state_dict()
    assert shapes(vgg_weights(on_meta(layout))) == shapes(ours)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor) -> bool:
    assert theirs.std() > 0.01
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_gives_the_same_logits(depth: int) -> None:
    theirs = random_weights(resnet_layout(depth))
    ours = ResNet((3, 64, 64), 1000, depth=depth).eval()
    ours.load_state_dict(resnet_weights(theirs))
    assert same(ours(images(64, 64)), resnet_forward(theirs, images(64, 64), depth))


@torch.no_grad()
def test_a_vgg_of_published_size_gives_the_same_logits() -> None:
    theirs = random_weights(vgg_layout(11, False))
    expected = vgg_forward(theirs, images(64, 64), 11, False)
    ours = VGG((3, 64, 64), 1000, depth=11).eval()
    mapped = vgg_weights(theirs)
    mapped["classifier.layers.1.weight"] = merge_pooling(mapped["classifier.layers.1.weight"], 2, 2)
    ours.load_state_dict(mapped)
    assert same(ours(images(64, 64)), expected)


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("depth", "size"), [(11, (32, 32)), (13, (64, 96)), (16, (224, 224)), (19, (288, 32))], ids=lambda value: f"{value}"
)
def test_a_narrow_vgg_gives_the_same_logits_at_any_size(depth: int, size: tuple[int, int], batch_norm: bool) -> None:
    theirs = random_weights(vgg_layout(depth, batch_norm, narrow=16, units=24, classes=10))
    network = VGG((3, *size), 10, depth=depth, widths=(4, 8, 16, 32, 32), units=(24, 24), batch_norm=batch_norm).eval()
    mapped = vgg_weights(theirs)
    first = merge_pooling(mapped["classifier.layers.1.weight"], size[0] // 32, size[1] // 32)
    if size == (224, 224):
        assert torch.equal(first, mapped["classifier.layers.1.weight"])
    network.load_state_dict(mapped | {"classifier.layers.1.weight": first})
    assert same(network(images(*size)), vgg_forward(theirs, images(*size), depth, batch_norm))


def test_imagenets_classes_are_recognised_by_the_names_of_its_folders() -> None:
    names = tuple(f"n{number:08d}" for number in range(1000))
    assert are_imagenet_classes(names)
    assert not any(map(are_imagenet_classes, (names[:999], names[::-1], tuple(map(str, range(1000))))))
