from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.conftest import ROOT
from upright.architectures.spatial_transformer import Observation, SpatialTransformer
from upright.data.augmentation import RandomAffine
from upright.data.configs import read_data
from upright.evidence.reporting.invariance import (
    Sample,
    Turning,
    distortions,
    follow,
    sights,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.subjects import Answer, Origin, Subject
from upright.images import ImageSpec
from upright.training.model import Model
from upright.warp import Padding, identity, warp

SIDE = 28
WAYS = {way.name: way for way in distortions(SIDE, SIDE, "zeros")}


def subject(answer: Callable[[Tensor], Answer], model: Model | None = None) -> Subject:
    spec = ImageSpec(1, SIDE, SIDE, ("a", "b"), (0.5,), (0.5,))
    origin = Origin("a", "a", spec, None, None, None, {}, None)
    return Subject(origin, "PyTorch", Path("a"), None, True, model, "", answer, "a")


def discs(count: int) -> Sample:
    """Bright discs of four sizes: all that a turn leaves as it is."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    labels = torch.arange(count) % 4
    images = torch.sigmoid(2 * (4 + 2 * labels[:, None, None] - (x**2 + y**2).sqrt())) * 200
    return Sample(images[:, None].round().to(torch.uint8), labels.numpy(), identity(count).clone())


def by_brightness(images: Tensor) -> Answer:
    """Knows the size of a disc, and nothing else."""
    sums = images.float().sum(dim=(1, 2, 3))
    known = discs(4).images.float().sum(dim=(1, 2, 3))
    return Answer(one_hot((sums[:, None] - known).abs().argmin(dim=1), 4).double().numpy(), [])


def test_what_does_not_see_rotation_has_a_flat_curve() -> None:
    ways = list(WAYS.values())
    (course,) = follow([subject(by_brightness)], discs(40), ways, [(-180.0, 180.0)])
    for name in ("rotation", "blur"):
        curve = course.curves[name]
        assert [share.value for share in curve.accuracy] == [1] * len(curve.strengths), name
        assert {share.low for share in curve.consistency} == {curve.consistency[0].low}
    scale = course.curves["scale"]
    # A disc of half the size is another one.
    assert scale.accuracy[0].value < 0.5 and scale.accuracy[scale.strengths.index(1)].value == 1
    assert course.turning is None


def test_consistency_asks_for_the_same_answer_and_not_for_the_right_one() -> None:
    def stubborn(images: Tensor) -> Answer:
        return Answer(np.tile([0.1, 0.2, 0.3, 0.4], (len(images), 1)), [])

    (course,) = follow([subject(stubborn)], discs(40), [WAYS["noise"]], [(-180.0, 180.0)])
    assert {share.value for share in course.curves["noise"].consistency} == {1}
    assert {share.value for share in course.curves["noise"].accuracy} == {0.25}


def test_a_shift_by_whole_pixels_is_a_roll() -> None:
    images = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.uint8)
    images[..., 10:18, 10:18] = torch.randint(1, 256, (8, 8), generator=torch.Generator().manual_seed(0)).byte()
    for pixels in WAYS["shift"].strengths:
        assert pixels == round(pixels)
        shifted = WAYS["shift"](images, pixels)
        for each, (rows, columns) in zip(shifted, ((0, 1), (-1, 0), (0, -1), (1, 0)), strict=True):
            rolled = images[0].roll((int(rows * pixels), int(columns * pixels)), dims=(1, 2))
            assert torch.equal(each, rolled), (pixels, rows, columns)


def test_quarter_turns_and_strength_none_are_exact() -> None:
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    for turns in (1, 2, -1):
        assert torch.equal(WAYS["rotation"](images, 90 * turns), images.rot90(turns, dims=(2, 3)))
    for way in WAYS.values():
        assert way.none in way.strengths and list(way.strengths) == sorted(set(way.strengths))
        assert torch.equal(way(images, way.none), images)
        assert all(way(images, strength).shape == images.shape for strength in way.strengths)


@pytest.mark.parametrize("padding, darkest", [("zeros", 0), ("border", 255), ("reflection", 255)])
@pytest.mark.parametrize(
    "name, strength", [("rotation", 45), ("scale", 0.5), ("shift", 6), ("shear", 50), ("blur", 1.8)]
)
def test_all_of_them_see_the_same_beyond_the_border(name: str, strength: float, padding: Padding, darkest: int) -> None:
    ways = {way.name: way for way in distortions(20, SIDE, padding)}
    white = torch.full((4, 1, 20, SIDE), 255, dtype=torch.uint8)
    found = int(ways[name](white, strength).min())
    # What is blurred is partly white still.
    assert found == darkest or (name == "blur" and darkest == 0 and found < 100)


def test_shear_and_scale_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (1, 1, 20, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    ways = {way.name: way for way in distortions(20, SIDE, "zeros")}
    # The greatest that is drawn.
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))
    for name, strength, part in (
        ("scale", 1.5, RandomAffine(scale=(1.0, 1.5))),
        ("shear", 50, RandomAffine(shear=50)),
        ("rotation", 30, RandomAffine(rotate=30)),
    ):
        trained = warp(images.float(), part.draw(1, 20, SIDE)).round().to(torch.uint8)
        assert torch.equal(ways[name](images, strength), trained), name


def test_noise_is_of_its_size_and_the_same_for_every_model() -> None:
    grey = torch.full((50, 1, SIDE, SIDE), 128, dtype=torch.uint8)
    noisy = WAYS["noise"](grey, 0.1)
    assert noisy.float().std().item() / 255 == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, WAYS["noise"](grey, 0.1))


def blobs(count: int) -> Sample:
    """A spot off the centre, from -60 to 60 degrees anticlockwise of the right: where it is says how it was turned."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    angles = torch.linspace(-60, 60, count).deg2rad()[:, None, None]
    away = (x - 7 * angles.cos()).square() + (y + 7 * angles.sin()).square()
    images = 250 * (-away / 8).exp()
    return Sample(images[:, None].round().to(torch.uint8), np.zeros(count, np.int64), identity(count).clone())


def spot_angles(images: Tensor) -> Tensor:
    line = torch.arange(SIDE) - 13.5
    x, y = images.double().sum(dim=(1, 2)) @ line.double(), images.double().sum(dim=(1, 3)) @ line.double()
    return torch.atan2(-y, x).float()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_transformer_that_turns_back_a_share_of_the_angle_leaves_the_rest(share: float) -> None:
    transformer = SpatialTransformer((1, SIDE, SIDE), transform="rotation")
    model = Model(ImageSpec(1, SIDE, SIDE, ("a", "b"), (0.5,), (0.5,)), torch.nn.Flatten())

    def answer(images: Tensor) -> Answer:
        theta = -share * spot_angles(images)[:, None]
        return Answer(np.ones((len(images), 2)), [Observation(transformer, theta, images, None)])

    asked, sample = subject(answer, model), blobs(9)
    (course,) = follow([asked], sample, [WAYS["rotation"]], [(-90.0, 90.0)])
    turning = course.turning
    assert turning is not None and turning.uprightness == pytest.approx(1 - share, abs=5e-3)
    within = np.abs(turning.angles) <= 90
    expected = (1 - share) * np.array(turning.angles)
    for quartile in turning.quartiles:
        np.testing.assert_allclose(quartile[within], expected[within], atol=1)
    # What it sees is the input, turned back by as much: upright, or what came in.
    (seen,) = sights(asked, WAYS["rotation"](sample.images[:1], 90))
    left = float(spot_angles(torch.from_numpy(seen)[None].permute(0, 3, 1, 2)).rad2deg())
    assert left == pytest.approx((1 - share) * (-60 + 90), abs=1.5)


def test_what_is_left_is_continued_over_half_a_turn() -> None:
    """Quartiles around 180 degrees lie beside each other, not a full turn apart."""
    angles = (-90.0, -45.0, 0.0, 45.0, 90.0)
    left = np.array([[-179, 179, 178.0], [-90, -91, -92], [0, 0, 0], [90, 91, 92], [179, -179, -178]])
    quartiles = Turning(angles, left, 0.5, (-90, 90)).quartiles
    np.testing.assert_allclose(quartiles[1], [-181, -91, 0, 91, 181], atol=0.1)
    np.testing.assert_allclose(quartiles[2] - quartiles[0], [1.5, 1, 0, 1, 1.5], atol=0.1)


def test_ranges_of_training_add_up_and_unknown_parts_say_nothing() -> None:
    affine = {"class_path": "upright.data.augmentation.RandomAffine"}
    recipe = {
        "init_args": {
            "augment": [
                affine | {"init_args": {"rotate": 20, "scale": [0.8, 1.1], "shift": 0.1}},
                affine | {"init_args": {"rotate": 10, "scale": [1.0, 1.2], "shear": 5}},
                {"class_path": "upright.data.augmentation.RandomCrop", "init_args": {"padding": 2}},
                {"class_path": "kornia.augmentation.ColorJitter"},
            ]
        }
    }
    found = trained_ranges(recipe, 20, 40)
    assert found == {
        "rotation": (-30, 30),
        "scale": (0.8, pytest.approx(1.32)),
        "shift": (0, 4),
        "shear": (-5, 5),
    }
    task = recipe | {"class_path": "upright.data.distorted_mnist.DistortedMNIST"}
    task["init_args"] = {**recipe["init_args"], "task": "RTS"}
    turned = trained_ranges(task, 42, 42)
    assert turned["rotation"] == (-75, 75) and turned["shift"] == (0, pytest.approx(7 + 4.2 + 2))
    assert trained_ranges(None, 28, 28) == trained_ranges({"init_args": {}}, 28, 28) == {}


def test_the_sample_is_undistorted_seeded_and_of_different_images() -> None:
    data = read_data(ROOT / "configs/data/digits.yaml")
    sample = take_sample(data, "test", 50)
    assert not sample.distorted and len(sample.labels) == 50
    again = take_sample(data, "test", 50)
    assert torch.equal(sample.images, again.images)
    assert len(torch.unique(sample.images.flatten(1), dim=0)) == 50
    every = take_sample(data, "test", 10_000)
    assert len(every.labels) == len(data.splits["test"])
    assert np.array_equal(every.labels, np.asarray(data.source.labels)[data.splits["test"]])
