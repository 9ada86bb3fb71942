"""`Batch`, which a loader yields, and `View`, one augmented version of its images."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Points = Callable[[Tensor], Tensor]
"""A map from output points ``(N, 2)`` or ``(B, N, 2)`` to the input points ``(B, N, 2)`` that are sampled there."""


class View(NamedTuple):
    """Augmented images, the origin of their pixels, and their targets.

    Args:
        images: float ``(B, C, H, W)`` in [0, 255].
        transforms: map from points of these images to points of the images before augmentation, without mixing.
        targets: the labels that were passed in, or probabilities ``(B, K)`` if images are mixed.
    """

    images: Tensor
    transforms: Points
    targets: Tensor | None


class Batch(NamedTuple):
    """Images and labels, with positions, transforms and a seed. ``images, labels, *_ = batch`` takes the first two.

    Args:
        images: uint8 ``(B, C, H, W)`` from the loader; float in [0, 255] after augmentation.
        labels: int64 ``(B,)``; 0 and 1 as float ``(B, K)`` if an image has several classes; probabilities ``(B, K)`` if
            augmentation mixes images.
        position: index in the split, int64 ``(B,)``.
        group: index of the source image, int64 ``(B,)``. Several views of one image share it.
        transforms: transform that the source applied to each image, ``(B, 3, 3)``, from output to input coordinates.
        seed: seed of augmentation and dropout; a function of the run's seed, the epoch, the batch and the process.
        views: the augmented views, as many as the LightningModule asks for; ``views[0].images`` is ``images``.
    """

    images: Tensor
    labels: Tensor
    position: Tensor
    group: Tensor
    transforms: Tensor
    seed: int = 0
    views: tuple[View, ...] = ()
