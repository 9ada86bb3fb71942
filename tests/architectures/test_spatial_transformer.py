import math
from collections.abc import Sequence
from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from upright.architectures.initialisation import initialise
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import (
    ConvLocaliser,
    DenseLocaliser,
    SpatialTransformer,
    last_of,
    observing,
)
from upright.architectures.transforms import TransformName
from upright.warp import pixel_centres, rotation, sample

TRANSFORMS = get_args(TransformName)
SHAPE = (2, 16, 16)
QUARTER, HALF = math.pi / 2, math.log(0.5)
PIXEL = 2 / 16


class FixedTheta(nn.Module):
    """A localisation with the same theta for every image."""

    def __init__(self, theta: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([list(theta)]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(images), -1)


regressing = partial(SpatialTransformer, transform="affine", localiser=ConvLocaliser)
"""A transformer with the paper's localiser, whatever its transform."""


def fixed(theta: Sequence[float], shape: tuple[int, int, int] = SHAPE, **options: object) -> SpatialTransformer:
    transformer = regressing(shape, **options)
    transformer.localisation = FixedTheta(theta)
    return transformer


def direction(angle: float) -> list[float]:
    """Return theta of a rotation by ``angle``, in radians."""
    return [math.cos(angle) - 1, math.sin(angle)]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampling", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_starts_exactly_at_the_identity(kind: str, sampling: str, images: torch.Tensor) -> None:
    transformer = regressing(SHAPE, transform=kind, sampling=sampling)
    assert (transformer.localisation(images) == 0).all()
    torch.testing.assert_close(transformer(images), images, atol=3e-6, rtol=0)
    # The scheme of the other weights does not matter.
    initialise(transformer, "he_normal")
    assert (transformer.localisation(images) == 0).all()
    assert transformer.localisation[0].layers[1].weight.std() > 0.1


def test_rotation_by_a_quarter_equals_rot90(images: torch.Tensor) -> None:
    for kind, theta in (("rotation", direction(QUARTER)), ("similarity", [*direction(QUARTER), 0.0, 0.0, 0.0])):
        rotated = fixed(theta, transform=kind)(images)
        torch.testing.assert_close(rotated, torch.rot90(images, 1, (2, 3)), atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "theta"),
    [
        ("translation", [2 * PIXEL, 0.0]),
        ("attention", [0.0, 2 * PIXEL, 0.0]),
        ("similarity", [0.0, 0.0, 0.0, 2 * PIXEL, 0.0]),
        ("affine", [0.0, 0.0, 2 * PIXEL, 0.0, 0.0, 0.0]),
        ("projective", [0.0, 0.0, 2 * PIXEL, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ("thin_plate", [2 * PIXEL, 0.0] * 16),
    ],
)
def test_a_shift_moves_known_pixels_to_known_places(kind: str, theta: list[float], images: torch.Tensor) -> None:
    # Output x samples input x + 2 pixels: the image moves two pixels to the left, and zeros follow.
    moved = fixed(theta, transform=kind)(images)
    torch.testing.assert_close(moved[..., :14], images[..., 2:], atol=1e-4, rtol=0)
    assert moved[..., 14:].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "theta"),
    [
        ("attention", [HALF, 0.0, 0.0]),
        ("similarity", [0.0, 0.0, HALF, 0.0, 0.0]),
        ("affine", [-0.5, 0.0, 0.0, 0.0, -0.5, 0.0]),
    ],
)
def test_zooming_enlarges_the_centre(kind: str, theta: list[float], images: torch.Tensor) -> None:
    zoomed = fixed(theta, transform=kind, sampling="nearest")(images)
    expected = images[..., 4:12, 4:12].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(zoomed, expected)


def test_projective_follows_the_formula_and_is_finite_behind_the_horizon() -> None:
    theta = [0.1, 0.2, 0.3, -0.1, 0.0, 0.05, 0.3, -0.4]
    points = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-1.0, 0.8]])
    projected = regressing(SHAPE, transform="projective").points(torch.tensor([theta]), points)[0]
    for (x, y), point in zip(points.tolist(), projected.tolist(), strict=True):
        depth = 0.3 * x - 0.4 * y + 1
        assert point == pytest.approx([(1.1 * x + 0.2 * y + 0.3) / depth, (-0.1 * x + y + 0.05) / depth], abs=1e-5)
    wild = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]])
    # A point on the horizon, which divides by zero, and a point behind it.
    behind = torch.tensor([[-0.5, 0.2], [-1.0, 0.2]])
    projected = regressing(SHAPE, transform="projective").points(wild, behind)[0]
    assert projected.isfinite().all() and (projected[:, 0] < -1).all()


@pytest.mark.parametrize("control_points", [2, 3, 5])
def test_a_thin_plate_passes_through_its_control_points(control_points: int) -> None:
    transformer = regressing(SHAPE, transform="thin_plate", control_points=control_points)
    theta = 0.3 * torch.randn(4, 2 * control_points**2)
    controls = transformer.transform.controls
    moved = transformer.points(theta, controls)
    torch.testing.assert_close(moved, controls + theta.unflatten(1, (-1, 2)), atol=1e-4, rtol=0)
    assert controls[1].tolist() == [-1 + 2 / (control_points - 1), -1]  # row by row


