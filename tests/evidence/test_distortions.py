from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from upright.architectures.perceptron import Perceptron
from upright.data.digits import Digits
from upright.evidence.bench import Bench, Experiment
from upright.evidence.distortions import curves, rotate, shift, zoom
from upright.evidence.studies import pooling, sampling
from upright.warp import warp


def dot(row: int, column: int) -> Tensor:
    """Return an image of 8 x 8 with one bright pixel."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., row, column] = 1
    return image


@pytest.mark.parametrize(
    ("matrix", "row", "column"),
    [(shift(2, -1, 8, 8), 2, 8 - 1), (rotate(90), 2, 3), (rotate(-90), 5, 4), (zoom(1), 3, 5)],
)
def test_the_content_moves_right_and_down_and_anticlockwise(matrix: Tensor, row: int, column: int) -> None:
    assert torch.allclose(warp(dot(3, 5), matrix[None]), dot(row, column), atol=1e-5)


def test_zoom_by_two_covers_four_times_the_area() -> None:
    square = dot(3, 3) + dot(3, 4) + dot(4, 3) + dot(4, 4)
    assert warp(square, zoom(2)[None]).sum() == pytest.approx(16)


def test_a_curve_begins_with_the_test_accuracy(tmp_path: Path) -> None:
    runs = Bench(tmp_path, 2, "quick").train({"p": Experiment(Perceptron, partial(Digits, batch_size=16), epochs=2)})[
        "p"
    ]
    kinds = {"pixels": {0: [zoom(1)], 9: [shift(9, 0, 28, 28), shift(-9, 0, 28, 28)]}}
    for run in runs:
        accuracy, consistency = curves(run, kinds)["pixels"].values()
        assert accuracy[0] == pytest.approx(run.metrics["test/accuracy"]) and consistency[0] == 1
        assert accuracy[1] < accuracy[0] and consistency[1] < 0.9
    assert curves(runs[0], kinds, every=3)["pixels"]["consistency"][0] == 1


def test_without_pooling_maps_and_parameters_are_the_same() -> None:
    images, networks = torch.rand(2, 1, 28, 28), [make((1, 28, 28), 10) for make in pooling.POOLINGS.values()]
    assert {sum(p.numel() for p in each.parameters()) for each in networks} == {61_706}
    assert {each.features(images).shape for each in networks} == {(2, 16, 5, 5)}


def test_only_bilinear_sampling_has_a_gradient_for_the_localiser() -> None:
    data = partial(Digits, angles=(-30, 30))
    norms = [sampling.gradient(Experiment(network, data, 1), 0) for network in sampling.NETWORKS.values()]
    assert norms[0] == 0 < norms[1]
