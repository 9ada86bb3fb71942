"""Sampling points, affine matrices and resizing, which augmentation and the spatial transformer share.

Coordinates are normalised: (-1, -1) is the outer corner of the top left pixel and (1, 1) that of the bottom right
(``align_corners=False``), x to the right, y down. A transform maps *output* coordinates to the *input* coordinates that
are sampled, as in the spatial transformer paper. Warping by A and then by B therefore samples the image at A(B(x)).

Letters: ``B C H W`` images, ``N`` points.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, embedding_bag, grid_sample

from upright.images import Interpolation

Sampling = Literal["bilinear", "bicubic", "nearest"]
Padding = Literal["zeros", "border", "reflection"]
Rule = Literal["stretch", "crop", "pad"]

STRIP_VALUES = 2**19
"""Values of an image that `resize_pixels` converts to float at a time, so that they stay in the processor's cache."""


class Taps(NamedTuple):
    """The nonzero weights of a filter along one axis of an image, ``(new_size, K)``."""

    part: slice
    """The pixels that the filter uses."""
    indices: Tensor
    """Indices into this part, ``(new_size, K)``."""
    weights: Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast: eight bits resolve a coordinate only to half a pixel at 128 pixels."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def pixel_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return the coordinates ``(x, y)`` of all pixel centres, row by row: shape ``(H*W, 2)``."""
    y = (2 * torch.arange(height, device=device, dtype=torch.float32) + 1) / height - 1
    x = (2 * torch.arange(width, device=device, dtype=torch.float32) + 1) / width - 1
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def transform_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Apply affine ``matrices`` ``(B, 2 or 3, 3)`` to ``points`` ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``.

    It is one matrix product. In ONNX Runtime, ``affine_grid`` would be decomposed into a multiply-and-sum, which takes
    most of a spatial transformer's time there.
    """
    with full_precision(points.device):
        return _combined(_homogeneous(points), matrices[:, :2])


def grid_points(matrices: Tensor, height: int, width: int) -> Tensor:
    """Apply `transform_points` to `pixel_centres`: ``(B, H*W, 2)``.

    On a complete grid an affine map is the sum of a term per row and a term per column. This takes a quarter of the
    time of the matrix product (32 x 32, 128 images, CPU, one thread); in ONNX Runtime the product is faster.
    """
    columns = pixel_centres(1, width, device=matrices.device)[:, 0]
    rows = pixel_centres(height, 1, device=matrices.device)[:, 1]
    across = matrices[:, :2, 0, None] * columns  # (B, 2, W)
    down = matrices[:, :2, 1, None] * rows + matrices[:, :2, 2, None]  # (B, 2, H)
    return (down[..., None] + across[..., None, :]).flatten(2).mT


def project_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Apply projective ``matrices`` ``(B, 3, 3)`` to ``points`` ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``.

    Points on the horizon or behind it have no image. They are divided by a small positive depth, so that all results
    are finite.
    """
    with full_precision(points.device):
        projected = _combined(_homogeneous(points), matrices)
    return projected[..., :2] / projected[..., 2:].clamp(min=0.05)


def _homogeneous(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def _combined(terms: Tensor, factors: Tensor) -> Tensor:
    """Return ``terms @ factors.mT``: ``(N, K)`` or ``(B, N, K)`` by ``(B, D, K)`` gives ``(B, N, D)``."""
    if terms.dim() == 3:
        return terms @ factors.mT
    # One product for the whole batch, with x and y apart in memory: 28 x 28 points of 128 images took a twentieth of
    # the time of 128 small products (CPU, one thread). Sampling reads both layouts equally fast.
    batch, size, count = factors.shape
    return (factors.reshape(-1, count) @ terms.T).reshape(batch, size, -1).mT


def spline_solution(controls: Tensor) -> Tensor:
    """Return the matrix ``(K + 3, K)`` that `spline_points` needs for ``controls`` ``(K, 2)``.

    Its product with `_spline_basis` is the weight of each control at a point. The weighted sum of values is the
    thin-plate spline (Bookstein 1989, "Principal warps"): the function of least bending that has those values at the
    controls. It reproduces every affine function.
    """
    count = len(controls)
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64, device=controls.device)
    system[:count] = _spline_basis(controls.double(), controls.double())
    system[count:, :count] = system[:count, count:].T
    # Only the columns that multiply the values are needed: the side conditions are zeros.
    solution: Tensor = torch.linalg.inv(system)[:, :count].float()
    return solution


def spline_points(controls: Tensor, solution: Tensor, shifts: Tensor, points: Tensor) -> Tensor:
    """Apply the splines that move ``controls`` ``(K, 2)`` by ``shifts`` ``(B, K, 2)`` to ``points``: ``(B, N, 2)``.

    ``points`` are ``(N, 2)``, with the same weights for all images, or ``(B, N, 2)``.
    """
    return points + _combined(_spline_basis(controls, points) @ solution, shifts.mT)


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
    """Sample float ``images`` ``(B, C, h, w)`` at ``points`` ``(B, N, 2)``: ``(B, C, height, width)``.

    The points are row by row, like `pixel_centres` of ``height * shrink[0]`` x ``width * shrink[1]``. So many points,
    down and across, are averaged for each pixel of the result.
    """
    grid = points.reshape(-1, height * shrink[0], width * shrink[1], 2)
    values = grid_sample(images, grid, mode=sampling, padding_mode=padding, align_corners=False)
    return values if shrink == (1, 1) else avg_pool2d(values, shrink)


