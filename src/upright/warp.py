"""Sampling points, affine matrices and resizing: augmentation and the spatial transformer share all of it.

Coordinates are normalised: (-1, -1) is the outer corner of the top left pixel and (1, 1) that of the bottom right
(``align_corners=False``), x to the right, y down. A transform maps *output* coordinates to the *input* coordinates they
are sampled from, as in the spatial transformer paper; so warping by A and then by B samples the image at A(B(x)).

Letters: ``B C H W`` images, ``N`` points.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

Sampling = Literal["bilinear", "bicubic", "nearest"]
Padding = Literal["zeros", "border", "reflection"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: eight bits of a coordinate are half a pixel at 128 pixels."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def pixel_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Coordinates ``(x, y)`` of all pixel centres, row by row: shape ``(H*W, 2)``."""
    y = (2 * torch.arange(height, device=device, dtype=torch.float32) + 1) / height - 1
    x = (2 * torch.arange(width, device=device, dtype=torch.float32) + 1) / width - 1
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def transform_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Apply affine ``matrices`` ``(B, 2 or 3, 3)`` to ``points`` ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``.

    One matrix product: in ONNX Runtime it replaces the multiply-and-sum that ``affine_grid`` is decomposed into, which
    takes most of a spatial transformer's time there.
    """
    with full_precision(points.device):
        return _combined(_homogeneous(points), matrices[:, :2])


def grid_points(matrices: Tensor, height: int, width: int) -> Tensor:
    """`transform_points` of `pixel_centres`: ``(B, H*W, 2)``.

    On a whole grid an affine map is a sum of what rows and what columns give, in a quarter of the time of the product
    (32 x 32, 128 images, CPU, one thread); in ONNX Runtime it is the other way round.
    """
    columns = pixel_centres(1, width, device=matrices.device)[:, 0]
    rows = pixel_centres(height, 1, device=matrices.device)[:, 1]
    across = matrices[:, :2, 0, None] * columns  # (B, 2, W)
    down = matrices[:, :2, 1, None] * rows + matrices[:, :2, 2, None]  # (B, 2, H)
    return (down[..., None] + across[..., None, :]).flatten(2).mT


def project_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Apply projective ``matrices`` ``(B, 3, 3)`` to ``points`` ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``.

    What lies on the horizon or behind it has no image; it is divided by a small depth instead of none or a negative
    one, so that all stays finite.
    """
    with full_precision(points.device):
        projected = _combined(_homogeneous(points), matrices)
    return projected[..., :2] / projected[..., 2:].clamp(min=0.05)


def _homogeneous(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def _combined(terms: Tensor, factors: Tensor) -> Tensor:
    """``terms @ factors.mT``: ``terms`` ``(N, K)`` or ``(B, N, K)`` by ``factors`` ``(B, D, K)``, to ``(B, N, D)``."""
    if terms.dim() == 3:
        return terms @ factors.mT
    # One product for the whole batch, x and y apart in memory: 28 x 28 points of 128 images took a twentieth of the
    # time of 128 small products (CPU, one thread), and sampling reads either layout equally fast.
    batch, size, count = factors.shape
    return (factors.reshape(-1, count) @ terms.T).reshape(batch, size, -1).mT


def spline_solution(controls: Tensor) -> Tensor:
    """What `spline_weights` needs to know of ``controls`` ``(K, 2)``: ``(K + 3, K)``."""
    count = len(controls)
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64, device=controls.device)
    system[:count] = _spline_basis(controls.double(), controls.double())
    system[count:, :count] = system[:count, count:].T
    # Of the inverse only what multiplies the values is wanted; the side conditions are zeros.
    solution: Tensor = torch.linalg.inv(system)[:, :count].float()
    return solution


def spline_weights(controls: Tensor, solution: Tensor, points: Tensor) -> Tensor:
    """What each of ``controls`` ``(K, 2)`` contributes at ``points`` ``(..., N, 2)``: ``(..., N, K)``.

    The thin-plate spline (Bookstein 1989, "Principal warps"): ``weights @ values`` ``(K, D)`` is the function of least
    bending that has those values at the controls; it reproduces every affine function.
    """
    return _spline_basis(controls, points) @ solution


def spline_points(controls: Tensor, solution: Tensor, shifts: Tensor, points: Tensor) -> Tensor:
    """Where the splines that move ``controls`` ``(K, 2)`` by ``shifts`` ``(B, K, 2)`` take ``points``: ``(B, N, 2)``.

    ``points`` are ``(N, 2)``, whose weights are then the same for all images, or ``(B, N, 2)``.
    """
    return points + _combined(spline_weights(controls, solution, points), shifts.mT)


