import math
from functools import partial

import pytest
import torch
from torch import nn

from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import (
    Localiser,
    SpatialTransformer,
    TransformerNetwork,
    composed_points,
    observing,
)
from upright.warp import pixel_centres, rotation, sample

KINDS = ("rotation", "affine")
SHAPE = (2, 16, 16)


class Always(nn.Module):
    """A localisation that always says the same theta."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(images), -1)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_exactly_at_the_identity(kind: str, images: torch.Tensor) -> None:
    transformer = SpatialTransformer(SHAPE, transform=kind)
    assert (transformer.localisation(images) == 0).all()
    torch.testing.assert_close(transformer(images), images, atol=1e-6, rtol=0)


def test_rotation_by_a_quarter_equals_rot90(images: torch.Tensor) -> None:
    transformer = SpatialTransformer(SHAPE, transform="rotation")
    transformer.localisation = Always([math.pi / 2])
    torch.testing.assert_close(transformer(images), torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)


def test_affine_moves_known_pixels_to_known_places(images: torch.Tensor) -> None:
    transformer = SpatialTransformer(SHAPE, transform="affine")
    # Output x samples input x + 2 pixels: the image moves two pixels to the left, zeros come in.
    transformer.localisation = Always([0.0, 0.0, 2 * 2 / 16, 0.0, 0.0, 0.0])
    moved = transformer(images)
    torch.testing.assert_close(moved[..., :14], images[..., 2:], atol=1e-5, rtol=0)
    assert moved[..., 14:].abs().max() == 0


def test_affine_and_rotation_agree_where_both_can(images: torch.Tensor) -> None:
    turn, affine = (SpatialTransformer(SHAPE, transform=kind) for kind in KINDS)
    matrix = rotation(torch.tensor([0.4]))[0, :2] - torch.eye(2, 3)
    turn.localisation, affine.localisation = Always([0.4]), Always(matrix.flatten().tolist())
    torch.testing.assert_close(turn(images), affine(images))


@pytest.mark.parametrize("kind", KINDS)
def test_theta_gets_a_gradient(kind: str, images: torch.Tensor) -> None:
    transformer = SpatialTransformer(SHAPE, transform=kind)
    (transformer(images) * torch.linspace(0, 1, 16)).sum().backward()
    assert transformer.localisation[-1].bias.grad.abs().min() > 0


def test_any_network_localises() -> None:
    transformer = SpatialTransformer((1, 28, 28), localiser=LeNet, features=12)
    assert transformer(torch.zeros(2, 1, 28, 28)).shape == (2, 1, 28, 28)


def test_too_small() -> None:
    with pytest.raises(ValueError, match=r"at least 8x8 pixels, got 7x16"):
        Localiser((1, 7, 16), 32)


def network() -> TransformerNetwork:
    return TransformerNetwork(
        (1, 16, 16), 4, network=LeNet, transformer=partial(SpatialTransformer, transform="rotation")
    )


def test_observing_changes_nothing_and_sees_everything() -> None:
    model, images = network(), torch.rand(3, 1, 16, 16)
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
        model(torch.rand(3, 1, 16, 16))
    assert seen[0].theta.shape == (3, 1)


def test_transformers_in_series_compose_in_their_order() -> None:
    first, second = SpatialTransformer(SHAPE, transform="rotation"), SpatialTransformer(SHAPE, transform="affine")
    # A quarter turn, then two of sixteen pixels to the left: both exact on the grid, and they do not commute.
    first.localisation, second.localisation = Always([math.pi / 2]), Always([0.0, 0.0, 0.25, 0.0, 0.0, 0.0])
    images = torch.rand(1, *SHAPE)
    with observing() as seen:
        turned = nn.Sequential(first, second)(images)
    points = composed_points(seen, pixel_centres(16, 16))
    torch.testing.assert_close(sample(images, points, 16, 16), turned, atol=1e-4, rtol=0)
    torch.testing.assert_close(turned[..., :14], torch.rot90(images, 1, (2, 3))[..., 2:], atol=1e-4, rtol=0)
