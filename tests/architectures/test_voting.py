"""Contracts of voting localisers: rotate the image by any angle, and the transformer rotates by that angle less."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from upright.architectures.polar import PolarNetwork
from upright.architectures.spatial_transformer import Observation, SpatialTransformer, observing
from upright.architectures.voting import NetworkLocaliser, PolarLocaliser
from upright.data.digits import Digits
from upright.training.model import orientation
from upright.training.uprightness import Uprightness
from upright.warp import disc, pixel_centres, resize, rotation, rotation_angle, transform_points

VARIANTS = {
    "default": ((1, 28, 28), {}, 5.0),
    "five": ((1, 28, 28), {"kernel": 5}, 2.0),
    "fine": ((1, 28, 28), {"angles": 64, "radii": 16}, 2.0),
    "odd": ((2, 27, 27), {"angles": 30, "widths": (6,)}, 3.0),
    "wide": ((3, 24, 40), {}, 3.0),
    "photograph": ((3, 96, 96), {}, 4.0),
    "features": ((6, 14, 14), {"radii": 6}, 8.0),
}
"""Shape, options, and the tolerance of the angle in degrees."""
Variant = tuple[tuple[int, int, int], SpatialTransformer, float]


def scene(shape: tuple[int, int, int], angles: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` of blobs, computed at ``angles`` anticlockwise rather than resampled."""
    channels, height, width = shape
    points = pixel_centres(height, width)
    matrices = rotation(angles, width / height)
    at = transform_points(matrices, points) * torch.tensor([width / height, 1.0])  # in half heights
    reach = min(1.0, width / height)
    generator = torch.Generator().manual_seed(3)
    images = torch.zeros(len(angles), channels, height * width)
    for channel in range(channels):
        for _ in range(4):
            radius, angle, size = torch.rand(3, generator=generator)
            centre = (
                0.7 * reach * radius.sqrt() * torch.stack([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()])
            )
            distance = (at - centre).square().sum(dim=-1)
            images[:, channel] += (-distance / (2 * (reach * (0.12 + 0.15 * size)) ** 2)).exp()
    return images.reshape(len(angles), *shape)


def poses(transformer: SpatialTransformer, images: Tensor) -> Tensor:
    """Return the angle of each transform, in degrees anticlockwise."""
    points, aspect = pixel_centres(4, 4), images.shape[-1] / images.shape[-2]
    with torch.no_grad():
        theta, _ = transformer.locate(images)
        return rotation_angle(transformer.points(theta, points), points, aspect).rad2deg()


def turns(angles: Tensor) -> Tensor:
    return torch.remainder(angles + 180, 360) - 180


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    shape, options, tolerance = VARIANTS[request.param]
    torch.manual_seed(1)
    return shape, SpatialTransformer(shape, localiser=partial(PolarLocaliser, **options)), tolerance


def test_the_pose_rotates_with_the_image_before_any_training(variant: Variant) -> None:
    shape, transformer, tolerance = variant
    applied = torch.linspace(-180, 180, 61)
    angles = poses(transformer, scene(shape, applied.deg2rad()))
    assert turns(angles + applied - angles[30]).abs().max() < tolerance


def test_a_network_of_scores_answers_as_in_the_task_orientation() -> None:
    network = partial(PolarNetwork, angles=32, radii=8, widths=(16,), strides=(2,), blocks=1)
    localiser = partial(NetworkLocaliser, network=network, turns=16, size=24, mask="disc")
    transformer = SpatialTransformer((2, 20, 28), localiser=localiser).eval()
    transformer.localiser.scale.mul_(2)
    transformer.localiser.shift.add_(0.3)
    transformer.localiser.network.classifier.weight.data.mul_(8)  # sharper votes
    images = torch.rand(6, 2, 20, 28)
    with torch.no_grad(), observing() as observations:
        transformer(images)
        scores = transformer.localiser.network((resize(images, 24, 24, "crop") * 2 + 0.3) * disc(24, 24))
    angles, confidence = orientation(scores).unbind(dim=1)
    assert turns(poses(transformer, images) + angles).abs().max() < 1e-3 and angles.std() > 10
    torch.testing.assert_close(observations[0].confidence, confidence)
    torch.testing.assert_close(observations[0].votes, scores.softmax(dim=1))


@pytest.mark.parametrize(
    "localiser",
    [PolarLocaliser, partial(NetworkLocaliser, network=partial(PolarNetwork, radii=8, blocks=1), turns=32)],
    ids=["polar", "network"],
)
def test_quarter_rotations_are_exact(localiser: Any) -> None:
    torch.manual_seed(0)
    transformer = SpatialTransformer((2, 20, 20), localiser=localiser).eval()
    images = torch.rand(5, 2, 20, 20)
    angles = torch.stack([poses(transformer, images.rot90(quarter, (2, 3))) for quarter in range(4)])
    assert turns(angles - angles[0] + 90 * torch.arange(4)[:, None]).abs().max() < 0.5