def _spline_basis(controls: Tensor, points: Tensor) -> Tensor:
    squares = (points[..., None, :] - controls).square().sum(dim=-1)
    radial = squares * squares.clamp(min=1e-12).log()
    return torch.cat([radial, torch.ones_like(points[..., :1]), points], dim=-1)


def sample(
    images: Tensor,
    points: Tensor,
    height: int,
    width: int,
    padding: Padding = "zeros",
    sampling: Sampling = "bilinear",
    shrink: tuple[int, int] = (1, 1),
) -> Tensor:
    """Values of ``images`` ``(B, C, h, w)`` at ``points`` ``(B, N, 2)``: ``(B, C, height, width)``.

    Args:
        images: float.
        points: row by row, as `pixel_centres` gives them for ``height * shrink[0]`` x ``width * shrink[1]``.
        height: rows of the result.
        width: columns of the result.
        padding: what is seen beyond the border.
        sampling: how values between pixels are made.
        shrink: so many points per pixel of the result, down and across, are averaged.
    """
    grid = points.reshape(-1, height * shrink[0], width * shrink[1], 2)
    values = grid_sample(images, grid, mode=sampling, padding_mode=padding, align_corners=False)
    return values if shrink == (1, 1) else avg_pool2d(values, shrink)


def warp(images: Tensor, matrices: Tensor, padding: Padding = "zeros") -> Tensor:
    """Float ``images`` ``(B, C, H, W)`` sampled through affine ``matrices`` ``(B, 2 or 3, 3)``, at their own size."""
    height, width = images.shape[-2:]
    return sample(images, grid_points(matrices, height, width), height, width, padding)


def identity(batch: int, *, device: torch.device | None = None) -> Tensor:
    """``batch`` matrices ``(B, 3, 3)`` that change nothing."""
    return torch.eye(3, device=device).expand(batch, 3, 3)


def rotation(angles: Tensor, aspect: float | Tensor = 1.0) -> Tensor:
    """Matrices ``(B, 3, 3)`` that turn what is seen anticlockwise by ``angles`` ``(B,)`` in radians.

    Args:
        angles: as seen by someone who looks at the picture.
        aspect: width / height, of all or of each ``(B,)``, without which a rotation in normalised coordinates would
            shear an oblong image.
    """
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    one = torch.ones_like(angles)
    rows = [[cos, -sin / aspect, zero], [sin * aspect, cos, zero], [zero, zero, one]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_angle(points: Tensor, reference: Tensor, aspect: float = 1.0) -> Tensor:
    """The rotation, in radians ``(B,)``, that fits best how ``reference`` ``(N, 2)`` became ``points`` ``(B, N, 2)``.

    The planar case of the orthogonal Procrustes problem, so that it is defined for every smooth transform.
    """
    scale = torch.tensor([aspect, 1.0], device=points.device)
    p = (points - points.mean(dim=-2, keepdim=True)) * scale
    r = (reference - reference.mean(dim=-2, keepdim=True)) * scale
    cross = (r[..., 0] * p[..., 1] - r[..., 1] * p[..., 0]).sum(dim=-1)
    return torch.atan2(cross, (r * p).sum(dim=(-2, -1)))


def resize(images: Tensor, height: int, width: int, rule: Literal["stretch", "crop"] = "stretch") -> Tensor:
    """Float ``images`` ``(B, C, h, w)`` at ``height`` x ``width``, antialiased: rows x image x columns.

    The triangle filter of ``interpolate(mode="bilinear", antialias=True)`` as two matrix products, which every ONNX
    runtime computes alike (the ``antialias`` of ONNX ``Resize`` is ignored by some). At equal size it changes no bit.

    Args:
        images: any float dtype, any size.
        height: rows wanted.
        width: columns wanted.
        rule: ``stretch`` takes the whole image, ``crop`` the largest centred box of the wanted aspect.
    """
    # Sizes come from tensors: torch.export refuses to divide symbolic integers.
    rows = torch.arange(images.shape[-2], device=images.device, dtype=images.dtype)
    columns = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    h, w = rows[-1:] + 1, columns[-1:] + 1
    box_h, box_w = h, w
    if rule == "crop":
        scale = torch.minimum(h / height, w / width)
        box_h, box_w = scale * height, scale * width
    return _filter(rows, h, box_h, height) @ images @ _filter(columns, w, box_w, width).T


def _filter(positions: Tensor, size: Tensor, box: Tensor, wanted: int) -> Tensor:
    """Weights ``(wanted, size)`` that resample the centred ``box`` of a line of ``size`` pixels."""
    step = box / wanted
    centres = (torch.arange(wanted, device=positions.device, dtype=positions.dtype) + 0.5) * step + (size - box) / 2
    distance = (positions + 0.5 - centres[:, None]).abs() / step.clamp(min=1)
    weights = torch.relu(1 - distance)
    return weights / weights.sum(dim=1, keepdim=True)