def warp(images: Tensor, matrices: Tensor, padding: Padding = "zeros") -> Tensor:
    """Warp float ``images`` ``(B, C, H, W)`` by affine ``matrices`` ``(B, 2 or 3, 3)``; their size does not change."""
    height, width = images.shape[-2:]
    return sample(images, grid_points(matrices, height, width), height, width, padding)


def identity(batch: int, *, device: torch.device | None = None) -> Tensor:
    """Return ``batch`` identity matrices ``(B, 3, 3)``."""
    return torch.eye(3, device=device).expand(batch, 3, 3)


def disc(height: int, width: int) -> Tensor:
    """Return the weights ``(H, W)`` of a centred disc: 1 inside, 0 outside, with an edge of one pixel between them.

    The edge ends at the centres of the outermost pixels. Within it, a rotation around the centre never interpolates
    with the padding, so neither the corners nor the edge depend on the angle.
    """
    radius = (min(height, width) - 1) / 2
    y, x = (torch.arange(length) - (length - 1) / 2 for length in (height, width))
    # The sums of squares are exact, so the disc has exactly the symmetries of a square.
    return (radius - (y.square()[:, None] + x.square()).sqrt()).clamp(0, 1)


def rotation(angles: Tensor, aspect: float | Tensor = 1.0) -> Tensor:
    """Return the matrices ``(B, 3, 3)`` that rotate the visible content of an image anticlockwise.

    Args:
        angles: angles in radians, ``(B,)``, anticlockwise for a viewer of the image.
        aspect: width / height, one for all images or one for each, ``(B,)``. Without it, a rotation in normalised
            coordinates would shear an image that is not square.
    """
    return direction_rotation(torch.stack([angles.cos(), angles.sin()], dim=-1), aspect)


