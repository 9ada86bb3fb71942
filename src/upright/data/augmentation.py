"""Augmentation of a batch on its device: one transform per image, sampled once and returned with the images.

An augmentation is a list of parts, applied in order. `Geometric` parts are defined here. Parts that change values
(brightness, hue, noise, erasing) are kornia's, unchanged. Every part draws from torch's global generator; parts of this
module draw on the CPU, so that one seed gives one batch on every device.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from upright import warp
from upright.data.batch import Points, View
from upright.data.mixing import Mixing
from upright.errors import UserError, one_line
from upright.internals.kornia import has_part
from upright.warp import Padding

CHUNK_IMAGES = 128
"""Number of images that a CPU samples at a time, so that they stay in its cache. 2,048 images of 3 x 32 x 32 took a
third of the time of one call for all."""

PROBE_SIDE = 32
PROBES = 16
"""Number of seeds that `probe` tries."""

CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
"""Corners of an image, clockwise from the top left."""


class Geometric(nn.Module, ABC):
    """A random transform of pixel positions; `Augmentation` composes and samples."""

    @abstractmethod
    def draw(self, batch: int, height: int, width: int) -> Tensor | Points:
        """Draw transforms from output to input: matrices ``(B, 3, 3)`` on the CPU, or a function of points."""


class RandomAffine(Geometric):
    """Random rotation, scale, shear, shift and flip, uniform in each range.

    Args:
        rotate: largest rotation in degrees, in both directions.
        scale: smallest and largest factor of size.
        shear: largest shear in degrees, in both directions along x.
        shift: largest shift as a fraction of the image, in both directions along x and along y.
        flip: probability of a mirror image.
    """

    def __init__(
        self,
        *,
        rotate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
        shift: float = 0.0,
        flip: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale needs 0 < least <= greatest, got {list(scale)}.")
        if not 0 <= flip <= 1:
            raise UserError(f"flip is a probability from 0 to 1, got {flip}.")
        if not abs(shear) < 90:
            raise UserError(f"shear must be below 90 degrees, got {shear}.")
        self.rotate, self.scale, self.shear, self.shift, self.flip = rotate, scale, shear, shift, flip

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        aspect = width / height
        # Always six draws per image, in this order, so that one option does not change the draws of the others.
        angle, size, slant, mirror, *shifts = torch.rand(6, batch)
        matrices = warp.rotation(math.radians(self.rotate) * (2 * angle - 1), aspect)
        inner = warp.identity(batch).clone()
        inner[:, 0, 0] = torch.where(mirror < self.flip, -1.0, 1.0)
        inner[:, 0, 1] = torch.tan(math.radians(self.shear) * (2 * slant - 1)) / aspect
        inner[:, :2] /= (self.scale[0] + (self.scale[1] - self.scale[0]) * size)[:, None, None]
        matrices = inner @ matrices
        # A shift by the whole image is 2 in normalised coordinates.
        matrices[:, :2, 2] = 2 * self.shift * (2 * torch.stack(shifts, dim=1) - 1)
        return matrices


class RandomCrop(Geometric):
    """A random crop of the image's own size from the padded image: a shift by whole pixels.

    Args:
        padding: pixels of padding on each side.
    """

    def __init__(self, *, padding: int = 4) -> None:
        super().__init__()
        if padding < 0:
            raise UserError(f"padding must be at least 0 pixels, got {padding}.")
        self.padding = padding

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        # The same draws for every padding, as in `RandomAffine`.
        shifts = (torch.rand(batch, 2) * (2 * self.padding + 1)).floor() - self.padding
        matrices = warp.identity(batch).clone()
        matrices[:, :2, 2] = 2 * shifts / torch.tensor([width, height])
        return matrices


class RandomResizedCrop(Geometric):
    """A crop of random area, aspect and position, resized to the image's size (Szegedy et al. 2015, section 6).

    A box that is longer than the image is cut to its length.

    Args:
        scale: smallest and largest area of the box, as a fraction of the image's; uniform.
        ratio: smallest and largest width / height of the box, in pixels; uniform in its logarithm, so that wide and
            tall boxes are equally likely.
    """

    def __init__(
        self, *, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"scale needs 0 < least <= greatest <= 1, a fraction of the area, got {list(scale)}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"ratio needs 0 < least <= greatest, got {list(ratio)}.")
        self.scale, self.ratio = scale, ratio

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        size, shape, *shifts = torch.rand(4, batch)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * size
        low, high = map(math.log, self.ratio)
        ratio = (low + (high - low) * shape).exp() * height / width
        sides = torch.stack([area * ratio, area / ratio], dim=1).sqrt().clamp(max=1)
        matrices = torch.diag_embed(torch.cat([sides, torch.ones(batch, 1)], dim=1))
        matrices[:, :2, 2] = (1 - sides) * (2 * torch.stack(shifts, dim=1) - 1)
        return matrices


class RandomPerspective(Geometric):
    """A random perspective: each corner of the output is sampled from a random point near that corner.

    Args:
        distortion: largest distance from the corner as a fraction of the image, in both directions along x and along
            y. It must be below 0.25: from there on, the four corners may not form a convex shape.
    """

    def __init__(self, *, distortion: float = 0.1) -> None:
        super().__init__()
        if not 0 <= distortion < 0.25:
            raise UserError(f"distortion must be from 0 to below 0.25 of the image, got {distortion}.")
        self.distortion = distortion

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        return quadrilateral(CORNERS + 2 * self.distortion * (2 * torch.rand(batch, 4, 2) - 1))


def quadrilateral(corners: Tensor) -> Tensor:
    """Return the matrices ``(B, 3, 3)`` that map the image's corners, clockwise from the top left, to ``corners``.

    The corners ``(B, 4, 2)`` are in convex order. This is the closed form of Heckbert 1989, "Fundamentals of texture
    mapping and image warping", section 2.2.3, for the square from (0, 0) to (1, 1).
    """
    first, second, third, fourth = corners.unbind(1)  # (B, 2)
    ahead, behind, surplus = second - third, fourth - third, first - second + third - fourth
    bottom = torch.stack([cross(surplus, behind), cross(ahead, surplus)], dim=1) / cross(ahead, behind)[:, None]
    columns = torch.stack([second - first, fourth - first], dim=2) + bottom[:, None] * torch.stack([second, fourth], 2)
    rows = torch.cat([columns, first[:, :, None]], dim=2)
    last = torch.cat([bottom, torch.ones_like(bottom[:, :1])], dim=1)[:, None]
    unit = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    matrices = torch.cat([rows, last], dim=1) @ unit
    # Depth 1 in the middle, as in the identity.
    return matrices / matrices[:, 2:, 2:]


def cross(first: Tensor, second: Tensor) -> Tensor:
    """Return the signed area spanned by vectors ``(..., 2)``: positive if the second is clockwise of the first."""
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


class RandomElastic(Geometric):
    """A random elastic distortion: random shifts of a regular grid of points, with a thin-plate spline between them.

    It is cheapest as the last of neighbouring geometric parts, because all images then need the same points.

    Args:
        points: grid points along x and along y, from border to border.
        sigma: standard deviation of the shifts, along x and along y, as a fraction of the image.
    """

    def __init__(self, *, points: int = 4, sigma: float = 0.03) -> None:
        super().__init__()
        if points < 2:
            raise UserError(f"points must be at least 2 along each side, got {points}.")
        if sigma < 0:
            raise UserError(f"sigma must be at least 0, got {sigma}.")
        self.sigma = sigma
        line = torch.linspace(-1, 1, points)
        self.controls = torch.cartesian_prod(line, line)
        self.solution = warp.spline_solution(self.controls)

    def draw(self, batch: int, height: int, width: int) -> "Spline":
        return Spline(self.controls, self.solution, 2 * self.sigma * torch.randn(batch, len(self.controls), 2))


@dataclass(frozen=True)
class Spline:
    """A thin-plate spline per image, as a `Points`: see `upright.warp.spline_points`."""

    controls: Tensor
    solution: Tensor
    shifts: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Map output ``points`` ``(N, 2)`` or ``(B, N, 2)`` to the input: ``(B, N, 2)``."""
        controls, solution, shifts = (part.to(points.device) for part in (self.controls, self.solution, self.shifts))
        return warp.spline_points(controls, solution, shifts, points)

    def __getitem__(self, chosen: Tensor) -> "Spline":
        return Spline(self.controls, self.solution, self.shifts[chosen])

    def double(self) -> "Spline":
        """Return the spline in double precision: rounded to single, its points do not depend on the batch."""
        return Spline(self.controls.double(), self.solution.double(), self.shifts.double())


