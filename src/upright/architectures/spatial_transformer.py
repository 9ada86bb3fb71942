"""Spatial transformer networks (Jaderberg, Simonyan, Zisserman, Kavukcuoglu 2015, arXiv:1506.02025).

The idea: a small network looks at the image and says how to turn it, and a differentiable sampler turns it before it is
classified; both are trained by the classification alone.

What differs from the paper: the regression layer is our own, behind any localisation network, and starts at zero, so
that every transformer starts exactly at the identity; sampling points are one matrix product; border pixels follow
``align_corners=False``. The angle of ``rotation`` is not in the paper's list; it is what a rotated digit needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from upright.warp import Padding, pixel_centres, rotation, sample, transform_points

Network = Callable[[tuple[int, int, int], int], nn.Module]
"""A network to be: completed with ``(input_shape, num_classes)``."""


class Localiser(nn.Module):
    """The paper's (appendix A): half the size, two 5 x 5 convolutions with pooling, then a fully connected layer.

    Args:
        input_shape: ``(C, H, W)``, at least 8 x 8.
        num_outputs: features it ends in.
        width: maps of each convolution.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_outputs: int, *, width: int = 20) -> None:
        super().__init__()
        channels, height, columns = input_shape
        if min(height, columns) < 8:
            raise ValueError(f"The localiser needs images of at least 8x8 pixels, got {height}x{columns}.")
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
        """Images ``(B, C, H, W)`` to features ``(B, num_outputs)``."""
        features: Tensor = self.layers(images)
        return features


class SpatialTransformer(nn.Module):
    """Localise, make sampling points, sample.

    ``theta`` ``(B, P)``, zero at the identity: for ``rotation`` the angle in radians (P = 1); for ``affine`` what is
    added to the 2 x 3 matrix of the identity, row by row (P = 6).

    Args:
        input_shape: ``(C, H, W)`` of the images or feature maps it turns; the output has the same.
        transform: what it may do.
        localiser: any module from ``(input_shape, num_outputs)``.
        features: number of features between the localiser and the regression of ``theta``.
        padding: what is seen beyond the border.
        lr_factor: its learning rate, as a multiple of the network's.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        *,
        transform: Literal["rotation", "affine"] = "affine",
        localiser: Network = Localiser,
        features: int = 32,
        padding: Padding = "zeros",
        lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.transform, self.padding, self.lr_factor = transform, padding, lr_factor
        _, height, width = input_shape
        self.aspect = width / height
        regression = nn.Linear(features, {"rotation": 1, "affine": 6}[transform])
        nn.init.zeros_(regression.weight)
        nn.init.zeros_(regression.bias)
        self.localisation = nn.Sequential(localiser(input_shape, features), nn.ReLU(), regression)

    def points(self, theta: Tensor, reference: Tensor) -> Tensor:
        """Where ``theta`` ``(B, P)`` samples the input for output points ``(N, 2)`` or ``(B, N, 2)``: ``(B, N, 2)``."""
        if self.transform == "rotation":
            return transform_points(rotation(theta[:, 0], self.aspect), reference)
        return transform_points(theta.reshape(-1, 2, 3) + torch.eye(2, 3, device=theta.device), reference)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` turned: ``(B, C, H, W)``."""
        theta = self.localisation(images)
        observer = _observer.get()
        if observer and len(observer.seen) + 1 == observer.stop_after:
            observer.seen.append(Observation(self, theta, images))
            raise _SeenEnough
        height, width = images.shape[-2:]
        points = self.points(theta, pixel_centres(height, width, device=images.device))
        turned = sample(images, points, height, width, self.padding)
        if observer:
            observer.seen.append(Observation(self, theta, turned))
        return turned


class TransformerNetwork(nn.Module):
    """A spatial transformer in front of any network.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: ``K``.
        network: the network that sees the turned images.
        transformer: the transformer, completed with ``(input_shape)``.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        network: Network,
        transformer: Callable[[tuple[int, int, int]], nn.Module] = SpatialTransformer,
    ) -> None:
        super().__init__()
        self.transformer = transformer(input_shape)
        self.network = network(input_shape, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, C, H, W)`` to logits ``(B, K)``."""
        logits: Tensor = self.network(self.transformer(images))
        return logits


class Observation(NamedTuple):
    """What one transformer did in one forward pass."""

    transformer: SpatialTransformer
    theta: Tensor
    turned: Tensor


class _Observer(NamedTuple):
    seen: list[Observation]
    stop_after: int | None


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


def composed_points(observations: list[Observation], reference: Tensor) -> Tensor:
    """Where, in the first transformer's input, the last one's output ``reference`` ``(N, 2)`` lies: ``(B, N, 2)``."""
    points = reference
    for seen in reversed(observations):
        points = seen.transformer.points(seen.theta, points)
    return points
