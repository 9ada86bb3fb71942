import math
from collections.abc import Callable
from functools import partial

import kornia.augmentation as kornia
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from upright.data.augmentation import (
    CHUNK_IMAGES,
    Augmentation,
    Geometric,
    RandomAffine,
    RandomCrop,
    RandomElastic,
    RandomPerspective,
    RandomResizedCrop,
    probe,
    quadrilateral,
)
from upright.errors import UprightError
from upright.recipes import build, recipe
from upright.warp import pixel_centres, rotation, rotation_angle, sample, transform_points

HEIGHT, WIDTH = 12, 18
GEOMETRIC = {
    "affine": partial(RandomAffine, rotate=60, scale=(0.8, 1.2), shear=10, shift=0.1, flip=0.5),
    "crop": partial(RandomCrop, padding=3),
    "resized crop": RandomResizedCrop,
    "perspective": partial(RandomPerspective, distortion=0.2),
    "elastic": partial(RandomElastic, sigma=0.05),
}
NO_EFFECT = {
    "affine": RandomAffine,
    "crop": partial(RandomCrop, padding=0),
    "resized crop": partial(RandomResizedCrop, scale=(1, 1), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT)),
    "perspective": partial(RandomPerspective, distortion=0),
    "elastic": partial(RandomElastic, sigma=0),
}
KORNIA = {
    "rotation": partial(kornia.RandomRotation, 60.0, p=0.7),
    "affine": partial(kornia.RandomAffine, 30.0, (0.1, 0.1), (0.8, 1.2), 10.0, p=1.0),
    "flip": partial(kornia.RandomHorizontalFlip),
    "perspective": partial(kornia.RandomPerspective, 0.5, p=1.0),
    "crop": partial(kornia.RandomCrop, (HEIGHT, WIDTH), padding=3),
    "resized crop": partial(kornia.RandomResizedCrop, (HEIGHT, WIDTH)),
    "another size": partial(kornia.CenterCrop, (8, 10)),
    "several": lambda: kornia.AugmentationSequential(kornia.RandomRotation(60.0), kornia.RandomVerticalFlip(p=1.0)),
}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (200, 1, HEIGHT, WIDTH), dtype=torch.uint8)


def smooth(count: int = 16) -> torch.Tensor:
    return interpolate(255 * torch.rand(count, 3, 4, 6), (HEIGHT, WIDTH), mode="bicubic").clamp(0, 255)