class Distortion(nn.Module, ABC):
    """A part that returns a new image of any size for each image, and the origin of its pixels."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Points]:
        """Distort float images ``(B, C, H, W)`` in [0, 1]; return them and the map from output to input points."""


@dataclass(frozen=True)
class Composition:
    """Transforms of a batch, in the order in which they are applied to an image, as one transform: a `Points`."""

    batch: int
    parts: tuple[Tensor | Points, ...] = ()

    def then(self, *parts: Tensor | Points) -> "Composition":
        """Append ``parts``; neighbouring matrices are multiplied."""
        joined = list(self.parts)
        for part in parts:
            if joined and isinstance(joined[-1], Tensor) and isinstance(part, Tensor):
                joined[-1] = joined[-1] @ part
            else:
                joined.append(part)
        return Composition(self.batch, tuple(joined))

    def __call__(self, points: Tensor) -> Tensor:
        """Map output ``points`` ``(N, 2)`` or ``(B, N, 2)`` to the input: ``(B, N, 2)``."""
        with warp.full_precision(points.device):
            # A point of the output goes through the last transform first.
            for part in reversed(self.parts):
                if not isinstance(part, Tensor):
                    points = part(points)
                elif _is_affine(part):
                    points = warp.transform_points(part.to(points.device), points)
                else:
                    points = warp.project_points(part.to(points.device), points)
        return points.expand(self.batch, -1, -1)

    def grid(self, height: int, width: int, device: torch.device) -> Tensor:
        """Map the pixel centres of the output to the input: ``(B, H*W, 2)``."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Tensor) and _is_affine(self.parts[0]):
            return warp.grid_points(self.parts[0].to(device), height, width)
        return self(warp.pixel_centres(height, width, device=device))


