from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch

from upright.data.augmentation import RandomAffine
from upright.data.distorted_mnist import Clutter, DistortedMNIST, MNISTDistortion, Task
from upright.errors import UprightError
from upright.recipes import build
from upright.warp import pixel_centres, project_points, rotation_angle, sample

TASKS = get_args(Task)
SIDES = {"R": 28, "RTS": 42, "P": 28, "E": 28, "TC": 60}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def framed(digits: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.pad(digits, [(side - 28) // 2] * 4)


def test_images_have_the_tasks_size_and_whole_grey_levels(task: str) -> None:
    data = DistortedMNIST(task=task, draws=2)
    side = SIDES[task]
    assert data.spec.input_shape == (1, side, side)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape[2:] == (28, 28)
    trained_on = data.augmentation(batch.images).images
    assert trained_on.shape[1:] == (1, side, side)
    torch.testing.assert_close(trained_on, trained_on.round(), atol=1e-3, rtol=0)
    for split in ("val", "test"):
        samples = data.samples(split)
        assert len(samples) == 2 * len(data.splits[split])
        assert samples[:].images.shape[1:] == (1, side, side) and samples[:].images.dtype == torch.uint8


def test_training_is_random_and_evaluation_is_fixed_by_the_seed(task: str) -> None:
    data = DistortedMNIST(task=task, draws=2)
    digits = next(iter(data.train_dataloader())).images
    assert not torch.equal(data.augmentation(digits).images, data.augmentation(digits).images)
    images = data.samples("test")[:].images
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = build(data.recipe)().samples("test")[:].images
    assert torch.equal(again, images) and torch.equal(torch.get_rng_state(), state)
    other = DistortedMNIST(task=task, draws=2, task_seed=1).samples("test")[:].images
    assert not torch.equal(other, images)
    # Draws differ, and additional draws do not change the first.
    assert not torch.equal(images[::2], images[1::2])
    assert torch.equal(DistortedMNIST(task=task).samples("test")[:].images, images[::2])


def test_originals_equal_the_networks_input(task: str) -> None:
    data = DistortedMNIST(task=task, draws=2)
    samples = data.samples("test")[:]
    for number, original in enumerate(data.originals("test")):
        assert original.name.endswith(f"_{number % 2 + 1}")
        assert (torch.from_numpy(original.pixels).permute(2, 0, 1) == samples.images[number]).all()


@pytest.mark.parametrize("task", ["R", "RTS", "P"])
def test_the_transforms_reproduce_the_images(task: str) -> None:
    data = DistortedMNIST(task=task)
    samples, side = data.samples("test")[:], SIDES[task]
    digits = torch.from_numpy(data.source.images[data.splits["test"]]).permute(0, 3, 1, 2).float()
    points = project_points(samples.transforms, pixel_centres(side, side))
    expected = sample(framed(digits, side), points, side, side)
    torch.testing.assert_close(expected, samples.images.float(), atol=0.51, rtol=0)


def test_the_transform_of_a_spline_is_the_identity() -> None:
    samples = DistortedMNIST(task="E").samples("test")
    assert torch.equal(samples.transforms, torch.eye(3).expand(len(samples), 1, 3, 3))


def test_training_returns_its_transforms(task: str) -> None:
    data = DistortedMNIST(task=task, augment=[partial(RandomAffine, rotate=20)])
    data.augmentation.parts[0].patches = 0
    digits, side = data.samples("train")[:50].images, SIDES[task]
    images, transforms, _ = data.augmentation(digits)
    # Sampling twice smooths a little more than sampling once.
    expected = sample(framed(digits.float(), side), transforms(pixel_centres(side, side)), side, side)
    assert (images - expected).abs().mean() < 5


@pytest.mark.parametrize(("task", "degrees"), [("R", 90), ("RTS", 45)])
def test_angles_are_uniform_in_their_range(task: Task, degrees: float) -> None:
    points = torch.rand(10, 2)
    degrees_drawn = rotation_angle(MNISTDistortion(task).draw(4000)(points), points).rad2deg()
    assert degrees_drawn.abs().max() <= degrees + 0.01 and abs(degrees_drawn.std() - 2 * degrees / 12**0.5) < 1


def test_rts_scales_uniformly_in_its_range() -> None:
    pair = torch.tensor([[0.0, 0.0], [0.1, 0.0]])
    points = MNISTDistortion("RTS").draw(4000)(pair)
    sizes = 0.1 / (points[:, 1] - points[:, 0]).norm(dim=1)
    assert 0.7 <= sizes.min() < 0.71 and 1.19 < sizes.max() <= 1.2001


def test_clutter_comes_from_other_digits_and_covers_nothing() -> None:
    distortion = MNISTDistortion("TC")
    torch.manual_seed(0)
    clutter = distortion.draw_clutter(8)
    assert clutter.digit.shape == (8, 6) and not (clutter.digit == torch.arange(8)[:, None]).any()
    digits = torch.zeros(8, 1, 28, 28)
    digits[:, :, 10:18, 10:18] = torch.arange(100.0, 108)[:, None, None, None]
    transforms = distortion.draw(8)
    cluttered = distortion.distort(digits, transforms, digits, clutter)
    bare = distortion.distort(digits, transforms, digits, Clutter(*(part[:, :0] for part in clutter)))
    assert (cluttered >= bare).all() and (cluttered != bare).any()
    for number, image in enumerate(bare):
        assert (image == 100 + number).sum() == 64 and (image == 0).sum() == 3600 - 64
        assert set(cluttered[number].unique().int().tolist()) <= {0, *range(100, 108)}
    cut = distortion.distort(0 * digits, transforms, digits, clutter)
    assert not any((cut[n] == 100 + n).any() for n in range(8))


def test_clutter_of_the_test_split_is_cut_from_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DistortedMNIST(task="TC")
    images = np.zeros_like(data.source.images)
    images[:, 4:24, 4:24] = 50
    images[data.splits["test"], 4:24, 4:24] = 200
    object.__setattr__(data.source, "images", images)
    assert set(np.unique(data.samples("test")[:].images)) == {0, 200}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "X"}, "task must be one of R, RTS, P, E, TC; got 'X'"),
        ({"task": "R", "draws": 0}, "draws must be at least 1, got 0"),
        ({"task": "R", "angles": (0, 30)}, r"angles must be \[0\], got \(0, 30\)"),
    ],
)
def test_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        DistortedMNIST(**options)