def test_votes_move_by_one_angle_with_the_columns_of_the_grid() -> None:
    localiser = PolarLocaliser((1, 28, 28), 8, angles=30, kernel=5)
    ring = torch.rand(2, 1, 8, 30)

    def features(columns: Tensor) -> Tensor:
        margin = 2 * len((8, 8))
        return localiser.layers(torch.cat([columns[..., -margin:], columns, columns[..., :margin]], dim=-1))

    torch.testing.assert_close(features(ring.roll(7, -1)), features(ring).roll(7, -1), atol=1e-5, rtol=1e-5)


def test_only_the_disc_is_seen() -> None:
    transformer, images = SpatialTransformer((1, 28, 28)), torch.rand(3, 1, 28, 28)
    # Interpolation and blur reach up to two pixels further.
    outside = (pixel_centres(28, 28).norm(dim=1) > 1 + 4 / 28).reshape(28, 28)
    changed = torch.where(outside, torch.rand(3, 1, 28, 28), images)
    assert torch.equal(transformer.locate(images)[1], transformer.locate(changed)[1])


def test_gradients_are_finite_and_a_blank_image_stays_as_it_is() -> None:
    transformer = SpatialTransformer((1, 28, 28))
    blank = torch.full((2, 1, 28, 28), 0.7, requires_grad=True)
    noise = torch.rand(2, 1, 28, 28, requires_grad=True)
    for images in (blank, noise):
        points = transformer.points(transformer.locate(images)[0], pixel_centres(4, 4))
        points.square().sum().backward()
        (transformer(images) * torch.rand(28, 28)).sum().backward()
        assert images.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in transformer.parameters())
    assert poses(transformer, blank.detach()).abs().max() < 6


def test_theta_is_the_direction_of_the_mean_vote() -> None:
    transformer, images = SpatialTransformer((1, 28, 28)), torch.rand(3, 1, 28, 28)
    theta, votes = transformer.locate(images)
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(3))
    angles = 2 * math.pi * (torch.arange(32) + 0.5) / 32
    x, y = votes @ angles.cos(), votes @ angles.sin()
    torch.testing.assert_close(torch.atan2(theta[:, 1], theta[:, 0] + 1), torch.atan2(y, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theta.add(torch.tensor([1.0, 0.0])).norm(dim=1), torch.ones(3))
    with observing() as observations:
        transformer(images)
    assert torch.equal(observations[0].votes, votes) and torch.equal(observations[0].theta, theta)


def test_confidence_is_the_concentration_of_the_votes() -> None:
    transformer = SpatialTransformer((1, 28, 28))
    votes = torch.stack([torch.full((32,), 1 / 32), torch.eye(32)[5], (torch.eye(32)[0] + torch.eye(32)[16]) / 2])
    observation = Observation(transformer, transformer.localiser.theta(votes), torch.empty(0), None, votes)
    torch.testing.assert_close(observation.confidence, torch.tensor([0.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    assert Observation(transformer, observation.theta, torch.empty(0), None).confidence is None


def test_a_rotation_needs_no_training_to_be_upright_on_digits() -> None:
    # The spread of the angles of a digit under all rotations: a textbook transformer has 1, before training.
    digits = Digits(angles=(-160, -120, -80, -40, 0, 40, 80, 120, 160), train_fraction=0.1)
    samples = digits.samples("val")[:450]
    for seed in range(3):
        torch.manual_seed(seed)
        transformer, measure = SpatialTransformer((1, 28, 28)), Uprightness()
        with torch.no_grad(), observing() as observations:
            transformer((samples.images / 255 - 0.16) / 0.28)
        measure.update(samples.group, samples.transforms, observations, 1.0)
        assert float(measure.compute()["uprightness"]) < 0.2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"angles": 3}, "at least 4 angles and 1 radius, got 3 and 8"),
        ({"radii": 0}, "at least 4 angles and 1 radius, got 32 and 0"),
        ({"kernel": 4}, r"at least one convolution with an odd kernel, got widths \[8, 8\] and kernel 4"),
        ({"widths": ()}, r"at least one convolution with an odd kernel, got widths \[\] and kernel 3"),
    ],
)
def test_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PolarLocaliser((1, 28, 28), 8, **options)


def test_the_transform_has_to_be_that_of_the_votes() -> None:
    with pytest.raises(ValueError, match="PolarLocaliser votes for the transform 'rotation' and has no start; got"):
        SpatialTransformer((1, 28, 28), transform="affine", localiser=PolarLocaliser)
    with pytest.raises(ValueError, match="turns must be at least 4, got 2"):
        SpatialTransformer((1, 28, 28), localiser=partial(NetworkLocaliser, network=PolarNetwork, turns=2))
    with pytest.raises(ValueError, match=r"got transform 'rotation' and start \[1.0, 0.0\]"):
        SpatialTransformer((1, 28, 28), start=[1.0, 0.0])