def _is_affine(matrices: Tensor) -> bool:
    return torch.equal(matrices[:, 2], warp.identity(len(matrices))[:, 2])


class Augmentation(nn.Module):
    """A sequence of parts; neighbouring geometric ones are composed and sampled once.

    Args:
        parts: `Geometric`, `Distortion` and `Mixing` parts, or any ``nn.Module`` from a float batch ``(B, C, H, W)`` in
            [0, 1] to another, for example kornia's. Transforms of kornia's parts are returned with the others. A module
            that draws once per batch, as torchvision's do, is applied to one image at a time; see `probe`.
        padding: values beyond the border, for the geometric parts.
    """

    def __init__(self, parts: Iterable[nn.Module] = (), *, padding: Padding = "zeros") -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise UserError(f"padding must be one of {', '.join(get_args(Padding))}; got '{padding}'.")
        self.parts, self.padding = nn.ModuleList(parts), padding
        self._probes = [probe(part) for part in self.parts]
        for part in self.parts:
            if has_part(part, "mix"):
                raise UserError(
                    f"{type(part).__name__} of kornia mixes images, but neither mixes labels nor reports its "
                    "transforms: use upright.data.mixing.MixUp or CutMix."
                )

    @property
    def moves(self) -> bool:
        """True if any part moves pixels."""
        ours = any(isinstance(part, Geometric | Distortion) or has_part(part, "geometric") for part in self.parts)
        return ours or any(part.moves for part in self._probes)

    @property
    def mixes(self) -> str | None:
        """The name of the first part that mixes images, if there is one."""
        return next((type(part).__name__ for part in self.parts if isinstance(part, Mixing)), None)

    @property
    def unreported(self) -> str | None:
        """The name of the first part that moves pixels without reporting its transform, if there is one."""
        for part, behaviour in zip(self.parts, self._probes, strict=True):
            # Modules that move pixels, and the containers around them.
            moving = [module for module in part.modules() if has_part(module, "geometric")]
            if behaviour.moves or not all(hasattr(module, "transform_matrix") for module in moving):
                return type(part).__name__
        return None

    @torch.no_grad()
    def forward(self, images: Tensor, targets: Tensor | None = None) -> View:
        """Augment a batch.

        Args:
            images: uint8 or float ``(B, C, H, W)`` in [0, 255].
            targets: labels ``(B,)``, or probabilities ``(B, K)``, which mixing parts need.
        """
        # Matrices are composed on the CPU.
        with warp.full_precision(images.device), warp.full_precision(torch.device("cpu")):
            return self._view(images, targets)

    def _view(self, images: Tensor, targets: Tensor | None) -> View:
        applied, scale = Composition(len(images)), 1.0
        parts = zip(self.parts, self._probes, strict=True)
        for is_geometric, group in groupby(parts, lambda item: isinstance(item[0], Geometric)):
            if is_geometric:
                drawn = [cast(Geometric, part).draw(len(images), *images.shape[-2:]) for part, _ in group]
                moves = Composition(len(images)).then(*drawn)
                images, applied = self._sample(images, moves), applied.then(*moves.parts)
                continue
            for part, behaviour in group:
                images = images.float()
                if isinstance(part, Mixing):
                    images, targets = part(images, targets)
                    continue
                if scale == 1:
                    images, scale = images / 255, 255.0
                if isinstance(part, Distortion):
                    images, transform = part(images)
                else:
                    images, transform = self._change(part, behaviour, images)
                applied = applied.then(*([transform] if transform else []))
        images = images.float()
        return View(images if scale == 1 else images * scale, applied, targets)

    def _change(self, part: nn.Module, behaviour: "Behaviour", images: Tensor) -> tuple[Tensor, Points | None]:
        """Apply a part of another package, and return its transform if it reports one."""
        size = images.shape[-2:]
        try:
            images = torch.cat([part(image[None]) for image in images]) if behaviour.draws_once else part(images)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"{type(part).__name__} in data.init_args.augment does not take a batch of shape "
                f"{tuple(images.shape)}: {one_line(error, 200)}"
            ) from error
        matrices = getattr(part, "transform_matrix", None) if has_part(part, "geometric") else None
        return images, _normalised(matrices, size, images.shape[-2:]) if isinstance(matrices, Tensor) else None

    def _sample(self, images: Tensor, transforms: Composition) -> Tensor:
        height, width = images.shape[-2:]
        points = transforms.grid(height, width, images.device)
        chunk = CHUNK_IMAGES if images.device.type == "cpu" else len(images)
        if len(images) <= chunk:
            return warp.sample(images.float(), points, height, width, self.padding)
        sampled = torch.empty(images.shape, device=images.device)
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            sampled[part] = warp.sample(images[part].float(), points[part], height, width, self.padding)
        return sampled


