import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from upright.architectures.spatial_transformer import Observation, SpatialTransformer
from upright.training.uprightness import Uprightness, final_points, upright_loss
from upright.warp import pixel_centres, rotation, transform_points

POINTS = pixel_centres(4, 4)
ANGLES = torch.tensor([-60.0, -30, 0, 30, 60]).deg2rad()
MEASURES = {"uprightness"} | {
    f"{deviation}_degrees_{statistic}"
    for deviation in ("relative", "absolute")
    for statistic in ("median", "mean", "p95")
}


def observe(angles: torch.Tensor, kind: str = "rotation") -> list[Observation]:
    """Return the observation of a transformer that rotates by ``angles``."""
    theta = torch.stack([angles.cos() - 1, angles.sin()], dim=1)
    matrices = rotation(angles)[:, :2] - torch.eye(2, 3)
    zeros = torch.zeros(len(angles), 3)
    if kind == "similarity":
        theta = torch.cat([theta, zeros], dim=1)
    elif kind == "thin_plate":
        controls = SpatialTransformer((1, 8, 8), transform=kind).transform.controls
        theta = (controls @ matrices[:, :, :2].mT).flatten(1)
    elif kind != "rotation":
        theta = torch.cat([matrices.flatten(1), zeros[:, 1:]], dim=1)[:, : {"affine": 6, "projective": 8}[kind]]
    return [Observation(SpatialTransformer((1, 8, 8), transform=kind), theta, torch.empty(0), None)]


def measures(
    applied: torch.Tensor, angles_undone: torch.Tensor, groups: torch.Tensor, kind: str = "rotation"
) -> dict[str, float]:
    metric = Uprightness()
    metric.update(groups, rotation(applied), observe(angles_undone, kind), 1.0)
    return {name: float(value) for name, value in metric.compute().items()}


def measure(applied: torch.Tensor, angles_undone: torch.Tensor, groups: torch.Tensor, kind: str = "rotation") -> float:
    return measures(applied, angles_undone, groups, kind)["uprightness"]


