"""The preprocessing of `Model`, and its mask: nothing outside the disc reaches the network."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from upright.architectures.lenet import LeNet
from upright.exporting.graph import Form, write_graph
from upright.images import ImageSpec, Resize
from upright.runtime.predictor import open_session
from upright.training.model import Model
from upright.warp import disc, pixel_centres, rotation, warp

SIDE = 28
SPEC = ImageSpec(3, SIDE, SIDE, ("a", "b", "c"), (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), mask="disc")


def images(height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8, generator=generator)


def lenet(spec: ImageSpec = SPEC) -> Model:
    torch.manual_seed(0)
    return Model(spec, LeNet(spec.input_shape, 3)).eval()


def outside(height: int, width: int, resize: Resize) -> Tensor:
    """Return which pixels of an image of another size are so far out that their interpolation misses the disc."""
    points = pixel_centres(height, width)
    if resize == "crop":
        # In the largest centred square, coordinates are relative to the shorter side.
        points = points * torch.tensor([width, height]) / min(height, width)
    return (points.norm(dim=1) > 1 + 3 / min(height, width, SIDE)).reshape(height, width)


CASES = [
    (SIDE, SIDE, "stretch"),
    (17, 17, "stretch"),
    (61, 40, "stretch"),
    (61, 61, "crop"),
    (33, 90, "crop"),
]


@pytest.mark.parametrize(("height", "width", "resize"), CASES)
def test_no_pixel_outside_the_disc_changes_the_logits(height: int, width: int, resize: Resize) -> None:
    model, before = lenet(replace(SPEC, resize=resize)), images(height, width)
    mask = outside(height, width, resize)
    after = torch.where(mask, images(height, width, seed=1), before)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(model(before), model(after))
        # The same change matters without the mask, and a change inside matters with it.
        assert not torch.equal(*(lenet(replace(SPEC, resize="stretch", mask="none"))(each) for each in (before, after)))
        assert not torch.equal(model(before), model(torch.where(mask, before, after + 1)))


@pytest.mark.parametrize("resize", ["stretch", pytest.param("crop", marks=pytest.mark.slow)])
def test_no_pixel_outside_the_disc_changes_the_graph(resize: Resize, tmp_path: Path) -> None:
    model = lenet(replace(SPEC, resize=resize))
    write_graph(model, tmp_path / "model.onnx", Form(outputs=("logits",)))
    session = open_session(tmp_path / "model.onnx")
    for height, width, _ in (case for case in CASES if case[2] == resize):
        before, mask = images(height, width), outside(height, width, resize)
        after = torch.where(mask, images(height, width, seed=1), before)
        pixels = [np.ascontiguousarray(each.permute(0, 2, 3, 1)) for each in (before, after)]
        (first,), (second,) = (session.run(["logits"], {"images": each}) for each in pixels)
        with torch.no_grad():
            expected = model(before).numpy()
        assert np.array_equal(first, second) and np.abs(first - expected).max() < 1e-5


def test_the_disc_hides_exactly_the_pixels_at_its_radius_and_beyond() -> None:
    distance = (pixel_centres(SIDE, SIDE) * SIDE / 2).norm(dim=1).reshape(SIDE, SIDE)
    mask, radius = disc(SIDE, SIDE), (SIDE - 1) / 2
    assert torch.equal(mask == 0, distance >= radius) and torch.equal(mask == 1, distance <= radius - 1)
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("side", [27, 28])
def test_quarter_rotations_and_the_mask_commute_exactly(side: int) -> None:
    model = Model(replace(SPEC, height=side, width=side), nn.Identity())
    for turns in (1, 2, 3):
        rotate = partial(torch.rot90, k=turns, dims=(2, 3))
        assert torch.equal(model.normalise(rotate(images(side, side))), rotate(model.normalise(images(side, side))))


@pytest.mark.parametrize(("height", "width"), [(20, 46), (46, 20), (21, 29)])
def test_the_mask_of_an_oblong_input_is_a_circle(height: int, width: int) -> None:
    mask, side = disc(height, width), min(height, width)
    row, column = (height - side) // 2, (width - side) // 2
    square = mask[row : row + side, column : column + side]
    assert torch.equal(square, disc(side, side)) and torch.equal(square, square.T)
    assert mask.count_nonzero() == square.count_nonzero()
    assert square.sum() == pytest.approx(torch.pi * (side / 2 - 1) ** 2, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (28, 41)])
@pytest.mark.parametrize("angle", [7.0, 45.0, 133.0])
def test_a_rotation_never_brings_padding_into_the_disc(angle: float, height: int, width: int) -> None:
    spec = replace(SPEC, height=height, width=width)
    matrix = rotation(torch.tensor([angle]).deg2rad(), width / height).expand(4, -1, -1)
    black, border = (warp(images(height, width).float(), matrix, padding) for padding in ("zeros", "border"))
    masked, complete = (Model(replace(spec, mask=mask), nn.Identity()) for mask in ("disc", "none"))
    torch.testing.assert_close(masked.normalise(black), masked.normalise(border), atol=1e-4, rtol=0)
    assert (complete.normalise(black) - complete.normalise(border)).abs().max() > 1


def test_denormalise_shows_the_mean_colour_outside() -> None:
    model = Model(SPEC, nn.Identity())
    pixels = model.denormalise(model.normalise(images()))
    mean = 255 * torch.tensor(SPEC.mean)
    assert torch.equal(pixels[:, :, 0, 0], mean.expand(4, -1))
    inside = disc(SIDE, SIDE) == 1
    torch.testing.assert_close(pixels[..., inside], images()[..., inside].float())


def test_without_a_mask_the_network_sees_the_bits_of_before() -> None:
    model = lenet(replace(SPEC, mask="none"))
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    assert torch.equal(model.normalise(images()), (images() - mean) / std)
    assert [name for name, _ in model.named_buffers() if "." not in name] == ["mean", "std"]


def test_a_mask_is_no_weight() -> None:
    assert lenet().state_dict().keys() == lenet(replace(SPEC, mask="none")).state_dict().keys()