class Behaviour(NamedTuple):
    """Behaviour of a module that does not report its transforms: it draws once for a batch, and it moves pixels."""

    draws_once: bool = False
    moves: bool = False


def probe(part: nn.Module) -> Behaviour:
    """Try a module on two equal images of noise, with and without a bright spot, under several seeds.

    It draws once per batch if its results vary with the seed, but never between the two images. It moves pixels if the
    spot appears elsewhere, or if the size changes. A rare or small effect may be missed. A module that fails here is
    accepted: it may need another size. Modules of this package and of kornia are not tried: they draw for each image.
    """
    is_kornia = any(type(module).__module__.startswith("kornia.") for module in part.modules())
    if is_kornia or isinstance(part, Geometric | Distortion | Mixing):
        return Behaviour()
    image = torch.rand(3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    spot = image.clone()
    spot[:, 6:10, 3:7] = 1.0
    centre = torch.tensor([7.5, 4.5])  # row and column
    varies = differs = moves = False
    first: Tensor | None = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in range(PROBES):
            try:
                part = copy.deepcopy(part)  # it may have a state
                torch.manual_seed(seed)
                without = part(torch.stack([image, image]))
                torch.manual_seed(seed)
                one, other = part(torch.stack([spot, spot]))
            except Exception:  # the module may need another size, or more images
                return Behaviour()
            first = one if first is None else first
            varies |= not torch.equal(one, first)
            moves |= one.shape != spot.shape
            if not moves:
                change = (one - without[0]).abs().sum(dim=0)
                positions = (change > change.max() / 2).nonzero().float()
                moves |= bool(change.max() > 0.1) and bool((positions.mean(dim=0) - centre).abs().max() > 2)
            differs |= not torch.equal(one, other)
    return Behaviour(draws_once=varies and not differs, moves=moves)


def _normalised(matrices: Tensor, size: torch.Size, new_size: torch.Size) -> Points:
    """Convert ``matrices`` ``(B, 3, 3)`` of kornia, from input to output in pixels between their centres."""

    def pixels(height: int, width: int) -> Tensor:
        rows = [[width / 2, 0.0, (width - 1) / 2], [0.0, height / 2, (height - 1) / 2], [0.0, 0.0, 1.0]]
        return torch.tensor(rows, device=matrices.device)

    # The result stays on its device: a check for affine matrices would wait for the device.
    return partial(warp.project_points, pixels(*size).inverse() @ matrices.inverse() @ pixels(*new_size))
