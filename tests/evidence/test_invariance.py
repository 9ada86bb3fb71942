from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.conftest import ROOT
from upright.architectures.spatial_transformer import Observation, SpatialTransformer
from upright.architectures.voting import PolarLocaliser
from upright.data.augmentation import Augmentation, RandomAffine
from upright.data.configs import read_data
from upright.data.digits import Digits
from upright.evidence.distortions import rotate
from upright.evidence.reporting.invariance import (
    Sample,
    distortions,
    measure_invariance,
    residual_quartiles,
    take_sample,
    trained_ranges,
    transformer_views,
)
from upright.evidence.reporting.measures import evaluate
from upright.evidence.reporting.subjects import NO_TRANSFORMER, BatchOutput, Origin, Subject
from upright.images import ImageSpec
from upright.training.model import Model
from upright.warp import Padding, identity, warp

SIDE = 28
FAMILIES = distortions(SIDE, SIDE, "zeros")


def subject(predict: Callable[[Tensor], BatchOutput], model: Model | None = None) -> Subject:
    spec = ImageSpec(1, SIDE, SIDE, ("a", "b"), (0.5,), (0.5,))
    origin = Origin("a", "a", spec, None, None, None, {}, None)
    return Subject(origin, "PyTorch", Path("a"), None, True, predict, model, "" if model else NO_TRANSFORMER, "a")


