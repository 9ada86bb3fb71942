import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from tests.architectures.test_spatial_transformer import Always
from upright.architectures.lenet import LeNet
from upright.architectures.mlp import MLP
from upright.architectures.recurrent import Recurrent
from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import DenseLocaliser, SpatialTransformer, last_of, observing
from upright.architectures.transformer_network import (
    ParallelNetwork,
    ParallelTransformer,
    SeriesTransformer,
    TransformerNetwork,
)
from upright.warp import pixel_centres

TURN = partial(SpatialTransformer, transform="rotation")
SHAPE = (1, 16, 16)


def network(**options: object) -> TransformerNetwork:
    return TransformerNetwork(SHAPE, 4, **({"network": LeNet, "transformer": TURN} | options))


def test_observing_changes_nothing_and_sees_everything() -> None:
    model, images = network(), torch.rand(3, *SHAPE)
    expected = model(images)
    with observing() as seen:
        logits = model(images)
    assert torch.equal(logits, expected)
    (one,) = seen
    assert one.transformer is model.transformer and one.theta.shape == (3, 1)
    assert torch.equal(model.network(one.turned), expected)
    model(images)
    assert len(seen) == 1


def test_observing_can_stop_before_the_network_runs() -> None:
    model = network()
    model.network = None  # would fail if it were called
    with observing(stop_after=1) as seen:
        model(torch.rand(3, *SHAPE))
    assert seen[0].theta.shape == (3, 1)


def test_a_transformer_at_a_named_place_turns_what_comes_there() -> None:
    plain = LeNet(SHAPE, 4)
    model = network(network=lambda *_: copy.deepcopy(plain), places=["features.3"])
    images = torch.rand(3, *SHAPE)
    # At the identity the network says what it said.
    torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=1e-4)
    inside = model.network.features[3][0]
    assert isinstance(inside, SpatialTransformer) and inside.output_shape == (6, 8, 8)
    inside.localisation = Always([math.pi / 2])
    expected = plain.classifier(plain.features[3:](torch.rot90(plain.features[:3](images), 1, (2, 3))))
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_places_take_their_own_shapes_and_survive_copying() -> None:
    model = network(
        network=partial(SmallResNet, depth=8, width=4),
        transformer=partial(TURN, localiser=DenseLocaliser),
        places=["input", "blocks.1", "blocks.2"],
    )
    shapes = [module.output_shape for module in model.modules() if isinstance(module, SpatialTransformer)]
    assert shapes == [(1, 16, 16), (4, 16, 16), (8, 8, 8)]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.blocks[1][0].localisation[-1].bias += 1
    images = torch.rand(2, *SHAPE)
    assert not torch.allclose(model.eval()(images), other.eval()(images))
    with observing() as seen:
        model(images)
    (last,) = last_of(seen)
    assert len(seen) == 3 and last.before is seen[1] and seen[1].before is seen[0] and seen[0].before is None
    assert model.training is False and network(places=["features.3"]).network.training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"places": ["features.9"]}, r"no module .features.9. to put a transformer before; it has: features, "),
        ({"places": ["features.3", "features.3"]}, "places must be a list of different names, got .'features.3'"),
        ({"places": "input"}, "places must be a list of different names, got 'input'"),
        (
            {"places": ["classifier.1"]},
            r"'classifier.1' must be called once, with feature maps .C, H, W.*it is called with .\(64,\)",
        ),
        (
            {"places": ["features.3"], "transformer": partial(TURN, output_size=(3, 3))},
            "What follows the transformer at 'features.3' cannot take its output",
        ),
        ({"transformer": lambda shape: nn.Identity()}, "Identity has no output_shape"),
        ({"network": MLP, "places": ["layers.0", "layers.1"]}, "'layers.1' must be called once, with feature maps"),
        ({"network": Recurrent, "places": ["recurrent"]}, "'recurrent' must be called once, with feature maps"),
    ],
)
def test_places_that_cannot_be_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        network(**options)


def test_names_are_those_of_the_network_as_it_was() -> None:
    for places in (["blocks", "blocks.1"], ["blocks.1", "blocks"]):
        model = network(
            network=partial(SmallResNet, depth=8, width=4),
            transformer=partial(TURN, localiser=DenseLocaliser),
            places=places,
        )
        around, blocks = model.network.blocks
        assert isinstance(around, SpatialTransformer) and isinstance(blocks[1][0], SpatialTransformer)
        assert len(blocks) == 3 and around.output_shape == (4, 16, 16) == blocks[1][0].output_shape