def test_projective_and_thin_plate_reduce_to_affine(images: torch.Tensor) -> None:
    affine = torch.tensor([0.1, -0.3, 0.2, 0.25, -0.2, -0.1])
    expected = fixed(affine.tolist())(images)
    projective = fixed([*affine.tolist(), 0.0, 0.0], transform="projective")
    torch.testing.assert_close(projective(images), expected, atol=1e-5, rtol=0)
    thin_plate = regressing(SHAPE, transform="thin_plate")
    controls = thin_plate.transform.controls
    shifts = controls @ affine.reshape(2, 3)[:, :2].T + affine.reshape(2, 3)[:, 2]
    thin_plate.localisation = FixedTheta(shifts.flatten().tolist())
    torch.testing.assert_close(thin_plate(images), expected, atol=1e-4, rtol=0)


def test_affine_and_rotation_agree_for_rotations(images: torch.Tensor) -> None:
    matrix = rotation(torch.tensor([0.4]))[0, :2] - torch.eye(2, 3)
    torch.testing.assert_close(
        fixed(direction(0.4), transform="rotation")(images),
        fixed(matrix.flatten().tolist(), transform="affine")(images),
    )


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_theta_has_a_gradient_except_with_nearest(kind: str, images: torch.Tensor) -> None:
    for sampling in ("bilinear", "bicubic", "nearest"):
        transformer = regressing(SHAPE, transform=kind, sampling=sampling)
        # At pixel centres, even the gradient of a bilinear value is one-sided.
        nn.init.constant_(transformer.localisation[-1].bias, 0.03)
        (transformer(images) * torch.linspace(0, 1, 16)).sum().backward()
        gradient = transformer.localisation[-1].bias.grad.abs()
        assert gradient.max() == 0 if sampling == "nearest" else gradient.min() > 0


def test_a_smaller_output_is_averaged_and_a_larger_one_interpolated(images: torch.Tensor) -> None:
    smaller = regressing(SHAPE, output_size=(8, 4))
    assert smaller.output_shape == (2, 8, 4)
    torch.testing.assert_close(smaller(images), avg_pool2d(images, (2, 4)), atol=1e-5, rtol=0)
    larger = regressing(SHAPE, output_size=(32, 24), padding="border")
    expected = interpolate(images, (32, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger(images), expected, atol=1e-5, rtol=0)
    # Stripes of one pixel become grey and do not alias.
    stripes = torch.ones(1, *SHAPE) * (torch.arange(16) % 2)
    odd = regressing(SHAPE, output_size=(16, 6), padding="border")(stripes)
    assert (odd - 0.5).abs().max() < 0.25


@pytest.mark.parametrize(("padding", "expected"), [("zeros", 0.0), ("border", 1.0), ("reflection", 1.0)])
def test_padding_sets_the_values_beyond_the_border(padding: str, expected: float) -> None:
    with torch.no_grad():
        moved = fixed([2 * PIXEL, 0.0], transform="translation", padding=padding)(torch.ones(1, *SHAPE))
    assert moved[..., -1].mean() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_sampling_is_exact_in_half_precision(kind: str) -> None:
    # Sixteenths are exact in bfloat16.
    transformer, points = regressing(SHAPE, transform=kind), pixel_centres(128, 128)
    theta = torch.arange(2 * transformer.transform.size).reshape(2, -1) % 5 / 16
    expected = transformer.points(theta, points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transformer.points(theta.bfloat16(), points), expected)
        assert transformer(torch.zeros(1, *SHAPE, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("localiser", [LeNet, ConvLocaliser, DenseLocaliser])
def test_any_network_can_be_the_localiser(localiser: type[nn.Module]) -> None:
    transformer = regressing((1, 28, 28), localiser=localiser, features=12)
    assert transformer(torch.zeros(2, 1, 28, 28)).shape == (2, 1, 28, 28)


def test_start_is_theta_before_training(images: torch.Tensor) -> None:
    transformer = regressing(SHAPE, transform="attention", start=[HALF, -0.5, 0.5])
    assert transformer.localisation(images).tolist() == [pytest.approx([HALF, -0.5, 0.5])] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_size": (0, 4)}, "output_size must be at least 1x1, got 0x4"),
        ({"transform": "thin_plate", "control_points": 1}, "at least 2 control points per axis, got 1"),
        ({"sampling": "linear"}, "sampling must be one of bilinear, bicubic, nearest; got 'linear'"),
        ({"padding": "black"}, "padding must be one of zeros, border, reflection; got 'black'"),
        ({"transform": "rotat"}, "transform must be one of translation, rotation, .*; got 'rotat'"),
        ({"transform": "rotation", "start": [0.0]}, "start needs 2 numbers for 'rotation', got 1"),
    ],
)
def test_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        regressing(SHAPE, **options)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ConvLocaliser needs images of at least 8x8 pixels, got 7x16"):
        ConvLocaliser((1, 7, 16), 32)


def test_transformers_in_series_compose_in_order() -> None:
    # A rotation by 90 degrees, then a shift by two pixels: both are exact on the grid, and they do not commute.
    first, second = fixed(direction(QUARTER), transform="rotation"), fixed([0.0, 0.0, 2 * PIXEL, 0.0, 0.0, 0.0])
    images = torch.rand(1, *SHAPE)
    with observing() as observations:
        rotated = nn.Sequential(first, second)(images)
    (last,) = last_of(observations)
    points = last.points(pixel_centres(16, 16))
    torch.testing.assert_close(sample(images, points, 16, 16), rotated, atol=1e-4, rtol=0)
    torch.testing.assert_close(rotated[..., :14], torch.rot90(images, 1, (2, 3))[..., 2:], atol=1e-4, rtol=0)