def draw(part: Geometric, batch: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    matrices = part.draw(batch, height, width)
    assert isinstance(matrices, torch.Tensor) and matrices.shape == (batch, 3, 3)
    return matrices


def check_transforms(augmentation: Augmentation, images: torch.Tensor) -> None:
    """Check that sampling at the returned points reproduces the images, for shared points and for points per image."""
    view = augmentation(images)
    height, width = view.images.shape[-2:]
    points = pixel_centres(height, width)
    sources = view.transforms(points)
    torch.testing.assert_close(sample(images.float(), sources, height, width), view.images, atol=0.01, rtol=1e-4)
    torch.testing.assert_close(view.transforms(points.expand(len(images), -1, -1)), sources, atol=1e-5, rtol=1e-4)


def test_an_empty_augmentation_changes_nothing(images: torch.Tensor) -> None:
    images_out, transforms, targets = Augmentation()(images, torch.arange(200))
    assert images_out.dtype == torch.float32 and torch.equal(images_out, images.float())
    points = pixel_centres(4, 4)
    assert torch.equal(transforms(points), points.expand(200, 16, 2)) and torch.equal(targets, torch.arange(200))


@pytest.mark.parametrize("part", GEOMETRIC.values(), ids=GEOMETRIC)
def test_the_returned_transforms_reproduce_the_images(part: Callable[[], Geometric]) -> None:
    images = smooth()
    augmentation = Augmentation([part()])
    assert augmentation(images).images.shape == images.shape and augmentation.moves
    assert not torch.allclose(augmentation(images).images, images, atol=1)
    check_transforms(augmentation, images)


@pytest.mark.parametrize("part", NO_EFFECT.values(), ids=NO_EFFECT)
def test_zero_strength_is_the_identity(part: Callable[[], Geometric]) -> None:
    images = smooth()
    torch.testing.assert_close(Augmentation([part()])(images).images, images, atol=0.01, rtol=0)


@pytest.mark.parametrize("part", GEOMETRIC.values(), ids=GEOMETRIC)
def test_a_part_is_rebuilt_from_its_recipe_and_draws_from_the_seed(part: Callable[[], Geometric]) -> None:
    images, views = smooth(), []
    for each in (part, build(recipe(part)), part):
        torch.manual_seed(len(views) // 2)
        views.append(Augmentation([each()])(images).images)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_neighbouring_geometric_parts_are_sampled_once(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("upright.warp.sample", lambda *a: calls.append(a) or sample(*a))
    parts = [part() for part in GEOMETRIC.values()]
    check_transforms(Augmentation(parts), smooth())
    check_transforms(Augmentation(parts[::-1]), smooth())
    assert len(calls) == 2
    Augmentation([RandomAffine(rotate=30), RandomCrop(), nn.Identity(), RandomAffine(flip=1.0)])(images[:100])
    assert len(calls) == 4


def test_a_large_batch_is_sampled_in_chunks(images: torch.Tensor) -> None:
    check_transforms(Augmentation([RandomAffine(rotate=30), RandomElastic()]), images)


def test_transforms_before_and_after_another_module_are_composed() -> None:
    image = smooth()
    quarter = Always(rotation(torch.tensor(math.pi / 2), WIDTH / HEIGHT))
    view = Augmentation([quarter, nn.Identity(), RandomElastic(), quarter])(image)
    points = pixel_centres(4, 4)
    again = Augmentation([quarter, Always(torch.eye(3)), quarter])(image)
    # Without the elastic shift of 3 % in between, this is a rotation by 180 degrees.
    torch.testing.assert_close(again.transforms(points), -points.expand(16, -1, -1))
    assert 0 < (view.transforms(points) + points).abs().mean() < 0.15


def test_rotation_is_uniform_in_its_range() -> None:
    matrices = draw(RandomAffine(rotate=60), 4000)
    points = torch.rand(10, 2)
    degrees = rotation_angle(transform_points(matrices, points), points, 1.5).rad2deg()
    assert degrees.abs().max() <= 60.01
    assert abs(degrees.mean()) < 2 and abs(degrees.std() - 120 / 12**0.5) < 1


def test_scale_shift_flip_and_shear_have_their_documented_ranges() -> None:
    scaled = draw(RandomAffine(scale=(2, 2)), 3)
    # From output to input: an image twice as large samples half as far from the centre.
    torch.testing.assert_close(scaled, torch.diag(torch.tensor([0.5, 0.5, 1])).expand(3, 3, 3))
    shifts = draw(RandomAffine(shift=0.25), 2000)[:, :2, 2]
    assert 0.48 < shifts.abs().max() <= 0.5
    flips = draw(RandomAffine(flip=0.3), 2000)[:, 0, 0]
    assert abs((flips < 0).float().mean() - 0.3) < 0.05 and (flips.abs() == 1).all()
    slants = draw(RandomAffine(shear=45), 2000, 8, 8)[:, 0, 1]
    assert 0.98 < slants.abs().max() <= 1.0001


def test_a_crop_is_exact_to_the_pixel(images: torch.Tensor) -> None:
    view = Augmentation([RandomCrop(padding=2)])(images)
    padded = nn.functional.pad(images.float(), (2, 2, 2, 2))
    crops = {
        (down, across): padded[..., down : down + HEIGHT, across : across + WIDTH]
        for down in range(5)
        for across in range(5)
    }
    matches = torch.stack([(view.images - crop).abs().amax(dim=(1, 2, 3)) < 0.01 for crop in crops.values()])
    # Each image is one of the 25 crops, and all 25 occur.
    assert (matches.sum(dim=0) == 1).all() and matches.any(dim=1).all()


def test_a_resized_crop_has_area_and_aspect_in_its_ranges() -> None:
    matrices = draw(RandomResizedCrop(scale=(0.1, 0.4), ratio=(0.5, 2)), 4000)
    across, down = matrices[:, 0, 0], matrices[:, 1, 1]
    ratio = across * WIDTH / (down * HEIGHT)
    area = across * down
    assert 0.0999 < area.min() < 0.105 and 0.395 < area.max() < 0.4001 and abs(area.mean() - 0.25) < 0.01
    assert 0.4999 < ratio.min() < 0.51 and 1.95 < ratio.max() < 2.001
    assert abs((ratio < 1).float().mean() - 0.5) < 0.03
    # The crop is inside the image, and on average in its centre.
    assert ((matrices[:, :2, 2].abs() + torch.stack([across, down], 1)) < 1.0001).all()
    assert matrices[:, :2, 2].mean(dim=0).abs().max() < 0.03


def test_perspective_moves_the_corners_to_their_targets() -> None:
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    wanted = corners + 0.49 * (2 * torch.rand(500, 4, 2) - 1)
    composed = Augmentation([Always(quadrilateral(wanted))])(torch.zeros(500, 1, 4, 4)).transforms
    torch.testing.assert_close(composed(corners), wanted, atol=1e-4, rtol=1e-4)
    moved = Augmentation([RandomPerspective(distortion=0.2)])(torch.zeros(500, 1, 4, 4)).transforms(corners)
    assert 0.39 < (moved - corners).abs().max() <= 0.4001


def test_elastic_moves_the_points_of_its_grid_by_sigma() -> None:
    part = RandomElastic(points=3, sigma=0.04)
    shifts = part.draw(2000, HEIGHT, WIDTH)(part.controls) - part.controls
    assert shifts.shape == (2000, 9, 2) and abs(shifts.std() - 0.08) < 0.002 and abs(shifts.mean()) < 0.002


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_padding_sets_the_values_beyond_the_border(padding: str) -> None:
    half = Always(torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]]))
    row = torch.tensor([10.0, 20, 30, 40]).expand(1, 1, 2, 4)
    expected = {"zeros": [30, 40, 0, 0], "border": [30, 40, 40, 40], "reflection": [30, 40, 40, 30]}[padding]
    images = Augmentation([half], padding=padding)(row).images
    torch.testing.assert_close(images, torch.tensor(expected).float().expand(1, 1, 2, 4))