def direction_rotation(directions: Tensor, aspect: float | Tensor = 1.0) -> Tensor:
    """Return the matrices ``(B, 3, 3)`` of `rotation` for angles given as unit vectors (cos, sin) ``(B, 2)``."""
    cos, sin = directions.unbind(dim=-1)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = [[cos, -sin / aspect, zero], [sin * aspect, cos, zero], [zero, zero, one]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_angle(points: Tensor, reference: Tensor, aspect: float = 1.0) -> Tensor:
    """Return the rotation, in radians ``(B,)``, that maps ``reference`` ``(N, 2)`` best to ``points`` ``(B, N, 2)``.

    It is the planar case of the orthogonal Procrustes problem, so it is defined for every smooth transform.
    """
    scale = torch.tensor([aspect, 1.0], device=points.device)
    p = (points - points.mean(dim=-2, keepdim=True)) * scale
    r = (reference - reference.mean(dim=-2, keepdim=True)) * scale
    cross = (r[..., 0] * p[..., 1] - r[..., 1] * p[..., 0]).sum(dim=-1)
    return torch.atan2(cross, (r * p).sum(dim=(-2, -1)))


def resize(
    images: Tensor,
    height: int,
    width: int,
    rule: Rule = "stretch",
    background: float = 0,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Resize float ``images`` ``(B, C, h, w)`` to ``height`` x ``width`` with antialiasing: rows x image x columns.

    It is the filter of ``interpolate(mode=interpolation, antialias=True)`` as two matrix products. Every ONNX runtime
    computes these alike, while some ignore the ``antialias`` of ONNX ``Resize``. At equal size no bit changes.

    Args:
        images: images of any float dtype and any size.
        height: rows of the result.
        width: columns of the result.
        rule: ``stretch`` takes the whole image, ``crop`` the largest centred box of the new aspect, and ``pad`` the
            smallest centred box of the new aspect that holds the whole image.
        background: value of the pixels of that box whose centres lie beyond the image.
        interpolation: ``bilinear`` (triangle filter), or ``bicubic`` (Keys 1981 with a = -0.5, as in Pillow). Bicubic
            overshoots at edges, so its values are limited to those of an image, 0 to 255.
    """
    rows = torch.arange(images.shape[-2], device=images.device, dtype=images.dtype)
    columns = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    # Sizes are computed from tensors, because torch.export refuses to divide symbolic integers.
    h, w = rows[-1:] + 1, columns[-1:] + 1
    box_h, box_w = _boxes(h, w, height, width, rule)
    down = _filter(rows, h, box_h, height, rule, interpolation)
    across = _filter(columns, w, box_w, width, rule, interpolation)
    if rule == "pad":
        images = images - background  # beyond the image the weights are zero, and so is the difference
    resized = down @ images @ across.T
    if rule == "pad":
        resized = resized + background
    return resized.clamp(0, 255) if interpolation == "bicubic" else resized


def resize_pixels(
    pixels: Tensor,
    height: int,
    width: int,
    rule: Rule = "stretch",
    background: int = 0,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Resize decoded images ``(B, h, w, C)``, values 0 to 255, like `resize`: uint8 ``(B, C, height, width)``.

    Most weights of `resize` are zero. This function computes sums of the other terms, so that a photograph takes a
    fraction of the time. The result of an image does not depend on the other images.
    """
    down, across = _taps(*pixels.shape[1:3], height, width, rule, interpolation)
    pixels = pixels[:, down.part, across.part]  # a crop uses only a part of an image
    batch, h, w, channels = pixels.shape
    half = torch.empty(batch, w, channels, height)
    columns = max(1, STRIP_VALUES // (h * channels))
    for strip, result in zip(torch.split(pixels, columns, dim=2), torch.split(half, columns, dim=1), strict=True):
        values = strip.float() - background if rule == "pad" else strip.float()  # see `resize`
        sums = _sums(values.flatten(2), down)
        result.copy_(sums.view(batch, height, -1, channels).permute(0, 2, 3, 1))
    resized = _sums(half.flatten(2), across)
    if rule == "pad":
        resized += background
    resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.view(batch, width, channels, height).permute(0, 2, 3, 1).contiguous()


def _sums(lines: Tensor, taps: Taps) -> Tensor:
    """Compute the weighted sums of ``lines`` ``(B, n, D)``: ``(B, new_size, D)``."""
    batch, size, depth = lines.shape
    indices = taps.indices + size * torch.arange(batch)[:, None, None]
    weights = taps.weights.repeat(batch, 1)
    sums = embedding_bag(indices.flatten(0, 1), lines.flatten(0, 1), per_sample_weights=weights, mode="sum")
    return sums.view(batch, -1, depth)


@lru_cache(maxsize=32)
def _taps(h: int, w: int, height: int, width: int, rule: Rule, interpolation: Interpolation) -> tuple[Taps, Taps]:
    """Return the taps of `resize` down and across."""
    sizes = torch.tensor([float(h)]), torch.tensor([float(w)])
    boxes = _boxes(*sizes, height, width, rule)
    down, across = (_line_taps(*line, rule, interpolation) for line in zip(sizes, boxes, (height, width), strict=True))
    return down, across


def _line_taps(size: Tensor, box: Tensor, new_size: int, rule: Rule, interpolation: Interpolation) -> Taps:
    """Return the taps along one axis: `_filter` without the pixels beyond the reach of its kernel."""
    step = box / new_size
    reach = step.clamp(min=1) * (1 if interpolation == "bilinear" else 2)
    count = min(int(size), int((2 * reach).ceil()))
    first = (_centres(size, box, new_size) - reach - 0.5).floor().long() + 1
    indices = first.clamp(0, int(size) - count)[:, None] + torch.arange(count)
    part = slice(int(indices.min()), int(indices.max()) + 1)
    weights = _filter(indices.float(), size, box, new_size, rule, interpolation)
    return Taps(part, indices - part.start, weights)


def _boxes(h: Tensor, w: Tensor, height: int, width: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the height and width of the centred box that `resize` resamples."""
    if rule == "stretch":
        return h, w
    scale = (torch.minimum if rule == "crop" else torch.maximum)(h / height, w / width)
    return scale * height, scale * width


def _centres(size: Tensor, box: Tensor, new_size: int) -> Tensor:
    """Return the centres of the new pixels along a line of ``size`` pixels, ``(new_size,)``."""
    numbers = torch.arange(new_size, device=size.device, dtype=size.dtype)
    return (numbers + 0.5) * (box / new_size) + (size - box) / 2


def _filter(
    positions: Tensor, size: Tensor, box: Tensor, new_size: int, rule: Rule, interpolation: Interpolation
) -> Tensor:
    """Return the weights ``(new_size, n)`` that resample the centred ``box`` of a line of ``size`` pixels.

    ``positions`` are indices of the pixels, ``(n,)``, or of those for each new pixel, ``(new_size, n)``. With ``pad``,
    the weights of a new pixel whose centre lies beyond the line are zero.
    """
    centres = _centres(size, box, new_size)
    distance = (positions + 0.5 - centres[:, None]).abs() / (box / new_size).clamp(min=1)
    weights = torch.relu(1 - distance) if interpolation == "bilinear" else _cubic(distance)
    if rule != "pad":
        return weights / weights.sum(dim=1, keepdim=True)
    inside = ((centres >= 0) & (centres <= size)).to(weights.dtype)[:, None]
    return inside * weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)


def _cubic(distance: Tensor) -> Tensor:
    """Return the cubic convolution kernel (Keys 1981, a = -0.5) at distances of at least 0."""
    near, far = distance.clamp(max=1), distance.clamp(1, 2)  # each part is zero where it ends
    return (1.5 * near - 2.5) * near.square() + 1 - 0.5 * (far - 1) * (far - 2).square()
