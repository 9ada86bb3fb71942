"""Spatial transformer networks (Jaderberg, Simonyan, Zisserman, Kavukcuoglu 2015, arXiv:1506.02025).

The idea: a small network looks at the image and says how to turn it, and a differentiable sampler turns it before it is
classified; both are trained by the classification alone.

What differs from the paper: the regression layer is our own, behind any localisation network, and starts at zero, so
that every transformer starts exactly at the identity; sampling points are one matrix product; border pixels follow
``align_corners=False``. ``rotation`` and ``similarity`` are not in the paper's list: a rotated digit needs no more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from upright.architectures.layers import check_size, choice
from upright.architectures.transforms import MATRIX_TRANSFORMS, ThinPlate, TransformName
from upright.warp import Padding, Sampling, full_precision, pixel_centres, sample

Shape = tuple[int, int, int]
Network = Callable[[Shape, int], nn.Module]
"""A network to be: completed with ``(input_shape, num_classes)``."""


class ConvLocaliser(nn.Module):
    """The paper's for images (appendix A): half the size, two 5 x 5 convolutions with pooling, one linear layer.

    Args:
        input_shape: ``(C, H, W)``, at least 8 x 8.
        num_outputs: features it ends in.
        width: maps of each convolution.
    """

    def __init__(self, input_shape: Shape, num_outputs: int, *, width: int = 20) -> None:
        super().__init__()
        check_size(self, input_shape, 8)
        channels, height, columns = input_shape
        self.layers = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(channels, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(width * (height // 8) * (columns // 8), num_outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class DenseLocaliser(nn.Module):
    """The paper's for fully connected networks (appendix A), and for feature maps too small to convolve.

    Args:
        input_shape: ``(C, H, W)``.
        num_outputs: features it ends in.
        widths: units of the hidden layers.
    """

    def __init__(self, input_shape: Shape, num_outputs: int, *, widths: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        channels, height, columns = input_shape
        self.layers = nn.Sequential(nn.Flatten())
        inputs = channels * height * columns
        for width in widths:
            self.layers.extend([nn.Linear(inputs, width), nn.ReLU()])
            inputs = width
        self.layers.append(nn.Linear(inputs, num_outputs))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class SpatialTransformer(nn.Module):
    """Localise, make sampling points, sample.

    ``theta`` ``(B, P)`` is zero at the identity; `upright.architectures.transforms` says what it means.

    Args:
        input_shape: ``(C, H, W)`` of the images or feature maps that it turns.
        transform: what it may do.
        control_points: of the thin-plate spline, per axis.
        localiser: any module from ``(input_shape, num_outputs)``.
        features: number of features between the localiser and the regression of ``theta``.
        sampling: how values between pixels are made; ``nearest`` gives the localiser no gradient.
        padding: what is seen beyond the border.
        output_size: ``(H, W)`` of what it gives, the input's by default. Where that is smaller, several points per
            pixel are averaged, as the paper does behind its transformer, so that nothing aliases.
        start: ``theta`` before any training, where that is not the identity, as for parallel transformers that are
            laid out over the image.
        lr_factor: its learning rate, as a multiple of the network's.
    """

    def __init__(
        self,
        input_shape: Shape,
        *,
        transform: TransformName = "affine",
        control_points: int = 4,
        localiser: Network = ConvLocaliser,
        features: int = 32,
        sampling: Sampling = "bilinear",
        padding: Padding = "zeros",
        output_size: tuple[int, int] | None = None,
        start: Sequence[float] | None = None,
        lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        rows, columns = output_size or (height, width)
        if min(rows, columns) < 1:
            raise ValueError(f"output_size must be at least 1x1, got {rows}x{columns}.")
        self.sampling, self.padding, self.lr_factor = sampling, padding, lr_factor
        self.output_shape: Shape = (channels, rows, columns)
        choice("transform", transform, get_args(TransformName))
        choice("sampling", sampling, get_args(Sampling))
        choice("padding", padding, get_args(Padding))
        self.transform: nn.Module
        if transform == "thin_plate":
            self.transform = ThinPlate(control_points)
        else:
            self.transform = MATRIX_TRANSFORMS[transform](width / height)
        size = int(self.transform.size)
        if start is not None and len(start) != size:
            raise ValueError(f"start needs {size} numbers for '{transform}', got {len(start)}.")
        self.localisation = nn.Sequential(
            localiser(input_shape, features), nn.ReLU(), Regression(features, start or [0.0] * size)
        )

    def points(self, theta: Tensor, reference: Tensor) -> Tensor:
        """Where ``theta`` ``(B, P)`` samples the input for output points ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``."""
        with full_precision(theta.device):
            points: Tensor = self.transform(theta.float(), reference)
        return points

    def look(self, images: Tensor, where: Callable[[Tensor], Tensor]) -> Tensor:
        """``images`` ``(B, C, H, W)`` sampled ``where`` the points ``(N, 2)`` of the output lie: ``(B, C, H', W')``.

        Where the output has fewer pixels, several points of each are averaged.
        """
        _, rows, columns = self.output_shape
        shrink = (-(-images.shape[-2] // rows), -(-images.shape[-1] // columns))
        grid = pixel_centres(rows * shrink[0], columns * shrink[1], device=images.device)
        return sample(images.float(), where(grid), rows, columns, self.padding, self.sampling, shrink)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` turned: ``(B, C, H', W')``."""
        theta = self.localisation(images)
        return observed(self, theta, lambda: self.look(images, partial(self.points, theta)))


