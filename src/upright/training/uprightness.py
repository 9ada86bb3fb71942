"""Uprightness, Upright's own measures of a spatial transformer, and the upright loss, which trains for them.

Both use the composition of two transforms: the one applied to the image, and the transformer's own. Two views of one
image should have the same composition. The network is free to choose which orientation is upright.
Related work: learned canonicalisation (Kaba et al. 2023, arXiv:2211.06489).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from upright.architectures.spatial_transformer import Observation, last_of
from upright.warp import pixel_centres, project_points, rotation_angle


def final_points(
    transforms: Callable[[Tensor], Tensor], observations: list[Observation], points: Tensor
) -> list[Tensor]:
    """Return the positions of output points in the undistorted images, ``(B, N, 2)``, for each last observation.

    ``transforms`` is the transform applied to each image before: it maps output points to the undistorted image.
    """
    return [transforms(last.points(points)) for last in last_of(observations)]


def upright_loss(first: Tensor, second: Tensor, points: Tensor, aspect: float = 1.0) -> Tensor:
    """Disagreement of the `final_points` ``(B, N, 2)`` of two views of the same images: a scalar.

    The loss of an image is the mean squared distance between the points, over twice the geometric mean of the two
    spreads. It is 0 for equal points, and 1 - cos(angle) if they differ by a rotation.

    - The division prevents a gain from shrinking both views to a point.
    - The geometric mean makes it costly to shrink one view. Without it, a transformer shrinks its output when the angle
      is uncertain.
    - The spread is capped at that of ``points``. Without the cap, a transformer could zoom out, where a shift looks
      small.
    - The loss of an image is capped at 2, the loss of a rotation by 180 degrees. Points near a projective horizon are
      arbitrarily far away, and without the cap one image in a hundred would outweigh all others.

    Args:
        first: positions of the output points in the undistorted images, for one view.
        second: the same for the other view.
        points: the output points, ``(N, 2)``.
        aspect: width / height of the images.
    """
    scale = torch.tensor([aspect, 1.0], device=points.device)
    first, second = first * scale, second * scale
    maximum = float(_spread((points * scale)[None]))
    # The lower bound keeps the gradient of the root finite at 0.
    spread = (_spread(first) * _spread(second)).clamp(min=(0.01 * maximum) ** 2).sqrt().clamp(max=maximum)
    return ((first - second).square().mean(dim=(1, 2)) / (2 * spread)).clamp(max=2).mean()


def _spread(points: Tensor) -> Tensor:
    return (points - points.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))


class Uprightness(Metric):
    """Spread of the angle after the transformer, over that before it, and deviations of that angle in degrees.

    Update it with several views of each image at known angles. The residual angle of a view is the rotation of the
    transformer's output against the undistorted image. With several parallel transformers, each one counts as a
    separate image.

    - ``uprightness``: 0 if all outputs are upright, 1 for no rotation. For each image, the metric computes the variance
      of the residual angle around its circular mean, and the variance of the applied angle. The result is the square
      root of the ratio of their means over all images.
    - ``relative_degrees_*``: the relative deviation of a view is the distance of its residual angle to the circular
      mean of its image.
    - ``absolute_degrees_*``: the absolute deviation of a view is the distance of its residual angle to 0, the angle of
      the undistorted image. It is meaningful if these images have a common up.

    Deviations are between 0 and 180 degrees. Their ``median``, ``mean`` and 95th percentile ``p95`` are over all views.
    """

    full_state_update = False
    groups: list[Tensor]
    applied: list[Tensor]
    residual: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("groups", "applied", "residual"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, groups: Tensor, transforms: Tensor, observations: list[Observation], aspect: float) -> None:
        """Add a batch.

        Args:
            groups: index of the image that each view shows, ``(B,)``.
            transforms: transform applied to each view, affine or projective, ``(B, 3, 3)``.
            observations: observations of the transformers.
            aspect: width / height of the images.
        """
        points = pixel_centres(4, 4, device=transforms.device)
        projection = partial(project_points, transforms)
        applied = rotation_angle(projection(points), points, aspect)
        branches = final_points(projection, observations, points)
        for number, sources in enumerate(branches):
            self.groups.append(groups * len(branches) + number)
            self.applied.append(applied)
            self.residual.append(rotation_angle(sources, points, aspect))

    def compute(self) -> dict[str, Tensor]:
        """Return every measure by its name, a scalar; all are NaN if no image has views at different angles."""
        groups, applied, residual = (dim_zero_cat(part) for part in (self.groups, self.applied, self.residual))
        _, groups, views = torch.unique(groups, return_inverse=True, return_counts=True)
        before, after = (_circular_deviation(angles, groups) for angles in (applied, residual))
        # Every image has the same weight, whatever its number of views.
        weights = 1 / (len(views) * views[groups])
        spread, remaining = ((weights * deviation.square()).sum() for deviation in (before, after))
        measures = {"uprightness": (remaining / spread).sqrt()}
        for name, deviation in (("relative", after), ("absolute", residual)):
            degrees = deviation.abs().rad2deg()
            measures |= {
                f"{name}_degrees_median": degrees.quantile(0.5),
                f"{name}_degrees_mean": degrees.mean(),
                f"{name}_degrees_p95": degrees.quantile(0.95),
            }
        # A spread below a hundredth of a degree is rounding.
        return measures if spread > 1e-8 else dict.fromkeys(measures, torch.full_like(spread, torch.nan))


def _circular_deviation(angles: Tensor, groups: Tensor) -> Tensor:
    """Return the difference of each angle to the circular mean of its group, in radians from -pi to pi.

    The mean is undefined if the directions cancel, as those of equal steps around the full circle do. It is then 0.
    """
    sums = torch.zeros(int(groups.max()) + 1, 2, device=angles.device)
    sums.index_add_(0, groups, torch.stack([angles.cos(), angles.sin()], dim=1))
    # Shorter sums are rounding, whose direction would depend on the order of the views.
    means = torch.where(sums.norm(dim=1) > 1e-4, torch.atan2(sums[:, 1], sums[:, 0]), 0.0)
    return torch.remainder(angles - means[groups] + math.pi, 2 * math.pi) - math.pi
