import math

import pytest
import torch
from torch import nn

from upright.data.augmentation import Augmentation, Geometric, RandomAffine
from upright.errors import UprightError
from upright.warp import rotation, rotation_angle, transform_points, warp


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (200, 1, 12, 18), dtype=torch.uint8)


def test_nothing_to_do_changes_nothing(images: torch.Tensor) -> None:
    images_out, transforms = Augmentation()(images)
    assert images_out.dtype == torch.float32 and torch.equal(images_out, images.float())
    assert torch.equal(transforms, torch.eye(3).expand(200, 3, 3))


def test_the_transforms_handed_on_are_those_done(images: torch.Tensor) -> None:
    view = Augmentation([RandomAffine(rotate=60, scale=(0.8, 1.2), shear=10, shift=0.1, flip=0.5)])(images)
    torch.testing.assert_close(view.images, warp(images.float(), view.transforms))


def test_rotation_is_uniform_in_its_range() -> None:
    matrices = RandomAffine(rotate=60).matrices(4000, aspect=1.5)
    points = torch.rand(10, 2)
    degrees = rotation_angle(transform_points(matrices, points), points, 1.5).rad2deg()
    assert degrees.abs().max() <= 60.01
    assert abs(degrees.mean()) < 2 and abs(degrees.std() - 120 / 12**0.5) < 1


def test_scale_shift_flip_and_shear_do_what_they_say() -> None:
    scaled = RandomAffine(scale=(2, 2)).matrices(3, 1.0)
    # Output to input: what is twice as large samples half as far out.
    torch.testing.assert_close(scaled, torch.diag(torch.tensor([0.5, 0.5, 1])).expand(3, 3, 3))
    shifts = RandomAffine(shift=0.25).matrices(2000, 1.0)[:, :2, 2]
    assert 0.48 < shifts.abs().max() <= 0.5
    flips = RandomAffine(flip=0.3).matrices(2000, 1.0)[:, 0, 0]
    assert abs((flips < 0).float().mean() - 0.3) < 0.05 and (flips.abs() == 1).all()
    slants = RandomAffine(shear=45).matrices(2000, 1.0)[:, 0, 1]
    assert 0.98 < slants.abs().max() <= 1.0001


def test_neighbours_are_composed_and_sampled_once(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("upright.data.augmentation.warp", lambda *a: calls.append(a) or warp(*a))
    parts = [RandomAffine(rotate=30), RandomAffine(shift=0.2), nn.Identity(), RandomAffine(flip=1.0)]
    view = Augmentation(parts)(images)
    assert len(calls) == 2
    torch.testing.assert_close(view.transforms, calls[0][1] @ calls[1][1])


class Always(Geometric):
    """The same transform for every image."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def matrices(self, batch: int, aspect: float) -> torch.Tensor:
        return self.matrix.expand(batch, 3, 3)


def test_parts_are_done_in_their_order() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 5, 4] = 255
    quarter = Always(rotation(torch.tensor(math.pi / 2)))
    left = Always(torch.tensor([[1.0, 0, 0.5], [0, 1, 0], [0, 0, 1]]))  # two of eight pixels
    turned_then_moved = Augmentation([quarter, left])(image)
    moved_then_turned = Augmentation([left, quarter])(image)
    one = torch.rot90(image, 1, (2, 3)).roll(-2, 3)
    other = torch.rot90(image.roll(-2, 3), 1, (2, 3))
    assert one.argmax() != other.argmax()
    assert turned_then_moved.images.argmax() == one.argmax()
    assert moved_then_turned.images.argmax() == other.argmax()


def test_any_module_on_a_batch_plugs_in(images: torch.Tensor) -> None:
    class Invert(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return 255 - batch

    assert torch.equal(Augmentation([Invert()])(images).images, 255 - images.float())
    assert not Augmentation([Invert()]).moves and Augmentation([Invert(), RandomAffine()]).moves


def test_one_option_does_not_change_the_numbers_of_another() -> None:
    def turned(**options: float) -> torch.Tensor:
        torch.manual_seed(3)
        return RandomAffine(rotate=45, **options).matrices(5, 1.0)[:, :2, :2]

    assert torch.equal(turned(), turned(shift=0.2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": (0, 1)}, "0 < least <= greatest, got .0, 1."),
        ({"flip": 2}, "probability from 0 to 1, got 2"),
        ({"shear": 90}, "below 90 degrees, got 90"),
    ],
)
def test_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        RandomAffine(**options)


def test_half_precision_elsewhere_changes_nothing_here() -> None:
    augmentation = Augmentation(
        [RandomAffine(rotate=30, scale=(0.8, 1.2), shear=10, shift=0.1), RandomAffine(rotate=5)]
    )
    images = 255 * torch.rand(4, 1, 28, 28)
    torch.manual_seed(0)
    expected = augmentation(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = augmentation(images)
    assert torch.equal(found.images, expected.images) and torch.equal(found.transforms, expected.transforms)