def discs(count: int) -> Sample:
    """Return bright discs of four sizes, which rotation does not change."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    labels = torch.arange(count) % 4
    images = torch.sigmoid(2 * (4 + 2 * labels[:, None, None] - (x**2 + y**2).sqrt())) * 200
    return Sample(images[:, None].round().to(torch.uint8), labels.numpy(), identity(count).clone())


def by_brightness(images: Tensor) -> BatchOutput:
    """Classify a disc by the sum of its pixels."""
    sums = images.float().sum(dim=(1, 2, 3))
    expected_sums = discs(4).images.float().sum(dim=(1, 2, 3))
    return BatchOutput(one_hot((sums[:, None] - expected_sums).abs().argmin(dim=1), 4).double().numpy(), [])


def test_an_invariant_model_has_a_flat_curve() -> None:
    measures = measure_invariance(subject(by_brightness), discs(40), FAMILIES, {})
    for name in ("rotation", "blur"):
        curve = measures["invariance"][name]
        assert [share.value for share in curve["accuracy"]] == [1] * len(curve["strengths"]), name
        assert {share.low for share in curve["consistency"]} == {curve["consistency"][0].low}
    scale = measures["invariance"]["scale"]
    # A disc of half the size belongs to another class.
    assert scale["accuracy"][0].value < 0.5 and scale["accuracy"][scale["strengths"].index(1)].value == 1
    assert measures["uprightness"] == {"silent": "it has no spatial transformer"}


def test_consistency_counts_equal_predictions_even_if_they_are_wrong() -> None:
    def constant(images: Tensor) -> BatchOutput:
        return BatchOutput(np.tile([0.1, 0.2, 0.3, 0.4], (len(images), 1)), [])

    measures = measure_invariance(subject(constant), discs(40), {"noise": FAMILIES["noise"]}, {})
    assert {share.value for share in measures["invariance"]["noise"]["consistency"]} == {1}
    assert {share.value for share in measures["invariance"]["noise"]["accuracy"]} == {0.25}


def test_a_shift_by_complete_pixels_is_a_roll() -> None:
    images = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.uint8)
    images[..., 10:18, 10:18] = torch.randint(1, 256, (8, 8), generator=torch.Generator().manual_seed(0)).byte()
    for pixels in FAMILIES["shift"].strengths:
        assert pixels == round(pixels)
        shifted = FAMILIES["shift"](images, pixels)
        for each, (rows, columns) in zip(shifted, ((0, 1), (-1, 0), (0, -1), (1, 0)), strict=True):
            rolled = images[0].roll((int(rows * pixels), int(columns * pixels)), dims=(1, 2))
            assert torch.equal(each, rolled), (pixels, rows, columns)


def test_right_angles_and_strength_none_are_exact() -> None:
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    for quarters in (1, 2, -1):
        assert torch.equal(FAMILIES["rotation"](images, 90 * quarters), images.rot90(quarters, dims=(2, 3)))
    for family in FAMILIES.values():
        assert family.none in family.strengths and list(family.strengths) == sorted(set(family.strengths))
        assert torch.equal(family(images, family.none), images)
        assert all(family(images, strength).shape == images.shape for strength in family.strengths)


@pytest.mark.parametrize("padding, darkest", [("zeros", 0), ("border", 255), ("reflection", 255)])
@pytest.mark.parametrize(
    "name, strength", [("rotation", 45), ("scale", 0.5), ("shift", 6), ("shear", 50), ("blur", 1.8)]
)
def test_all_distortions_have_the_same_padding(name: str, strength: float, padding: Padding, darkest: int) -> None:
    families = distortions(20, SIDE, padding)
    white = torch.full((4, 1, 20, SIDE), 255, dtype=torch.uint8)
    minimum = int(families[name](white, strength).min())
    # A blurred border is not completely black.
    assert minimum == darkest or (name == "blur" and darkest == 0 and minimum < 100)


def test_distortions_match_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (1, 1, 20, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    families = distortions(20, SIDE, "zeros")
    # Let the augmentation draw the largest values.
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))
    for name, strength, part in (
        ("scale", 1.5, RandomAffine(scale=(1.0, 1.5))),
        ("shear", 50, RandomAffine(shear=50)),
        ("rotation", 30, RandomAffine(rotate=30)),
    ):
        trained = warp(images.float(), part.draw(1, 20, SIDE)).round().to(torch.uint8)
        assert torch.equal(families[name](images, strength), trained), name


@pytest.mark.parametrize("padding", get_args(Padding))
def test_evaluation_rotates_as_training_and_reports_do(padding: Padding) -> None:
    data = Digits(angles=(0, 40), padding=padding)
    samples = data.samples("val")
    unrotated, rotated = samples[0::2].images, samples[1::2].images
    families = distortions(SIDE, SIDE, padding)
    torch.testing.assert_close(families["rotation"].change(unrotated.float(), 40).round().byte(), rotated)
    augment = RandomAffine(rotate=40)
    augment.draw = lambda count, *size: rotate(40).expand(count, 3, 3)  # type: ignore[method-assign]
    trained = Augmentation([augment], padding=padding)(unrotated).images.float()
    torch.testing.assert_close(trained, rotated.float(), atol=0.51, rtol=0)


def test_noise_has_its_deviation_and_is_always_the_same() -> None:
    grey = torch.full((50, 1, SIDE, SIDE), 128, dtype=torch.uint8)
    noisy = FAMILIES["noise"](grey, 0.1)
    assert noisy.float().std().item() / 255 == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, FAMILIES["noise"](grey, 0.1))


def blobs(count: int) -> Sample:
    """Return images of a spot at angles from -60 to 60 degrees. The position of the spot shows the rotation."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    angles = torch.linspace(-60, 60, count).deg2rad()[:, None, None]
    distances = (x - 7 * angles.cos()).square() + (y + 7 * angles.sin()).square()
    images = 250 * (-distances / 8).exp()
    return Sample(images[:, None].round().to(torch.uint8), np.zeros(count, np.int64), identity(count).clone())