class Named(nn.Module):
    """Calls its part by keyword."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.part, self.classifier = nn.Conv2d(1, 4, 3), nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.part(input=images).mean(dim=(2, 3)))


def test_a_part_that_is_called_by_keyword_is_refused() -> None:
    assert network(network=Named)(torch.rand(2, *SHAPE)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"'part' must be called once, with .* it is called with none"):
        network(network=Named, places=["part"])


@pytest.mark.parametrize(
    "made",
    [
        partial(SeriesTransformer, SHAPE),
        partial(ParallelTransformer, SHAPE),
        partial(ParallelNetwork, SHAPE, 4, network=LeNet),
    ],
)
def test_none_at_all_is_refused(made: partial) -> None:
    with pytest.raises(ValueError, match="transformers must name at least one"):
        made(transformers=[])


def test_a_series_is_of_single_transformers() -> None:
    with pytest.raises(ValueError, match="A series is of SpatialTransformers, got a ParallelTransformer"):
        SeriesTransformer(SHAPE, transformers=[partial(ParallelTransformer, transformers=[TURN])])


def series() -> SeriesTransformer:
    made = SeriesTransformer(SHAPE, transformers=[TURN, partial(SpatialTransformer, output_size=(8, 12))])
    for transformer, theta in zip(made.transformers, ([0.5], [0.1, 0.2, -0.1, 0.0, -0.2, 0.3]), strict=True):
        transformer.localisation = Always(theta)
    return made


def smooth(*shape: int) -> torch.Tensor:
    return interpolate(torch.rand(*shape[:2], 4, 4), shape[2:], mode="bicubic")


def test_a_series_samples_the_original_once() -> None:
    made, images = series(), smooth(3, 1, 16, 16)
    first, second = made.transformers
    turn = torch.tensor([[0.5]]).expand(3, 1)
    expected = second.look(
        images, lambda points: first.points(turn, second.points(second.localisation(images), points))
    )
    turned = made(images)
    assert turned.shape == (3, *made.output_shape) == (3, 1, 8, 12)
    torch.testing.assert_close(turned, expected)
    # Sampling twice gives the same but for what interpolation loses, and for corners that were out of sight between.
    with torch.no_grad():
        difference = (second(first(images)) - turned).abs()[..., 2:-2, 3:-3]
    assert 0 < difference.mean() < 0.02


def test_a_series_that_shrinks_does_not_alias() -> None:
    small = partial(SpatialTransformer, output_size=(6, 6), padding="border", localiser=DenseLocaliser)
    made = SeriesTransformer(SHAPE, transformers=[small, partial(TURN, padding="border", localiser=DenseLocaliser)])
    stripes = torch.ones(1, *SHAPE) * (torch.arange(16) % 2)
    torch.testing.assert_close(made(stripes), small(SHAPE)(stripes), atol=1e-5, rtol=0)
    assert (made(stripes) - 0.5).abs().max() < 0.25


def test_each_of_a_series_looks_at_what_the_one_before_it_gave() -> None:
    made, images = SeriesTransformer(SHAPE, transformers=[TURN, TURN]), torch.rand(2, *SHAPE)
    made.transformers[0].localisation = Always([math.pi / 2])
    found: list[torch.Tensor] = []
    made.transformers[1].localisation.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with observing() as seen:
        turned = made(images)
    torch.testing.assert_close(found[0], torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned, found[0], atol=1e-5, rtol=0)
    (last,) = last_of(seen)
    assert len(seen) == 2
    torch.testing.assert_close(last.points(pixel_centres(4, 4)), seen[0].points(pixel_centres(4, 4)), atol=1e-6, rtol=0)
    with observing(stop_after=2) as stopped:
        made(images)
    torch.testing.assert_close(stopped[1].theta, seen[1].theta)


def test_parallel_transformers_see_the_same_and_none_follows_another() -> None:
    made = ParallelTransformer((2, 16, 16), transformers=[TURN, SpatialTransformer])
    made.transformers[0].localisation = Always([math.pi / 2])
    images = torch.rand(3, 2, 16, 16)
    with observing() as seen:
        stacked = made(images)
    assert stacked.shape == (3, *made.output_shape) == (3, 4, 16, 16)
    torch.testing.assert_close(stacked[:, :2], torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(stacked[:, 2:], images, atol=1e-5, rtol=0)
    assert last_of(seen) == seen and all(one.before is None for one in seen)
    with pytest.raises(ValueError, match=r"must give one size to be stacked, got \[\(1, 16, 16\), \(1, 8, 8\)\]"):
        ParallelTransformer(SHAPE, transformers=[TURN, partial(TURN, output_size=(8, 8))])


def test_parallel_networks_behind_a_first_transformer() -> None:
    branches = [
        partial(SpatialTransformer, transform="attention", output_size=(12, 12), start=[-0.7, x, 0.0])
        for x in (-0.5, 0.5)
    ]
    parallel = partial(ParallelNetwork, network=LeNet, transformers=branches, features=5)
    model, images = TransformerNetwork(SHAPE, 4, network=parallel, transformer=TURN), torch.rand(3, *SHAPE)
    with observing() as seen:
        assert model(images).shape == (3, 4)
    assert len(seen) == 3 and last_of(seen) == seen[1:]
    assert seen[1].before is seen[0] and seen[2].before is seen[0]
    # They are laid out over the image: each sees its own half.
    left, right = (one.points(pixel_centres(1, 1))[0, 0] for one in last_of(seen))
    assert left.tolist() == pytest.approx([-0.5, 0]) and right.tolist() == pytest.approx([0.5, 0])