class Always(Geometric):
    """A fixed transform: one for all images, or one per image."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def draw(self, batch: int, height: int, width: int) -> torch.Tensor:
        return self.matrix.expand(batch, 3, 3)


def test_parts_are_applied_in_order() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 5, 4] = 255
    quarter = Always(rotation(torch.tensor(math.pi / 2)))
    leftwards = Always(torch.tensor([[1.0, 0, 0.5], [0, 1, 0], [0, 0, 1]]))  # two of eight pixels
    rotated_then_shifted = Augmentation([quarter, leftwards])(image)
    shifted_then_rotated = Augmentation([leftwards, quarter])(image)
    one = torch.rot90(image, 1, (2, 3)).roll(-2, 3)
    other = torch.rot90(image.roll(-2, 3), 1, (2, 3))
    assert one.argmax() != other.argmax()
    assert rotated_then_shifted.images.argmax() == one.argmax()
    assert shifted_then_rotated.images.argmax() == other.argmax()


class Invert(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert batch.min() >= 0 and 0.9 < batch.max() <= 1
        return 1 - batch


def test_any_module_on_a_batch_from_0_to_1_is_a_part(images: torch.Tensor) -> None:
    before = images.clone()
    torch.testing.assert_close(Augmentation([Invert()])(images).images, 255 - images.float())
    twice = Augmentation([Invert(), RandomAffine(flip=1), Invert()])(images)
    torch.testing.assert_close(twice.images, images.flip(3).float(), atol=0.01, rtol=0)
    assert torch.equal(images, before)
    assert not Augmentation([Invert()]).moves and Augmentation([Invert(), RandomAffine()]).moves


@pytest.mark.parametrize("part", KORNIA.values(), ids=KORNIA)
def test_transforms_of_kornia_are_returned(part: Callable[[], nn.Module]) -> None:
    augmentation = Augmentation([part()])
    assert augmentation.moves and augmentation.unreported is None
    check_transforms(augmentation, smooth())
    # Between two of our parts the batch is sampled several times: the points agree, the pixels only nearly.
    around = Augmentation([RandomAffine(rotate=30), part(), RandomElastic(sigma=0.01)])
    image = smooth()
    view = around(image)
    once = sample(image, view.transforms(pixel_centres(*view.images.shape[-2:])), *view.images.shape[-2:])
    inner = (..., slice(3, -3), slice(3, -3))
    assert (once - view.images)[inner].abs().mean() < 0.1 * (once - once.roll(1, 0))[inner].abs().mean()


@pytest.mark.parametrize(
    "part",
    [
        partial(kornia.ColorJitter, 0.3, 0.3, 0.3, 0.1, p=1.0),
        partial(kornia.RandomErasing, p=1.0),
        partial(kornia.RandomGaussianNoise, std=0.1, p=1.0),
    ],
    ids=lambda part: part.func.__name__,
)
def test_colour_transforms_of_kornia_move_no_pixel_and_follow_torchs_seed(part: Callable[[], nn.Module]) -> None:
    augmentation, views = Augmentation([part()]), []
    assert not augmentation.moves
    image = smooth()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(augmentation(image))
    points = pixel_centres(4, 4)
    assert torch.equal(views[0].transforms(points), points.expand(16, -1, -1))
    assert torch.equal(views[0].images, views[1].images) and not torch.equal(views[0].images, views[2].images)
    assert 1 < (views[0].images - image).abs().mean() < 100


def test_a_part_that_does_not_report_its_transform_is_named() -> None:
    assert Augmentation([RandomElastic(), kornia.RandomElasticTransform()]).unreported == "RandomElasticTransform"
    hidden = nn.Sequential(kornia.RandomRotation(30.0))
    assert Augmentation([hidden]).unreported == "Sequential" and Augmentation([hidden]).moves
    several = kornia.AugmentationSequential(kornia.RandomRotation(30.0), kornia.RandomThinPlateSpline())
    assert Augmentation([several]).unreported == "AugmentationSequential"
    assert Augmentation([nn.Identity(), kornia.ColorJitter()]).unreported is None


class Flip(nn.Module):
    """torchvision's RandomHorizontalFlip: one draw for all images."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.flip(3) if torch.rand(()) < 0.5 else batch