@pytest.mark.parametrize("kind", ["rotation", "similarity", "affine", "projective", "thin_plate"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_measure_is_the_share_of_rotation_that_remains(share: float, kind: str) -> None:
    applied = ANGLES.repeat(3)
    # Images may differ in their final orientation: the measure compares only the views of one image.
    own = torch.tensor([0.0, 0.7, -0.4]).repeat_interleave(5)
    value = measure(applied, -share * applied + own, torch.arange(3).repeat_interleave(5), kind)
    assert value == pytest.approx(1 - share, abs=1e-3)


def test_overshooting_is_worse_than_doing_nothing() -> None:
    assert measure(ANGLES, ANGLES, torch.zeros(5, dtype=torch.long)) == pytest.approx(2, abs=1e-3)


def test_parallel_transformers_are_measured_one_by_one() -> None:
    upright, idle = observe(-ANGLES), observe(torch.zeros(5))
    metric = Uprightness()
    metric.update(torch.zeros(5, dtype=torch.long), rotation(ANGLES), upright + idle, 1.0)
    values = metric.compute()
    assert float(values["uprightness"]) == pytest.approx(0.5**0.5, abs=1e-3)
    # Five deviations of 0 degrees, and 60, 30, 0, 30 and 60.
    assert [float(values[f"relative_degrees_{name}"]) for name in ("median", "mean")] == pytest.approx(
        [0, 18], abs=0.01
    )


def test_angles_wrap_around() -> None:
    angles_undone = -ANGLES + math.pi + torch.tensor([0, 2, 0, -2, 0]) * math.pi
    assert measure(ANGLES, angles_undone, torch.zeros(5, dtype=torch.long)) == pytest.approx(0, abs=1e-3)


def test_the_views_of_an_image_may_be_in_several_batches() -> None:
    metric, groups = Uprightness(), torch.tensor([7, 7, 7, 7, 7])
    angles_undone = -0.8 * ANGLES
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(groups[part], rotation(ANGLES[part]), observe(angles_undone[part]), 1.0)
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx(measures(ANGLES, angles_undone, groups), abs=1e-6)


def test_without_views_at_different_angles_every_measure_is_nan() -> None:
    for applied, groups in (
        (torch.zeros(50), torch.arange(50)),
        (torch.rand(50), torch.arange(50)),
        (torch.full((50,), 0.5), torch.arange(50) // 2),
    ):
        values = measures(applied, torch.randn(50), groups)
        assert set(values) == MEASURES and all(map(math.isnan, values.values()))


def degrees(residual: list[list[float]]) -> dict[str, float]:
    """Return the measures in degrees of images whose views have these residual angles in degrees."""
    applied = torch.cat([torch.linspace(-90, 90, len(views)) for views in residual])
    angles = torch.tensor([angle for views in residual for angle in views])
    groups = torch.repeat_interleave(torch.arange(len(residual)), torch.tensor([*map(len, residual)]))
    values = measures(applied.deg2rad(), (angles - applied).deg2rad(), groups)
    return {name: value for name, value in values.items() if "degrees" in name}


@pytest.mark.parametrize(
    ("residual", "relative", "absolute"),
    [
        # Residual angles of each image; relative and absolute deviation of each view.
        ([[20, 20, 20], [-50, -50, -50]], [0] * 6, [20] * 3 + [50] * 3),
        ([[10, 20, 30], [-5, 0, 5]], [10, 0, 10, 5, 0, 5], [10, 20, 30, 5, 0, 5]),
        ([[179, -179]], [1, 1], [179, 179]),
        ([[-170, 150, 170]], [20, 20, 0], [170, 150, 170]),
        ([[180, 180], [0, 0]], [0] * 4, [180, 180, 0, 0]),
        ([[-30, 30], *[[0, 0]] * 19], [30] * 2 + [0] * 38, [30] * 2 + [0] * 38),
    ],
)
def test_deviations_are_in_degrees_and_wrap_around(
    residual: list[list[float]], relative: list[float], absolute: list[float]
) -> None:
    expected = {}
    for name, deviations in (("relative", relative), ("absolute", absolute)):
        expected[f"{name}_degrees_median"] = float(np.median(deviations))
        expected[f"{name}_degrees_mean"] = float(np.mean(deviations))
        expected[f"{name}_degrees_p95"] = float(np.percentile(deviations, 95))
    assert degrees(residual) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("count", [3, 8, 9, 36])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_on_a_full_circle_the_measures_do_not_depend_on_the_order_of_the_views(count: int, share: float) -> None:
    applied = torch.arange(count) * 360 / count - 160
    residual = (1 - share) * applied
    results = []
    for seed in range(3):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        undone = (residual - applied)[order].deg2rad()
        results.append(measures(applied[order].deg2rad(), undone, torch.zeros(count, dtype=torch.long)))
    assert results[0] == pytest.approx(results[1], abs=1e-3) and results[0] == pytest.approx(results[2], abs=1e-3)
    if share == 0:
        # The directions cancel. Deviations are measured from 0, and so the relative ones are the absolute ones.
        wrapped = np.abs(np.remainder(applied.numpy() + 180, 360) - 180)
        assert results[0]["uprightness"] == pytest.approx(1)
        for name in ("relative", "absolute"):
            assert results[0][f"{name}_degrees_mean"] == pytest.approx(wrapped.mean(), abs=1e-3)
            assert results[0][f"{name}_degrees_median"] == pytest.approx(np.median(wrapped), abs=1e-3)


def test_the_applied_transform_may_be_projective() -> None:
    slanted = rotation(ANGLES)
    slanted[:, 2, 0] = 0.3
    metric = Uprightness()
    metric.update(torch.zeros(5, dtype=torch.long), slanted, observe(torch.zeros(5)), 1.0)
    assert float(metric.compute()["uprightness"]) == pytest.approx(1, abs=1e-3)


def sources(applied: torch.Tensor, angles_undone: torch.Tensor, kind: str = "rotation") -> torch.Tensor:
    (source,) = final_points(partial(transform_points, rotation(applied)), observe(angles_undone, kind), POINTS)
    return source


def test_the_loss_is_zero_for_views_with_the_same_final_points() -> None:
    first, second = torch.tensor([0.5, -0.3]), torch.tensor([-0.2, 0.9])
    same = upright_loss(sources(first, 0.1 - first), sources(second, 0.1 - second), POINTS)
    other = upright_loss(sources(first, -first), sources(second, 0.3 - second), POINTS)
    assert same < 1e-6 < 0.01 < other


def test_shrinking_both_views_does_not_lower_the_loss() -> None:
    first, second = sources(torch.tensor([0.5]), torch.zeros(1)), sources(torch.tensor([-0.5]), torch.zeros(1))
    torch.testing.assert_close(upright_loss(first, second, POINTS), upright_loss(first / 9, second / 9, POINTS))


def test_the_loss_is_one_minus_the_cosine_of_the_angle_between_views() -> None:
    angles = torch.tensor([0.9])
    for between in (0.0, 0.5, math.pi / 2, 3.0):
        loss = upright_loss(sources(angles, -angles), sources(angles, between - angles), POINTS)
        assert loss.item() == pytest.approx(1 - math.cos(between), abs=1e-5)


@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_the_loss_uses_the_angles_of_an_oblong_image(aspect: float) -> None:
    first, second = (transform_points(rotation(torch.tensor([angle]), aspect), POINTS) for angle in (0.4, 1.5))
    assert upright_loss(first, second, POINTS, aspect).item() == pytest.approx(1 - math.cos(1.1), abs=1e-5)


def test_the_loss_of_an_image_is_capped_at_180_degrees() -> None:
    source = sources(torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.2]))
    # A projective transform moves points near its horizon arbitrarily far away.
    far = source * torch.tensor([1.0, 1e6])[:, None, None]
    for wild in (far, 0 * far):
        wild = wild.clone().requires_grad_()
        loss = upright_loss(wild, source + 0.1, POINTS)
        loss.backward()
        assert loss.item() <= 2 and wild.grad.isfinite().all() and wild.grad.abs().max() < 1
    alone = upright_loss(far[:1], source[:1] + 0.1, POINTS)
    assert upright_loss(far, source + 0.1, POINTS).item() == pytest.approx((alone.item() + 2) / 2)


def test_shrinking_one_view_does_not_lower_the_loss() -> None:
    angles = torch.tensor([0.0])
    for between in (0.0, 1.0, math.pi / 2, 3.0):
        first, second = sources(angles, angles), sources(angles, angles + between)
        losses = [upright_loss(scale * first, second, POINTS).item() for scale in (1.0, 0.5, 0.1, 0.01)]
        # For almost opposite views, the loss is near its cap already.
        assert losses == sorted(losses) and (losses[0] < losses[1] - 0.1 or losses[0] > 1.9)


def test_shrinking_views_of_uncertain_angle_does_not_lower_the_loss() -> None:
    angles = torch.linspace(-math.pi, math.pi, 65)[:-1]
    first, second = sources(0 * angles, 0 * angles), sources(0 * angles, angles)
    losses = [upright_loss(scale * first, second, POINTS).item() for scale in (1.0, 0.8, 0.5, 0.1, 0.01)]
    assert losses[0] == pytest.approx(1, abs=1e-5) and losses == sorted(losses)
    assert losses[1] > 1.02 and losses[2] > 1.2


def test_zooming_out_does_not_lower_the_loss() -> None:
    angles, shift = torch.tensor([0.5]), torch.tensor([0.2, 0.0])
    losses = [
        upright_loss(scale * sources(angles, -angles), scale * sources(-angles, angles) + shift, POINTS)
        for scale in (0.5, 1.0, 2.0, 10.0)
    ]
    # The views differ only by a shift, which looks smaller after zooming out.
    assert losses[0] > losses[1] and losses[1:] == [pytest.approx(float(losses[1]))] * 3
    apart = [
        upright_loss(scale * sources(angles, 0 * angles), scale * sources(-angles, 0 * angles), POINTS)
        for scale in (1, 3)
    ]
    assert apart[1] > apart[0]


def test_minimising_the_loss_gives_uprightness() -> None:
    torch.manual_seed(0)
    # The input of this transformer is the angle: a line through the origin with slope -1 undoes it.
    line = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(line.parameters(), lr=0.05)
    for _ in range(200):
        first, second = (torch.rand(2, 64) * 2 - 1) * math.pi / 3
        views = (sources(angle, line(angle[:, None])[:, 0]) for angle in (first, second))
        loss = upright_loss(*views, POINTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert measure(ANGLES, line(ANGLES[:, None])[:, 0], torch.zeros(5, dtype=torch.long)) < 0.05