class Regression(nn.Linear):
    """From features to ``theta``; says ``start`` whatever it sees, until it is trained."""

    starts_fixed = True

    def __init__(self, features: int, start: Sequence[float]) -> None:
        super().__init__(features, len(start))
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(start))


@dataclass(eq=False)
class Observation:
    """What one transformer did in one forward pass.

    Args:
        transformer: which one.
        theta: what it said, ``(B, P)``.
        turned: what it gave, ``(B, C, H', W')``; nothing where the pass was stopped before.
        before: what was done before to what it looked at.
    """

    transformer: SpatialTransformer
    theta: Tensor
    turned: Tensor
    before: "Observation | None"

    def points(self, reference: Tensor) -> Tensor:
        """Where, in the first transformer's input, ``reference`` points ``(N, 2)`` of this one's output lie."""
        points = self.transformer.points(self.theta, reference)
        return self.before.points(points) if self.before else points

    def view(self, images: Tensor) -> Tensor:
        """What it sees of the ``images`` ``(B, C, H, W)`` that came in, at the size of what it gives.

        For a transformer on images that is `turned`; for one inside a network, what its feature maps are of.
        """
        return self.transformer.look(images, self.points)


def last_of(seen: list[Observation]) -> list[Observation]:
    """Those after which nothing more was done: one, or one for each of parallel transformers."""
    followed = {id(observation.before) for observation in seen}
    return [observation for observation in seen if id(observation) not in followed]


@dataclass
class _Observer:
    seen: list[Observation]
    stop_after: int | None
    before: Observation | None = None


class _SeenEnough(Exception):
    pass


_observer: ContextVar[_Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observing(stop_after: int | None = None) -> Iterator[list[Observation]]:
    """Collect what every spatial transformer does in the forward passes inside the ``with``, in order.

    Args:
        stop_after: leave the ``with`` block as soon as that many have said their ``theta``, without sampling for the
            last of them or running what comes after it.
    """
    observer = _Observer([], stop_after)
    token = _observer.set(observer)
    try:
        yield observer.seen
    except _SeenEnough:
        pass
    finally:
        _observer.reset(token)


def observed(transformer: SpatialTransformer, theta: Tensor, turn: Callable[[], Tensor]) -> Tensor:
    """What ``turn`` gives, with a note of it for whoever observes."""
    observer = _observer.get()
    if observer is None:
        return turn()
    last = len(observer.seen) + 1 == observer.stop_after
    turned = theta.new_empty(0) if last else turn()
    observer.before = Observation(transformer, theta, turned, observer.before)
    observer.seen.append(observer.before)
    if last:
        raise _SeenEnough
    return turned


def branch(module: nn.Module, images: Tensor) -> Tensor:
    """``module(images)``, as one of several on the same images: none follows what another one did."""
    observer = _observer.get()
    before = observer.before if observer else None
    found: Tensor = module(images)
    if observer:
        observer.before = before
    return found
