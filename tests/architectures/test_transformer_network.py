import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from tests.architectures.test_spatial_transformer import FixedTheta, direction, regressing
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

TURN = partial(regressing, transform="rotation")
SHAPE = (1, 16, 16)


def network(**options: object) -> TransformerNetwork:
    return TransformerNetwork(SHAPE, 4, **({"network": LeNet, "transformer": TURN} | options))


def test_observing_records_every_transformer_and_changes_nothing() -> None:
    model, images = network(), torch.rand(3, *SHAPE)
    expected = model(images)
    with observing() as observations:
        logits = model(images)
    assert torch.equal(logits, expected)
    (one,) = observations
    assert one.transformer is model.transformer and one.theta.shape == (3, 2)
    assert torch.equal(model.network(one.output), expected)
    model(images)
    assert len(observations) == 1


def test_observing_can_stop_before_the_network_runs() -> None:
    model = network()
    model.network = None  # would fail if it were called
    with observing(stop_after=1) as observations:
        model(torch.rand(3, *SHAPE))
    assert observations[0].theta.shape == (3, 2)


def test_a_transformer_at_a_named_place_transforms_its_input() -> None:
    plain = LeNet(SHAPE, 4)
    model = network(network=lambda *_: copy.deepcopy(plain), places=["features.3"])
    images = torch.rand(3, *SHAPE)
    # At the identity, the transformer does not change the logits.
    torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=1e-4)
    inside = model.network.features[3][0]
    assert isinstance(inside, SpatialTransformer) and inside.output_shape == (6, 8, 8)
    inside.localisation = FixedTheta(direction(math.pi / 2))
    expected = plain.classifier(plain.features[3:](torch.rot90(plain.features[:3](images), 1, (2, 3))))
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_each_place_has_its_own_shape_and_survives_copying() -> None:
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
    with observing() as observations:
        model(images)
    (last,) = last_of(observations)
    assert (
        len(observations) == 3
        and last.before is observations[1]
        and observations[1].before is observations[0]
        and observations[0].before is None
    )
    assert model.training is False and network(places=["features.3"]).network.training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"places": ["features.9"]}, r"no module .features.9. for a transformer; it has: features, "),
        ({"places": ["features.3", "features.3"]}, "places must be a list of different names, got .'features.3'"),
        ({"places": "input"}, "places must be a list of different names, got 'input'"),
        (
            {"places": ["classifier.1"]},
            r"before 'classifier.1' needs a module that is called once, with feature maps .*it is called with .\(64,\)",
        ),
        (
            {"places": ["features.3"], "transformer": partial(TURN, output_size=(3, 3))},
            "The layers after the transformer at 'features.3' do not take its output",
        ),
        ({"transformer": lambda shape: nn.Identity()}, "Identity has no output_shape"),
        ({"network": MLP, "places": ["layers.0", "layers.1"]}, "before 'layers.1' needs a module that is called once"),
        ({"network": Recurrent, "places": ["recurrent"]}, "before 'recurrent' needs a module that is called once"),
    ],
)
def test_invalid_places_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        network(**options)


def test_places_are_names_of_the_original_network() -> None:
    for places in (["blocks", "blocks.1"], ["blocks.1", "blocks"]):
        model = network(
            network=partial(SmallResNet, depth=8, width=4),
            transformer=partial(TURN, localiser=DenseLocaliser),
            places=places,
        )
        around, blocks = model.network.blocks
        assert isinstance(around, SpatialTransformer) and isinstance(blocks[1][0], SpatialTransformer)
        assert len(blocks) == 3 and around.output_shape == (4, 16, 16) == blocks[1][0].output_shape


