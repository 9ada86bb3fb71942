"""The distorted MNIST tasks of the spatial transformer paper."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from upright.data.augmentation import (
    CORNERS,
    Augmentation,
    Composition,
    Distortion,
    Geometric,
    RandomAffine,
    RandomCrop,
    RandomElastic,
    Spline,
    cross,
    quadrilateral,
)
from upright.data.cache import to_tensor
from upright.data.mnist import MNIST
from upright.data.published import Bytes
from upright.data.split import Indices
from upright.data.views import Views
from upright.errors import UserError
from upright.images import ImageSpec
from upright.warp import identity, sample

Task = Literal["R", "RTS", "P", "E", "TC"]

DIGIT_SIDE = 28
"""Height and width of an original digit, in pixels."""
PATCH_SIDE = 6
"""Height and width of a piece of clutter, in pixels."""


class RandomCorners(Geometric):
    """A projective transform that moves each corner of the image by a normally distributed distance.

    Corners that are not in convex order, or that span less than a third of the image, are drawn again.

    Args:
        sigma: standard deviation along x and along y, as a fraction of the image.
    """

    def __init__(self, *, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        corners = CORNERS.expand(batch, 4, 2).clone()
        rejected = torch.ones(batch, dtype=torch.bool)
        while rejected.any():
            corners[rejected] = CORNERS + 2 * self.sigma * torch.randn(int(rejected.sum()), 4, 2)
            sides = corners.roll(-1, 1) - corners
            crosses = cross(sides, sides.roll(-1, 1))
            # The cross product at a corner is twice the area of its triangle; two opposite triangles fill the shape.
            area = (crosses[:, 0] + crosses[:, 2]) / 2
            rejected = (crosses <= 0).any(dim=1) | (area < 4 / 3)
        # From output to input: back to the original corners.
        return quadrilateral(corners).inverse()


class Clutter(NamedTuple):
    """Places of ``k`` patches in each of ``n`` images.

    Args:
        digit: index of the digit that a patch is cut from, ``(n, k)``.
        source: top and left in that digit, ``(n, k, 2)``.
        target: top and left in the new image, ``(n, k, 2)``.
    """

    digit: Tensor
    source: Tensor
    target: Tensor


class MNISTDistortion(Distortion):
    """One of the tasks (Jaderberg et al. 2015, section 4.1 and appendix A.4), in whole grey levels.

    The paper does not define all details; an asterisk marks our choices.

    - ``R``: rotated by up to 90 degrees either way, 28 x 28.
    - ``RTS``: rotated by up to 45 degrees, scaled by 0.7 to 1.2, placed in 42 x 42: uniformly*, with the centre up to 7
      pixels off*, so that hardly any ink is lost.
    - ``P``: scaled by 0.75 to 1*, then each corner moved normally by 5 pixels* (drawn again if the corners are not in
      convex order, or less than a third of the area is left*), 28 x 28.
    - ``E``: a thin-plate spline on a regular 4 x 4 grid, from border to border*, whose points move normally by 1.5
      pixels, 28 x 28.
    - ``TC``: placed uniformly by whole pixels* in 60 x 60, with 6 patches of 6 x 6 pixels* cut from the inner 20 x 20
      of other digits, placed anywhere*, the brighter pixel on top*.

    All sampling is bilinear*.

    Args:
        task: name of the task in the paper.
    """

    sizes: ClassVar[dict[Task, int]] = {"R": 28, "RTS": 42, "P": 28, "E": 28, "TC": 60}

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.size = self.sizes[task]
        self.patches = 6 if task == "TC" else 0
        parts: dict[Task, Sequence[nn.Module]] = {
            "R": [RandomAffine(rotate=90)],
            "RTS": [RandomAffine(rotate=45, scale=(0.7, 1.2)), RandomAffine(shift=7 / 42)],
            "P": [RandomAffine(scale=(0.75, 1.0)), RandomCorners(sigma=5 / DIGIT_SIDE)],
            "E": [RandomElastic(points=4, sigma=1.5 / DIGIT_SIDE)],
            "TC": [RandomCrop(padding=(60 - DIGIT_SIDE) // 2)],
        }
        self.parts = nn.ModuleList(parts[task])

    def draw(self, count: int) -> Composition:
        """Draw the transforms of ``count`` images, at the new size."""
        parts = (part.draw(count, self.size, self.size) for part in self.parts)  # type: ignore[operator]
        return Composition(count).then(*parts)

    def draw_clutter(self, count: int) -> Clutter:
        """Draw the clutter of ``count`` images; each patch is cut from another image."""
        offset = torch.randint(1, max(count, 2), (count, self.patches))
        source = 4 + torch.randint(20 - PATCH_SIDE + 1, (count, self.patches, 2))
        target = torch.randint(self.size - PATCH_SIDE + 1, (count, self.patches, 2))
        return Clutter((torch.arange(count)[:, None] + offset) % count, source, target)

    def distort(self, images: Tensor, transforms: Composition, others: Tensor, clutter: Clutter) -> Tensor:
        """Return the distorted images ``(n, 1, size, size)`` in whole grey levels.

        ``images`` are ``(n, 1, 28, 28)``, 0 to 255. Clutter is cut from the digits ``others`` ``(m, 1, 28, 28)``.
        """
        margin = (self.size - DIGIT_SIDE) // 2
        framed = nn.functional.pad(images, [margin] * 4)
        points = transforms.grid(self.size, self.size, images.device).float()
        distorted = sample(framed, points, self.size, self.size).round().clamp(0, 255)
        steps = torch.arange(PATCH_SIDE, device=images.device)
        image = torch.arange(len(images), device=images.device)[:, None, None]
        for digit, source, target in zip(*(part.to(images.device).unbind(1) for part in clutter), strict=True):
            rows, columns = (start[:, None] + steps for start in source.unbind(1))  # (n, 6)
            patch = others[digit[:, None, None], 0, rows[:, :, None], columns[:, None]]
            rows, columns = (start[:, None] + steps for start in target.unbind(1))
            place = (image, 0, rows[:, :, None], columns[:, None])
            distorted[place] = torch.maximum(distorted[place], patch)
        return distorted

    def forward(self, images: Tensor) -> tuple[Tensor, Composition]:
        """Distort a training batch. Clutter is cut from the other images of the batch."""
        transforms, levels = self.draw(len(images)), (images * 255).round()
        return self.distort(levels, transforms, levels, self.draw_clutter(len(images))) / 255, transforms


class FixedDraws(Views):
    """Random distortions of the images of one split, the same ones every time.

    ``digits`` ``(N, 28, 28, 1)`` are all images of the source. ``indices``, sorted, are those of the split, from which
    clutter is cut. ``draws`` is the number of distortions of each image.
    """

    def __init__(self, distortion: MNISTDistortion, digits: Bytes, indices: Indices, draws: int, seed: int) -> None:
        super().__init__([str(draw + 1) for draw in range(draws)])
        self.distortion, self.digits, self.indices, self.seed = distortion, digits, indices, seed

    @cached_property
    def draws(self) -> list[tuple[Tensor | Spline, Clutter]]:
        """The transforms and the clutter of all images of the split, one pair per view."""
        draws, count = [], len(self.indices)
        with torch.random.fork_rng(devices=[]):
            for view in range(len(self.names)):
                torch.manual_seed(hash((self.seed, view)))
                # Every task is one matrix or one spline per image.
                (transform,) = self.distortion.draw(count).parts
                exact = transform.double() if isinstance(transform, Spline) else transform
                draws.append((exact, self.distortion.draw_clutter(count)))
        return draws  # type: ignore[return-value]  # no other kind of `Points`

    def _places(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.indices, indices.numpy()))

    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        places, views = self._places(indices), []
        for transform, clutter in self.draws:
            chosen = Clutter(*(part[places] for part in clutter))
            # Convert only the digits that patches are cut from.
            sources, digit = torch.unique(chosen.digit, return_inverse=True)
            others = to_tensor(self.digits[self.indices[sources.numpy()]])
            composition = Composition(len(images), (transform[places],))
            views.append(self.distortion.distort(images, composition, others, chosen._replace(digit=digit)))
        return torch.stack(views, dim=1)

    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        """Return the matrices, and the identity for a spline, which does not rotate the image."""
        places = self._places(indices)
        matrices = [
            transform[places] if isinstance(transform, Tensor) else identity(len(places)) for transform, _ in self.draws
        ]
        return torch.stack(matrices, dim=1)


class DistortedMNIST(MNIST):
    """Distorted MNIST: random at every training step, fixed by a seed in validation and test.

    Args:
        task: task of `MNISTDistortion`.
        draws: number of distortions of every validation and test image.
        task_seed: seed of these distortions.
        root: folder of the published files, as in `Published`.
        **options: options of `ImageDataModule`; ``augment`` follows the distortion.
    """

    # Mean and standard deviation of the training images, measured over one epoch.
    statistics: ClassVar[dict[Task, tuple[float, float]]] = {
        "R": (0.1306, 0.2897),
        "RTS": (0.0536, 0.1960),
        "P": (0.0896, 0.2470),
        "E": (0.1299, 0.2884),
        "TC": (0.0468, 0.1953),
    }

    def __init__(
        self, *, task: Task, draws: int = 1, task_seed: int = 0, root: str | None = None, **options: object
    ) -> None:
        if task not in get_args(Task):
            raise UserError(f"task must be one of {', '.join(get_args(Task))}; got '{task}'.")
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}.")
        super().__init__(root=root, **options)  # type: ignore[arg-type]  # the base's own types
        if self.angles != (0.0,):
            raise UserError(f"The task defines the distortion, so angles must be [0], got {self.angles}.")
        self.task, self.distortion, self.draws, self.task_seed = task, MNISTDistortion(task), draws, task_seed
        self.augmentation = Augmentation([self.distortion, *self.augmentation.parts], padding=self.augmentation.padding)
        self._views: dict[str, FixedDraws] = {}

    @property
    def spec(self) -> ImageSpec:
        size, (mean, std) = self.distortion.size, self.statistics[self.task]
        return replace(super().spec, height=size, width=size, mean=(mean,), std=(std,))

    @property
    def stored_size(self) -> tuple[int, int]:
        return DIGIT_SIDE, DIGIT_SIDE

    def views(self, split: str) -> Views:
        """Return training images as they are, and the fixed draws of the others."""
        if split == "train":
            return super().views(split)
        if split not in self._views:
            digits = self.source.images
            self._views[split] = FixedDraws(self.distortion, digits, self.splits[split], self.draws, self.task_seed)  # type: ignore[arg-type]  # an array
        return self._views[split]