def spot_angles(images: Tensor) -> Tensor:
    line = torch.arange(SIDE) - 13.5
    x, y = images.double().sum(dim=(1, 2)) @ line.double(), images.double().sum(dim=(1, 3)) @ line.double()
    return torch.atan2(-y, x).float()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_residual_of_a_transformer_that_undoes_a_share_of_the_rotation(share: float) -> None:
    transformer = SpatialTransformer((1, SIDE, SIDE), transform="rotation")
    model = Model(ImageSpec(1, SIDE, SIDE, ("a", "b"), (0.5,), (0.5,)), torch.nn.Flatten())

    def predict(images: Tensor) -> BatchOutput:
        angles = -share * spot_angles(images)
        theta = torch.stack([angles.cos() - 1, angles.sin()], dim=1)
        return BatchOutput(np.ones((len(images), 2)), [Observation(transformer, theta, images, None)])

    model_subject, sample = subject(predict, model), blobs(9)
    rotation, ranges = {"rotation": FAMILIES["rotation"]}, {"rotation": (-90.0, 90.0)}
    response = measure_invariance(model_subject, sample, rotation, ranges)["uprightness"]
    in_range, degrees = response["in_range"], np.array(response["angles"])
    assert in_range["uprightness"] == pytest.approx(1 - share, abs=5e-3)
    within = np.abs(degrees) <= 90
    # The transformer rotates a spot to the right. The stored spots have angles from -60 to 60 degrees.
    angles = np.add.outer((1 - share) * degrees[within], -share * np.linspace(-60, 60, 9))
    assert in_range["absolute_degrees_mean"] == pytest.approx(np.abs(angles).mean(), abs=0.5)
    assert in_range["relative_degrees_mean"] == pytest.approx(np.abs((1 - share) * degrees[within]).mean(), abs=0.5)
    for quartile in response["left"].values():
        np.testing.assert_allclose(np.array(quartile)[within], (1 - share) * degrees[within], atol=1)
    # The output of the transformer is rotated by the residual angle.
    (view,) = transformer_views(model_subject, FAMILIES["rotation"](sample.images[:1], 90))
    residual = float(spot_angles(torch.from_numpy(view)[None].permute(0, 3, 1, 2)).rad2deg())
    assert residual == pytest.approx((1 - share) * (-60 + 90), abs=1.5)


def test_the_confidence_of_votes_is_a_mean_over_all_views() -> None:
    data = Digits(size=SIDE, margin=0, angles=(-90, 0, 90))
    voting = SpatialTransformer((1, SIDE, SIDE), transform="rotation", localiser=PolarLocaliser)
    model = Model(data.spec, torch.nn.Flatten())

    def predict(images: Tensor, votes: bool) -> BatchOutput:
        # A third of the images has all votes for one candidate, and the others have equal votes.
        decided = torch.arange(len(images)) % 3 == 0
        shares = torch.full((len(images), 32), 1 / 32)
        shares[decided] = torch.eye(32)[0]
        observation = Observation(voting, voting.localiser.theta(shares), images, None, shares if votes else None)
        return BatchOutput(np.full((len(images), 10), 0.1), [observation])

    subjects = [subject(partial(predict, votes=votes), model) for votes in (True, False)]
    voted, silent = (evaluate(each, data, "test") for each in subjects)
    # The loader yields complete batches of 64 and a rest.
    sizes = [len(batch.images) for batch in data.loader("test")]
    assert voted.votes_confidence == pytest.approx(sum(-(-size // 3) for size in sizes) / sum(sizes), abs=1e-3)
    assert silent.votes_confidence is None
    assert voted.uprightness is not None and voted.uprightness == silent.uprightness


def test_residual_angles_are_unwrapped_beyond_180_degrees() -> None:
    # Quartiles around 180 degrees are close to each other, not 360 degrees apart.
    angles = (-90.0, -45.0, 0.0, 45.0, 90.0)
    residual = np.array([[-179, 179, 178.0], [-90, -91, -92], [0, 0, 0], [90, 91, 92], [179, -179, -178]])
    quartiles = residual_quartiles(angles, residual)
    np.testing.assert_allclose(quartiles[1], [-181, -91, 0, 91, 181], atol=0.1)
    np.testing.assert_allclose(quartiles[2] - quartiles[0], [1.5, 1, 0, 1, 1.5], atol=0.1)


def test_ranges_of_training_are_added_and_other_parts_are_ignored() -> None:
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
    assert trained_ranges(recipe, 20, 40) == {
        "rotation": (-30, 30),
        "scale": (0.8, pytest.approx(1.32)),
        "shift": (0, 4),
        "shear": (-5, 5),
    }
    task = recipe | {"class_path": "upright.data.distorted_mnist.DistortedMNIST"}
    task["init_args"] = {**recipe["init_args"], "task": "RTS"}
    ranges = trained_ranges(task, 42, 42)
    assert ranges["rotation"] == (-75, 75) and ranges["shift"] == (0, pytest.approx(7 + 4.2 + 2))
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
