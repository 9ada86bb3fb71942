"""The distorted MNIST tasks of the spatial transformer paper."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from upright.data.augmentation import (
    CORNERS,
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

SIDE = 28
"""Of a digit's own image."""
PATCH = 6
"""Side of a piece of clutter."""


class RandomCorners(Geometric):
    """The image's corners, each moved to a normally distributed place.

    They are drawn again where they are in no convex order, or span less than a third of the image.

    Args:
        sigma: standard deviation, along x and along y, as a fraction of the image.
    """

    def __init__(self, *, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def draw(self, batch: int, height: int, width: int) -> Tensor:
        """See `Geometric.draw`."""
        drawn = CORNERS.expand(batch, 4, 2).clone()
        again = torch.ones(batch, dtype=torch.bool)
        while again.any():
            drawn[again] = CORNERS + 2 * self.sigma * torch.randn(int(again.sum()), 4, 2)
            sides = drawn.roll(-1, 1) - drawn
            turns = cross(sides, sides.roll(-1, 1))
            # Each corner's turn is twice the area of the triangle there; opposite ones make the whole.
            area = (turns[:, 0] + turns[:, 2]) / 2
            again = (turns <= 0).any(dim=1) | (area < 4 / 3)
        # From output to input: back to where the corners were.
        return quadrilateral(drawn).inverse()


class Clutter(NamedTuple):
    """Which patches are put where, for ``n`` images of ``k`` patches each.

    Args:
        digit: that each is cut from, ``(n, k)``.
        source: its top and left there, ``(n, k, 2)``.
        target: its top and left in the new image, ``(n, k, 2)``.
    """

    digit: Tensor
    source: Tensor
    target: Tensor

    def some(self, chosen: Tensor) -> "Clutter":
        """Those of some of the images."""
        return Clutter(*(part[chosen] for part in self))


class MNISTDistortion(Distortion):
    """One of the tasks (Jaderberg et al. 2015, section 4.1 and appendix A.4), as whole grey levels.

    The paper gives the ranges, not all of the rest. What was chosen here is marked with an asterisk.

    - ``R``: turned by up to 90 degrees either way, 28 x 28.
    - ``RTS``: turned by up to 45 degrees, scaled by 0.7 to 1.2, placed in 42 x 42: uniformly*, its middle up to 7
      pixels off*, so that hardly any ink is lost.
    - ``P``: scaled by 0.75 to 1*, then the corners moved, normally by 5 pixels* (drawn again where they come to lie in
      no convex order, or so that less than a third of the area is left*), 28 x 28.
    - ``E``: a thin-plate spline on a regular 4 x 4 grid, from border to border*, its points moved normally by 1.5
      pixels, 28 x 28.
    - ``TC``: placed uniformly by whole pixels* in 60 x 60, with 6 patches of 6 x 6 pixels* cut from the inner 20 x 20
      of other digits, anywhere*, the brighter pixel on top*.

    All sampling is bilinear*.

    Args:
        task: its letters in the paper.
    """

    sizes: ClassVar[dict[Task, int]] = {"R": 28, "RTS": 42, "P": 28, "E": 28, "TC": 60}

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.size = self.sizes[task]
        self.patches = 6 if task == "TC" else 0
        parts: dict[Task, Sequence[nn.Module]] = {
            "R": [RandomAffine(rotate=90)],
            "RTS": [RandomAffine(rotate=45, scale=(0.7, 1.2)), RandomAffine(shift=7 / 42)],
            "P": [RandomAffine(scale=(0.75, 1.0)), RandomCorners(sigma=5 / SIDE)],
            "E": [RandomElastic(points=4, sigma=1.5 / SIDE)],
            "TC": [RandomCrop(padding=(60 - SIDE) // 2)],
        }
        self.parts = nn.ModuleList(parts[task])

    def draw(self, count: int) -> Composition:
        """Transforms of ``count`` images, at the new size."""
        parts = (part.draw(count, self.size, self.size) for part in self.parts)  # type: ignore[operator]
        return Composition(count).then(*parts)

    def draw_clutter(self, count: int) -> Clutter:
        """Clutter of ``count`` images, each patch cut from one of the others."""
        further = torch.randint(1, max(count, 2), (count, self.patches))
        source = 4 + torch.randint(20 - PATCH + 1, (count, self.patches, 2))
        target = torch.randint(self.size - PATCH + 1, (count, self.patches, 2))
        return Clutter((torch.arange(count)[:, None] + further) % count, source, target)

    def make(self, images: Tensor, transforms: Composition, others: Tensor, clutter: Clutter) -> Tensor:
        """The distorted images ``(n, 1, size, size)``, whole grey levels.

        Args:
            images: ``(n, 1, 28, 28)``, 0 to 255.
            transforms: of these.
            others: digits ``(m, 1, 28, 28)`` that clutter is cut from.
            clutter: of these images.
        """
        margin = (self.size - SIDE) // 2
        framed = nn.functional.pad(images, [margin] * 4)
        points = transforms.grid(self.size, self.size, images.device).float()
        made = sample(framed, points, self.size, self.size).round().clamp(0, 255)
        steps = torch.arange(PATCH, device=images.device)
        whose = torch.arange(len(images), device=images.device)[:, None, None]
        for digit, source, target in zip(*(part.to(images.device).unbind(1) for part in clutter), strict=True):
            rows, columns = (start[:, None] + steps for start in source.unbind(1))  # (n, 6)
            patch = others[digit[:, None, None], 0, rows[:, :, None], columns[:, None]]
            rows, columns = (start[:, None] + steps for start in target.unbind(1))
            place = (whose, 0, rows[:, :, None], columns[:, None])
            made[place] = torch.maximum(made[place], patch)
        return made

    def forward(self, images: Tensor) -> tuple[Tensor, Composition]:
        """See `Distortion.forward`; clutter is cut from the other images of the batch."""
        transforms, levels = self.draw(len(images)), (images * 255).round()
        return self.make(levels, transforms, levels, self.draw_clutter(len(images))) / 255, transforms


class Drawn(Views):
    """Images distorted at random, the same way every time.

    Args:
        distortion: what is done.
        digits: all images of the source, uint8 ``(N, 28, 28, 1)``.
        indices: those of the split, sorted; clutter is cut from them.
        draws: how often each is distorted.
        seed: of the draws.
    """

    def __init__(self, distortion: MNISTDistortion, digits: Bytes, indices: Indices, draws: int, seed: int) -> None:
        super().__init__([str(draw + 1) for draw in range(draws)])
        self.distortion, self.digits, self.indices, self.seed = distortion, digits, indices, seed

    @functools.cached_property
    def drawn(self) -> list[tuple[Composition, Clutter]]:
        """For each view, the transforms and the clutter of every image of the split."""
        found, count = [], len(self.indices)
        with torch.random.fork_rng(devices=[]):
            for view in range(len(self.names)):
                torch.manual_seed(hash((self.seed, view)))
                parts = self.distortion.draw(count).parts
                exact = Composition(count, tuple(p.double() if isinstance(p, Spline) else p for p in parts))
                found.append((exact, self.distortion.draw_clutter(count)))
        return found

    def _places(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.indices, indices.numpy()))

    def show(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `Views.show`."""
        places, shown = self._places(indices), []
        for transforms, clutter in self.drawn:
            parts = tuple(part[places] for part in transforms.parts)  # type: ignore[index]  # a tensor, or a Spline
            chosen = clutter.some(places)
            # Only the digits that are cut from.
            whose, digit = torch.unique(chosen.digit, return_inverse=True)
            others = to_tensor(self.digits[self.indices[whose.numpy()]])
            composition = Composition(len(images), parts)
            shown.append(self.distortion.make(images, composition, others, chosen._replace(digit=digit)))
        return torch.stack(shown, dim=1)

    def transforms(self, indices: Tensor, aspects: Tensor) -> Tensor:
        """See `Views.transforms`; a spline turns nothing, and is given as the identity."""
        places, found = self._places(indices), []
        for transforms, _ in self.drawn:
            (part,) = transforms.parts
            found.append(part[places] if isinstance(part, Tensor) else identity(len(places)))
        return torch.stack(found, dim=1)


class DistortedMNIST(MNIST):
    """MNIST, distorted: in training anew at every step, in validation and test fixed by a seed.

    Args:
        task: see `MNISTDistortion`.
        draws: how many times every image of validation and test is distorted, each in its own way.
        task_seed: of these.
        root: see `Published`.
        **options: see `ImageDataModule`; parts of ``augment`` come after the distortion.
    """

    # Mean and deviation of the training images, measured over one epoch.
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
            raise UserError(f"The task says what is done to an image, so angles must be [0], got {self.angles}.")
        self.distortion, self.draws, self.task_seed = MNISTDistortion(task), draws, task_seed
        self.augmentation.parts.insert(0, self.distortion)
        mean, std = self.statistics[task]
        self._spec = replace(super().spec, height=self.size, width=self.size, mean=(mean,), std=(std,))
        self._drawn = functools.cache(self._draw)

    @property
    def size(self) -> int:
        """Height and width of a distorted image."""
        return self.distortion.size

    @property
    def spec(self) -> ImageSpec:
        """Grey, 0 to 9, at the task's size."""
        return self._spec

    @property
    def stored_size(self) -> tuple[int, int]:
        """Of the digits that training distorts."""
        return SIDE, SIDE

    def views(self, split: str) -> Views:
        """Training images as they are; of the others, the draws."""
        return super().views(split) if split == "train" else self._drawn(split)

    def _draw(self, split: str) -> Drawn:
        return Drawn(self.distortion, self.source.images, self.splits[split], self.draws, self.task_seed)  # type: ignore[arg-type]  # an array