class Brightness(nn.Module):
    """A factor for all images, or for each."""

    def __init__(self, *, each: bool) -> None:
        super().__init__()
        self.each = each

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * torch.rand(len(batch) if self.each else 1)[:, None, None, None]


class Shift(nn.Module):
    """A shift for each image, by up to a quarter."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([image.roll(int(torch.randint(batch.shape[-1] // 4, ())), 2) for image in batch])


class Halve(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[..., ::2, ::2]


class Refuse(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        raise ValueError("only images of 224 x 224")


@pytest.mark.parametrize(
    ("part", "draws_once", "moves"),
    [
        (Flip(), True, True),
        (Brightness(each=False), True, False),
        (Brightness(each=True), False, False),
        (Shift(), False, True),
        (Halve(), False, True),
        (nn.AvgPool2d(3, 1, 1), False, False),
        (nn.Dropout2d(0.5), False, False),
        (nn.Sequential(Brightness(each=True), Flip()), False, True),
        (Refuse(), False, False),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_module_of_the_user_is_tried(part: nn.Module, draws_once: bool, moves: bool) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augmentation = Augmentation([part])
    assert probe(part) == (draws_once, moves) and torch.equal(torch.get_rng_state(), before)
    assert augmentation.moves == moves and augmentation.unreported == (type(part).__name__ if moves else None)


def test_a_module_that_draws_once_per_batch_is_applied_to_each_image(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    flipped = Augmentation([Flip()])(images[:1].expand(64, -1, -1, -1)).images
    same = (flipped - images[0].float()).abs().flatten(1).max(dim=1).values < 0.01
    mirrored = (flipped - images[0].float().flip(2)).abs().flatten(1).max(dim=1).values < 0.01
    assert 16 < same.sum() < 48 and (same | mirrored).all()


def test_an_option_does_not_change_the_random_numbers_of_another() -> None:
    def numbers(part: Geometric) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([draw(part, 5)[:, :2, :2].flatten(), torch.rand(3)])

    assert torch.equal(numbers(RandomAffine(rotate=45)), numbers(RandomAffine(rotate=45, shift=0.2)))
    # Nor does it change later draws.
    assert torch.equal(numbers(RandomCrop(padding=0)), numbers(RandomCrop(padding=5)))
    ours = (RandomResizedCrop(scale=(1, 1)), RandomResizedCrop(ratio=(1, 1)))
    assert torch.equal(*(numbers(part)[-3:] for part in ours))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (partial(RandomAffine, scale=(0, 1)), "0 < least <= greatest, got .0, 1."),
        (partial(RandomAffine, flip=2), "probability from 0 to 1, got 2"),
        (partial(RandomAffine, shear=90), "below 90 degrees, got 90"),
        (partial(RandomCrop, padding=-1), "at least 0 pixels, got -1"),
        (partial(RandomResizedCrop, scale=(0.5, 2)), "<= 1, a fraction of the area, got .0.5, 2."),
        (partial(RandomResizedCrop, ratio=(2, 1)), "ratio needs 0 < least <= greatest, got .2, 1."),
        (partial(RandomPerspective, distortion=0.25), "from 0 to below 0.25 of the image, got 0.25"),
        (partial(RandomElastic, points=1), "at least 2 along each side, got 1"),
        (partial(RandomElastic, sigma=-0.1), "sigma must be at least 0, got -0.1"),
        (partial(Augmentation, padding="black"), "one of zeros, border, reflection; got 'black'"),
        (
            lambda: Augmentation([kornia.RandomMixUpV2()]),
            "RandomMixUpV2 of kornia mixes .* use upright.data.mixing.MixUp or CutMix",
        ),
    ],
)
def test_refuses(part: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        part()


def test_autocast_does_not_change_augmentation() -> None:
    augmentation = Augmentation([part() for part in GEOMETRIC.values()])
    images, points = 255 * torch.rand(4, 1, 28, 28), pixel_centres(4, 4)
    torch.manual_seed(0)
    expected = augmentation(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = augmentation(images)
        assert torch.equal(view.transforms(points), expected.transforms(points))
    assert torch.equal(view.images, expected.images)


def test_a_shear_is_an_angle_in_pixels_for_every_aspect() -> None:
    height, width = 20, 50
    torch.manual_seed(0)
    matrices = RandomAffine(shear=30).draw(2000, height, width)
    # The shift along x in the input, in pixels, for one pixel along y in the output.
    slants = torch.atan(matrices[:, 0, 1] * width / height).rad2deg()
    assert 29.5 < slants.abs().max() <= 30.01 and abs(slants.std() - 60 / 12**0.5) < 0.6


def test_padding_is_the_same_in_large_batches() -> None:
    images = torch.full((CHUNK_IMAGES + 50, 1, 8, 8), 200, dtype=torch.uint8)
    for padding, expected in (("border", 200), ("reflection", 200), ("zeros", 0)):
        images_out = Augmentation([RandomAffine(shift=0.9)], padding=padding)(images).images
        assert abs(float(images_out.amin(dim=(1, 2, 3)).median()) - expected) < 1e-3
        assert expected == 0 or (images_out - 200).abs().max() < 1e-3


def test_an_elastic_grid_reaches_from_border_to_border() -> None:
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    controls = RandomElastic(points=3).controls
    assert len(controls) == 9 and all((controls == corner).all(dim=1).any() for corner in corners)


def test_a_part_that_does_not_take_the_batch_is_named(images: torch.Tensor) -> None:
    with pytest.raises(UprightError, match=r"ColorJitter in .* does not take a batch of shape \(200, 1, 12, 18\): "):
        Augmentation([kornia.ColorJitter(hue=0.1, p=1.0)])(images)
