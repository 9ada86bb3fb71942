"""`PolarNetwork`: its scores shift with a rotation of the image."""

import math

import pytest
import torch

from upright.architectures.polar import Harmonics, PolarNetwork
from upright.warp import rotation, warp


@pytest.mark.parametrize("turns", [4, 8, 64])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 65, 65)])
def test_scores_shift_exactly_with_quarter_turns(turns: int, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = PolarNetwork(shape, turns).eval()
    images = torch.rand(2, *shape)
    scores = network(images)
    assert scores.shape == (2, turns) and scores.std() > 0
    turned = network(torch.rot90(images, 1, (2, 3)))
    torch.testing.assert_close(turned, scores.roll(turns // 4, 1), atol=1e-6, rtol=1e-4)


def test_scores_shift_with_any_step_of_the_grid() -> None:
    torch.manual_seed(0)
    network = PolarNetwork((1, 64, 64), 16, angles=64, blocks=1).eval()
    images = torch.nn.functional.avg_pool2d(torch.rand(2, 1, 72, 72), 9, 1)
    scores = network(images)
    for step in (1, 3, 7):
        turned = network(warp(images, rotation(torch.full((2,), 2 * math.pi * step / 16))))
        # Resampling blurs the image, so the scores agree only roughly.
        error = (turned - scores.roll(step, 1)).norm() / (scores - scores.mean()).norm()
        assert error < 0.2, (step, error)


def test_harmonics_of_all_orders_are_a_circular_convolution() -> None:
    torch.manual_seed(0)
    layer = Harmonics(2, 8, orders=8)
    assert layer.gain.shape == (5, 2)  # eight angles have no more frequencies
    features = torch.randn(1, 2, 1, 8)
    torch.testing.assert_close(layer(features.roll(3, -1)), layer(features).roll(3, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8), "strides": (1,)}, "strides needs one number for each width"),
        ({"radii": 3}, "A grid of 3 radii is too small for the strides"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolarNetwork((3, 32, 32), 64, **options)  # type: ignore[arg-type]
