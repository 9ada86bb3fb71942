"""The transforms of a spatial transformer: families of transforms of the plane, with ``theta`` zero at the identity.

Each transform maps output to input coordinates (`upright.warp`). It is called with ``theta`` ``(B, P)`` and points
``(N, 2)`` or ``(B, N, 2)``. The table lists the order of ``theta``. Shifts are in half images.

The parameter of a rotation is a direction, (cos, sin) of the angle times any length, anticlockwise. An angle in one
number would jump somewhere in a full turn, and no continuous network can follow a jump (Zhou et al. 2019,
arXiv:1812.07035).

| name | P | theta |
|---|---|---|
| translation | 2 | x, y |
| rotation | 2 | difference from the direction (1, 0) |
| attention | 3 | log of the scale, x, y |
| similarity | 5 | difference from the direction (1, 0), log of the scale, x, y |
| affine | 6 | difference from the 2 x 3 matrix of the identity, row by row |
| projective | 8 | difference from the 3 x 3 matrix of the identity, row by row; the last entry stays 1 |
| thin_plate | 2 K² | x, y of the shift of each of K x K control points, row by row |
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from upright.warp import direction_rotation, project_points, spline_points, spline_solution, transform_points

TransformName = Literal["translation", "rotation", "attention", "similarity", "affine", "projective", "thin_plate"]

SIZES: dict[TransformName, int] = {
    "translation": 2,
    "rotation": 2,
    "attention": 3,
    "similarity": 5,
    "affine": 6,
    "projective": 8,
}
"""``P``, the number of parameters of each transform by a matrix."""
MIN_LENGTH = 1e-5
"""Length of the shortest direction that has an angle of its own. Shorter ones are rounding errors."""


def _matrices(name: TransformName, theta: Tensor, aspect: float) -> Tensor:
    """Return the matrices ``(B, 2 or 3, 3)`` of ``theta`` ``(B, P)``. A rotation needs ``aspect``, width / height."""
    match name:
        case "translation":
            return torch.eye(2, 3, device=theta.device) + pad(theta[:, :, None], (2, 0))
        case "rotation":
            return _rotation(theta, aspect)
        case "attention":
            linear = theta[:, :1, None].exp() * torch.eye(2, device=theta.device)
            return torch.cat([linear, theta[:, 1:, None]], dim=2)
        case "similarity":
            linear = theta[:, 2, None, None].exp() * _rotation(theta[:, :2], aspect)[:, :2, :2]
            return torch.cat([linear, theta[:, 3:, None]], dim=2)
        case "affine":
            return torch.eye(2, 3, device=theta.device) + theta.reshape(-1, 2, 3)
        case _:
            return torch.eye(3, device=theta.device) + pad(theta, (0, 1)).reshape(-1, 3, 3)


class MatrixTransform(nn.Module):
    """A transform by a matrix: all but the thin-plate spline.

    Args:
        name: family of the transform.
        aspect: width / height of the input.
    """

    def __init__(self, name: TransformName, aspect: float) -> None:
        super().__init__()
        self.name, self.aspect, self.size = name, aspect, SIZES[name]

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        """Map output ``points`` to the input: ``(B, N, 2)``."""
        matrices = _matrices(self.name, theta, self.aspect)
        return (project_points if self.name == "projective" else transform_points)(matrices, points)


class ThinPlate(nn.Module):
    """The thin-plate spline through a grid of control points that move independently; the paper has 4 x 4.

    Args:
        control_points: number ``K`` of control points per axis, from border to border.
    """

    controls: Tensor
    solution: Tensor

    def __init__(self, control_points: int = 4) -> None:
        super().__init__()
        if control_points < 2:
            raise ValueError(f"A thin-plate spline needs at least 2 control points per axis, got {control_points}.")
        line = torch.linspace(-1, 1, control_points)
        controls = torch.cartesian_prod(line, line).flip(1)
        self.size = controls.numel()
        # Both are functions of the number of points, so they are not stored with the weights.
        self.register_buffer("controls", controls, persistent=False)
        self.register_buffer("solution", spline_solution(controls), persistent=False)

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        return spline_points(self.controls, self.solution, theta.reshape(-1, self.size // 2, 2), points)


def unit(directions: Tensor) -> Tensor:
    """Return ``directions`` ``(B, 2)`` with length 1. One without length, as of a blank image, becomes (1, 0)."""
    lack = (MIN_LENGTH - directions.norm(dim=1, keepdim=True)).relu()
    return normalize(directions + pad(lack, (0, 1)), eps=MIN_LENGTH / 2)


def _rotation(theta: Tensor, aspect: float) -> Tensor:
    return direction_rotation(unit(theta + torch.tensor([1.0, 0.0], device=theta.device)), aspect)