def displacements(task: Task, points: torch.Tensor) -> torch.Tensor:
    """Return the displacements of 4,000 distortions at ``points`` of the new image, in pixels: ``(4000, N, 2)``."""
    torch.manual_seed(0)
    distortion = MNISTDistortion(task)
    return (distortion.draw(4000)(points) - points) * distortion.size / 2


def test_the_docstring_states_the_amounts() -> None:
    middle = torch.zeros(1, 2)
    # Apart from scale and rotation, the centre is shifted uniformly by up to 7 pixels.
    placed = MNISTDistortion("RTS").parts[1].draw(4000, 42, 42)[:, :2, 2] * 21
    assert 6.9 < placed.abs().max() <= 7.0001 and abs(placed.std() - 14 / 12**0.5) < 0.1
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    assert abs(displacements("E", corners).std() - 1.5) < 0.05
    shifts = displacements("TC", middle)
    assert shifts.min() == -16 and shifts.max() == 16 and torch.equal(shifts, shifts.round())
    scales = MNISTDistortion("P").parts[0].draw(4000, 28, 28)[:, 0, 0]
    assert abs(1 / scales.max() - 0.75) < 0.01 and abs(1 / scales.min() - 1) < 0.01


def test_corners_move_normally_and_a_third_of_the_area_remains() -> None:
    torch.manual_seed(0)
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    matrices = MNISTDistortion("P").parts[1].draw(4000, 28, 28).inverse()
    moved = torch.cat([corners, torch.ones(4, 1)], dim=1) @ matrices.mT
    moved = moved[..., :2] / moved[..., 2:]
    # Rejected draws make the deviation a little smaller than the paper's 5 pixels.
    assert 4 < ((moved - corners) * 14).std() < 5
    x, y = moved.unbind(-1)
    areas = (x * y.roll(-1, 1) - x.roll(-1, 1) * y).sum(dim=1) / 2
    assert areas.min() >= 4 / 3 - 1e-2 and areas.mean() > 3
    sides = moved.roll(-1, 1) - moved
    turns = sides[..., 0] * sides.roll(-1, 1)[..., 1] - sides[..., 1] * sides.roll(-1, 1)[..., 0]
    assert (turns > 0).all()


def test_patches_come_from_the_inner_square_and_lie_anywhere() -> None:
    torch.manual_seed(0)
    _, source, target = MNISTDistortion("TC").draw_clutter(4000)
    assert (source.min(), source.max(), target.min(), target.max()) == (4, 18, 0, 54)


def test_a_view_does_not_depend_on_its_batch(task: str) -> None:
    data = DistortedMNIST(task=task)
    views = data.views("test")
    digits = torch.from_numpy(data.source.images[data.splits["test"]]).permute(0, 3, 1, 2).float()
    indices = torch.from_numpy(data.splits["test"])
    expected = views.show(digits, indices)
    for size in (1, 7, 33):
        parts = zip(digits.split(size), indices.split(size), strict=True)
        assert torch.equal(torch.cat([views.show(*part) for part in parts]), expected)
