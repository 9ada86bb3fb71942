import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample, interpolate

import upright.warp
from upright.images import Interpolation
from upright.warp import (
    Rule,
    identity,
    pixel_centres,
    resize,
    resize_pixels,
    rotation,
    rotation_angle,
    sample,
    transform_points,
    warp,
)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))


def test_identity_changes_nothing(images: torch.Tensor) -> None:
    torch.testing.assert_close(warp(images, identity(2)), images)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_right_angles_equal_rot90(quarters: int) -> None:
    square = torch.rand(2, 1, 8, 8)
    rotated = warp(square, rotation(torch.full((2,), quarters * math.pi / 2)))
    torch.testing.assert_close(rotated, torch.rot90(square, quarters, (2, 3)), atol=1e-5, rtol=0)


def test_points_equal_torchs_affine_grid(images: torch.Tensor) -> None:
    matrices = torch.eye(2, 3) + 0.3 * torch.rand(2, 2, 3)
    grid = affine_grid(matrices, list(images.shape), align_corners=False)
    points = transform_points(matrices, pixel_centres(9, 13))
    torch.testing.assert_close(points, grid.reshape(2, -1, 2))
    torch.testing.assert_close(sample(images, points, 9, 13), grid_sample(images, grid, align_corners=False))


def test_a_wide_image_is_rotated_without_shear() -> None:
    # Rotation by 90 degrees maps a bar along x in a 20 x 40 image to a bar along y of the same length and width.
    image = torch.zeros(1, 1, 20, 40)
    image[..., 9:11, 14:26] = 1
    rotated = warp(image, rotation(torch.tensor([math.pi / 2]), aspect=2.0))
    rows, columns = (rotated[0, 0] > 0.5).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 15, 19, 20)


def test_warping_twice_equals_warping_by_the_product() -> None:
    smooth = interpolate(torch.rand(1, 1, 5, 5), (64, 64), mode="bicubic")
    first, second = rotation(torch.tensor([0.2])), rotation(torch.tensor([0.3]))
    twice, once = warp(warp(smooth, first), second), warp(smooth, first @ second)
    assert (twice - once)[..., 16:-16, 16:-16].abs().max() < 0.02


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_rotation_angle_is_recovered_from_points(aspect: float) -> None:
    angles = torch.tensor([-3.0, -0.4, 0.0, 1.5])
    points = pixel_centres(4, 4)
    moved = transform_points(rotation(angles, aspect), points) * 0.7 + 0.1
    torch.testing.assert_close(rotation_angle(moved, points, aspect), angles)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(28, 28), (5, 7), (9, 13), (3, 20), (1, 1)])
def test_resize_equals_antialiased_interpolate(size: tuple[int, int], interpolation: Interpolation) -> None:
    images = torch.randint(0, 256, (2, 3, 9, 13), generator=torch.Generator().manual_seed(0)).float()
    expected = interpolate(images, size, mode=interpolation, antialias=True).clamp(0, 255)
    torch.testing.assert_close(resize(images, *size, interpolation=interpolation), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rule", ["stretch", "crop", "pad"])
def test_resize_to_the_same_size_changes_no_bit(images: torch.Tensor, rule: Rule, interpolation: Interpolation) -> None:
    assert torch.equal(resize(images, 9, 13, rule, interpolation=interpolation), images)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 24), (75, 120)])
def test_resized_pixels_are_those_of_pillow(size: tuple[int, int], interpolation: Interpolation) -> None:
    """A crop from 40 x 90 pixels of medium grey: Pillow limits the values between both directions, too."""
    pixels = np.random.default_rng(0).integers(80, 176, (40, 90, 3), dtype=np.uint8)
    side = 40 / size[0] * size[1]
    box = (45 - side / 2, 0, 45 + side / 2, 40)
    pillow = Image.fromarray(pixels).resize(size[::-1], Image.Resampling[interpolation.upper()], box)
    (ours,) = resize_pixels(torch.from_numpy(pixels)[None], *size, "crop", interpolation=interpolation)
    assert np.abs(np.asarray(pillow).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize(("height", "width", "scale"), [(26, 26, 2), (13, 13, 1), (9, 21, 1)])
def test_pad_is_a_stretch_between_bars(images: torch.Tensor, height: int, width: int, scale: int) -> None:
    """The images have 9 x 13 pixels."""
    resized = resize(images, 9 * scale, 13 * scale)
    above, beside = (height - 9 * scale) // 2, (width - 13 * scale) // 2
    expected = torch.nn.functional.pad(resized, (beside, beside, above, above), value=7)
    torch.testing.assert_close(resize(images, height, width, "pad", 7), expected)


def test_crop_takes_the_largest_centred_box(images: torch.Tensor) -> None:
    torch.testing.assert_close(resize(images, 9, 9, "crop"), images[..., 2:11])
    inside = (..., slice(None), slice(2, -2))  # the filter of a crop also reads pixels beyond its left and right border
    enlarged = resize(images[..., 2:11], 18, 18)
    torch.testing.assert_close(resize(images, 18, 18, "crop")[inside], enlarged[inside])


def exact(pixels: torch.Tensor, height: int, width: int, rule: Rule, interpolation: Interpolation) -> torch.Tensor:
    """Resize ``pixels`` ``(B, h, w, C)`` as the exported graph does, and round."""
    return resize(pixels.movedim(-1, 1).float(), height, width, rule, 99, interpolation).round().clamp(0, 255)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rule", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_pixels_differs_by_at_most_one_grey_level(
    channels: int, rule: Rule, interpolation: Interpolation
) -> None:
    for size in ((75, 100), (100, 75), (40, 300), (24, 20), (3, 2), (1, 1)):
        pixels = torch.randint(0, 256, (2, *size, channels), generator=torch.Generator().manual_seed(0)).byte()
        for height, width in ((32, 32), (45, 64), (120, 110), (1, 1)):
            resized = resize_pixels(pixels, height, width, rule, 99, interpolation)
            assert resized.dtype == torch.uint8 and resized.is_contiguous()
            assert (resized - exact(pixels, height, width, rule, interpolation)).abs().max() <= 1


@pytest.mark.parametrize("rule", ["stretch", "crop", "pad"])
def test_resize_pixels_does_not_depend_on_the_other_images_or_on_strips(
    monkeypatch: pytest.MonkeyPatch, rule: Rule
) -> None:
    pixels = torch.randint(0, 256, (5, 61, 83, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    together = resize_pixels(pixels, 24, 24, rule, 99)
    assert torch.equal(torch.cat([resize_pixels(each[None], 24, 24, rule, 99) for each in pixels]), together)
    monkeypatch.setattr(upright.warp, "STRIP_VALUES", 61 * 3 * 10)
    assert (resize_pixels(pixels, 24, 24, rule, 99).int() - together.int()).abs().max() <= 1
