"""MixUp and CutMix: mix each image with its neighbour in the batch, and the targets by the share of each image.

The order of the training images is random, so a neighbour is a random other image.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from upright.errors import UserError


class Mixing(nn.Module, ABC):
    """A mixture of images and of their targets.

    Args:
        alpha: both parameters of the Beta distribution from which each image's share is drawn. At 1 it is uniform; a
            smaller value changes most images very little.
        probability: probability that an image is mixed.
    """

    def __init__(self, *, alpha: float, probability: float = 1.0) -> None:
        super().__init__()
        if not alpha > 0:
            raise UserError(f"alpha must be above 0, got {alpha}.")
        if not 0 <= probability <= 1:
            raise UserError(f"probability must be from 0 to 1, got {probability}.")
        self.alpha, self.probability = alpha, probability

    def forward(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mix float images ``(B, C, H, W)`` and, if they are given, probabilities ``(B, K)``."""
        if targets is not None and targets.dim() == 1:
            raise UserError(
                f"{type(self).__name__} needs targets as probabilities (B, K), got labels {tuple(targets.shape)}: "
                "give torch.nn.functional.one_hot(labels, K).float()."
            )
        batch = len(images)
        is_mixed = torch.rand(batch) < self.probability
        concentration = torch.full((batch,), self.alpha)
        shares = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
        images, shares = self.mix(images, images.roll(1, 0), torch.where(is_mixed, shares, 1.0))
        if targets is not None:
            targets = targets.roll(1, 0).lerp(targets, shares.to(targets)[:, None])
        return images, targets

    @abstractmethod
    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``images`` mixed with ``others``, and the actual shares ``(B,)`` of the former.

        Args:
            images: the images, ``(B, C, H, W)``.
            others: the images to mix in, ``(B, C, H, W)``.
            shares: requested shares of ``images``, ``(B,)``, on the CPU; 1 does not change an image.
        """


class MixUp(Mixing):
    """Weighted mean of both images (Zhang et al. 2018, arXiv:1710.09412), with one share for every pair.

    Args:
        alpha: see `Mixing`; the paper uses 0.1 to 0.4 on ImageNet and 1 on CIFAR.
        probability: probability that an image is mixed.
    """

    def __init__(self, *, alpha: float = 0.2, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, probability=probability)

    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        return others.lerp(images, shares.to(images)[:, None, None, None]), shares


class CutMix(Mixing):
    """A box of pixels from the other image (Yun et al. 2019, arXiv:1905.04899), one box per pair.

    The box has the aspect ratio of the image, and its centre is anywhere in the image. It is clipped at the border; the
    target counts the pixels that are replaced.

    Args:
        alpha: see `Mixing`; the paper uses 1.
        probability: probability that an image is mixed.
    """

    def __init__(self, *, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, probability=probability)

    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        half = (1 - shares).sqrt() / 2
        rows, columns = (
            _between(middle - half, middle + half, length)
            for middle, length in zip(torch.rand(2, len(images)), images.shape[-2:], strict=True)
        )  # (B, H), (B, W)
        area = rows.float().mean(dim=1) * columns.float().mean(dim=1)
        box = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
        return torch.where(box, others, images), 1 - area


def _between(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Return a mask ``(B, length)`` of pixels with centres from ``start`` to ``end``, in fractions of ``length``."""
    centres = (torch.arange(length) + 0.5) / length
    return (start[:, None] <= centres) & (centres < end[:, None])
