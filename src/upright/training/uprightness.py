"""How upright a spatial transformer turns things, and the loss that makes it: Upright's own measure and loss.

Both look at the pose that an image ends in: the transform that was done to it, followed by what the transformer did.
Two views of one image should end in the same pose. Nobody says which: the network chooses its own upright.
Kin in the literature: learned canonicalisation (Kaba et al. 2023, arXiv:2211.06489).
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


def final_poses(transforms: Callable[[Tensor], Tensor], seen: list[Observation], points: Tensor) -> list[Tensor]:
    """Where output ``points`` ``(N, 2)`` lie in the undistorted images, ``(B, N, 2)``, for each of `last_of` ``seen``.

    Args:
        transforms: what was done to each image before: from output points to points of the undistorted image.
        seen: what the transformers did, in order.
        points: at which to compare.
    """
    return [transforms(last.points(points)) for last in last_of(seen)]


def upright_loss(first: Tensor, second: Tensor, points: Tensor, aspect: float = 1.0) -> Tensor:
    """Disagreement of two final poses ``(B, N, 2)`` of the same images: a scalar.

    The mean squared distance between the points, over twice the geometric mean of the two spreads: 0 when they agree,
    1 - cos(angle) when one is the other turned by an angle. So nothing is gained by shrinking both to a point;
    something is lost by shrinking one, which a transformer that is not sure of the angle would else do; and nothing is
    gained by looking from afar, where a shift would seem small, for the spread counts no more than that of ``points``.
    An image counts at most 2, what a half turn costs: what lies near a projective horizon is arbitrarily far away, and
    one image in a hundred would outweigh all the others.

    Args:
        first: where output points lie in the undistorted images, for one view.
        second: for the other.
        points: the output points, ``(N, 2)``.
        aspect: width / height of the images.
    """
    scale = torch.tensor([aspect, 1.0], device=points.device)
    first, second = first * scale, second * scale
    most = float(_spread((points * scale)[None]))
    # From below, for the gradient of the root at 0.
    spread = (_spread(first) * _spread(second)).clamp(min=(0.01 * most) ** 2).sqrt().clamp(max=most)
    return ((first - second).square().mean(dim=(1, 2)) / (2 * spread)).clamp(max=2).mean()


def _spread(points: Tensor) -> Tensor:
    return (points - points.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))


class Uprightness(Metric):
    """Spread of the angle after the transformer over that before it: 0 turns all upright, 1 turns nothing.

    Update with several views of each image at known angles. Per image, the variance of the residual angle (around its
    circular mean) and the variance of the angle applied; the ratio of their means over all images, as a root. Each of
    several parallel transformers counts as an image of its own.
    """

    full_state_update = False
    groups: list[Tensor]
    applied: list[Tensor]
    residual: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("groups", "applied", "residual"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, groups: Tensor, transforms: Tensor, seen: list[Observation], aspect: float) -> None:
        """Add a batch.

        Args:
            groups: which image each one shows, ``(B,)``.
            transforms: what was done to each, affine or projective, ``(B, 3, 3)``.
            seen: what the transformers did.
            aspect: width / height of the images.
        """
        points = pixel_centres(4, 4, device=transforms.device)
        done = partial(project_points, transforms)
        applied = rotation_angle(done(points), points, aspect)
        poses = final_poses(done, seen, points)
        for branch, pose in enumerate(poses):
            self.groups.append(groups * len(poses) + branch)
            self.applied.append(applied)
            self.residual.append(rotation_angle(pose, points, aspect))

    def compute(self) -> Tensor:
        """The measure, a scalar; NaN when no image was shown at different angles."""
        groups, applied, residual = (dim_zero_cat(part) for part in (self.groups, self.applied, self.residual))
        _, groups = torch.unique(groups, return_inverse=True)
        before, after = (_circular_variance(angles, groups).mean() for angles in (applied, residual))
        # Less than a hundredth of a degree is rounding.
        return (after / before).sqrt() if before > 1e-8 else torch.full_like(before, torch.nan)


def _circular_variance(angles: Tensor, groups: Tensor) -> Tensor:
    """Mean squared deviation, in radians, from each group's circular mean: one number per group."""
    count = int(groups.max()) + 1
    sums = torch.zeros(count, 2, device=angles.device)
    sums.index_add_(0, groups, torch.stack([angles.cos(), angles.sin()], dim=1))
    deviation = angles - torch.atan2(sums[:, 1], sums[:, 0])[groups]
    deviation = torch.remainder(deviation + math.pi, 2 * math.pi) - math.pi
    squares = torch.zeros(count, device=angles.device).index_add_(0, groups, deviation.square())
    return squares / groups.bincount(minlength=count)