class ByKeyword(nn.Module):
    """A network that calls a module by keyword."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.part, self.classifier = nn.Conv2d(1, 4, 3), nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.part(input=images).mean(dim=(2, 3)))


def test_a_part_that_is_called_by_keyword_is_refused() -> None:
    assert network(network=ByKeyword)(torch.rand(2, *SHAPE)).shape == (2, 4)
    with pytest.raises(
        ValueError, match=r"before 'part' needs a module that is called once, .* it is called with none"
    ):
        network(network=ByKeyword, places=["part"])


@pytest.mark.parametrize(
    "factory",
    [
        partial(SeriesTransformer, SHAPE),
        partial(ParallelTransformer, SHAPE),
        partial(ParallelNetwork, SHAPE, 4, network=LeNet),
    ],
)
def test_no_transformer_is_refused(factory: partial) -> None:
    with pytest.raises(ValueError, match="transformers needs at least one transformer"):
        factory(transformers=[])


def test_a_series_consists_of_single_transformers() -> None:
    with pytest.raises(ValueError, match="A series consists of SpatialTransformers, got a ParallelTransformer"):
        SeriesTransformer(SHAPE, transformers=[partial(ParallelTransformer, transformers=[TURN])])


def series() -> SeriesTransformer:
    combined = SeriesTransformer(SHAPE, transformers=[TURN, partial(regressing, output_size=(8, 12))])
    thetas = direction(0.5), [0.1, 0.2, -0.1, 0.0, -0.2, 0.3]
    for transformer, theta in zip(combined.transformers, thetas, strict=True):
        transformer.localisation = FixedTheta(theta)
    return combined


def smooth(*shape: int) -> torch.Tensor:
    return interpolate(torch.rand(*shape[:2], 4, 4), shape[2:], mode="bicubic")


def test_a_series_samples_the_original_once() -> None:
    transformer, images = series(), smooth(3, 1, 16, 16)
    first, second = transformer.transformers
    turn = torch.tensor([direction(0.5)]).expand(3, 2)
    expected = second.sample(
        images, lambda points: first.points(turn, second.points(second.localisation(images), points))
    )
    output = transformer(images)
    assert output.shape == (3, *transformer.output_shape) == (3, 1, 8, 12)
    torch.testing.assert_close(output, expected)
    # Sampling twice differs only by interpolation, and in corners outside of the intermediate image.
    with torch.no_grad():
        difference = (second(first(images)) - output).abs()[..., 2:-2, 3:-3]
    assert 0 < difference.mean() < 0.02


def test_a_series_that_shrinks_does_not_alias() -> None:
    small = partial(regressing, output_size=(6, 6), padding="border", localiser=DenseLocaliser)
    transformer = SeriesTransformer(
        SHAPE, transformers=[small, partial(TURN, padding="border", localiser=DenseLocaliser)]
    )
    stripes = torch.ones(1, *SHAPE) * (torch.arange(16) % 2)
    torch.testing.assert_close(transformer(stripes), small(SHAPE)(stripes), atol=1e-5, rtol=0)
    assert (transformer(stripes) - 0.5).abs().max() < 0.25


def test_each_of_a_series_localises_in_the_output_of_the_one_before() -> None:
    transformer, images = SeriesTransformer(SHAPE, transformers=[TURN, TURN]), torch.rand(2, *SHAPE)
    transformer.transformers[0].localisation = FixedTheta(direction(math.pi / 2))
    inputs: list[torch.Tensor] = []
    transformer.transformers[1].localisation.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with observing() as observations:
        output = transformer(images)
    torch.testing.assert_close(inputs[0], torch.rot90(images, 1, (2, 3)), atol=3e-5, rtol=0)
    torch.testing.assert_close(output, inputs[0], atol=1e-5, rtol=0)
    (last,) = last_of(observations)
    assert len(observations) == 2
    torch.testing.assert_close(
        last.points(pixel_centres(4, 4)), observations[0].points(pixel_centres(4, 4)), atol=1e-6, rtol=0
    )
    with observing(stop_after=2) as stopped:
        transformer(images)
    torch.testing.assert_close(stopped[1].theta, observations[1].theta)


def test_parallel_transformers_have_the_same_input_and_do_not_follow_each_other() -> None:
    transformer = ParallelTransformer((2, 16, 16), transformers=[TURN, regressing])
    transformer.transformers[0].localisation = FixedTheta(direction(math.pi / 2))
    images = torch.rand(3, 2, 16, 16)
    with observing() as observations:
        stacked = transformer(images)
    assert stacked.shape == (3, *transformer.output_shape) == (3, 4, 16, 16)
    torch.testing.assert_close(stacked[:, :2], torch.rot90(images, 1, (2, 3)), atol=3e-5, rtol=0)
    torch.testing.assert_close(stacked[:, 2:], images, atol=1e-5, rtol=0)
    assert last_of(observations) == observations and all(one.before is None for one in observations)
    with pytest.raises(ValueError, match=r"need outputs of one size, got \[\(1, 16, 16\), \(1, 8, 8\)\]"):
        ParallelTransformer(SHAPE, transformers=[TURN, partial(TURN, output_size=(8, 8))])


def test_parallel_networks_behind_a_first_transformer() -> None:
    branches = [
        partial(SpatialTransformer, transform="attention", output_size=(12, 12), start=[-0.7, x, 0.0])
        for x in (-0.5, 0.5)
    ]
    parallel = partial(ParallelNetwork, network=LeNet, transformers=branches, features=5)
    model, images = TransformerNetwork(SHAPE, 4, network=parallel, transformer=TURN), torch.rand(3, *SHAPE)
    with observing() as observations:
        assert model(images).shape == (3, 4)
    assert len(observations) == 3 and last_of(observations) == observations[1:]
    assert observations[1].before is observations[0] and observations[2].before is observations[0]
    # Each starts at its own half of the image.
    first, second = (one.points(pixel_centres(1, 1))[0, 0] for one in last_of(observations))
    assert first.tolist() == pytest.approx([-0.5, 0]) and second.tolist() == pytest.approx([0.5, 0])
