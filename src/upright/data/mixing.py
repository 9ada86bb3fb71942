"""Two images in one, and a target that says how much of each: mixed with the neighbour in the batch.

Training draws its batches at random, so a neighbour is any other image.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from upright.errors import UserError


class Mixing(nn.Module, ABC):
    """Mix images and their targets.

    Args:
        alpha: of the Beta distribution, both parameters, from which each image's share is drawn; 1 is uniform, less
            leaves most images nearly alone.
        probability: that an image is mixed at all.
    """

    def __init__(self, *, alpha: float, probability: float = 1.0) -> None:
        super().__init__()
        if not alpha > 0:
            raise UserError(f"alpha must be above 0, got {alpha}.")
        if not 0 <= probability <= 1:
            raise UserError(f"probability must be from 0 to 1, got {probability}.")
        self.alpha, self.probability = alpha, probability

    def forward(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Float images ``(B, C, H, W)`` and, where they are wanted, probabilities ``(B, K)``, both mixed."""
        if targets is not None and targets.dim() == 1:
            raise UserError(
                f"{type(self).__name__} needs targets as probabilities (B, K), got labels {tuple(targets.shape)}: "
                "give torch.nn.functional.one_hot(labels, K).float()."
            )
        batch = len(images)
        chosen = torch.rand(batch) < self.probability
        concentration = torch.full((batch,), self.alpha)
        shares = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
        images, shares = self.mix(images, images.roll(1, 0), torch.where(chosen, shares, 1.0))
        if targets is not None:
            targets = targets.roll(1, 0).lerp(targets, shares.to(targets)[:, None])
        return images, targets

    @abstractmethod
    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` with ``others`` ``(B, C, H, W)`` in them, and the shares ``(B,)`` that the former really keep.

        Args:
            images: that are mixed.
            others: with these.
            shares: wanted of the former, ``(B,)``, on the CPU; 1 leaves an image as it is.
        """


class MixUp(Mixing):
    """Both images on top of each other (Zhang et al. 2018, arXiv:1710.09412), a share drawn for every pair.

    Args:
        alpha: see `Mixing`; the paper has 0.1 to 0.4 on ImageNet and 1 on CIFAR.
        probability: that an image is mixed at all.
    """

    def __init__(self, *, alpha: float = 0.2, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, probability=probability)

    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixing.mix`."""
        return others.lerp(images, shares.to(images)[:, None, None, None]), shares


class CutMix(Mixing):
    """A box of the other image pasted in (Yun et al. 2019, arXiv:1905.04899), one drawn for every pair.

    The box has the image's aspect and its middle anywhere in it; what hangs over the border is cut off, and the target
    counts the pixels that are pasted.

    Args:
        alpha: see `Mixing`; the paper has 1.
        probability: that an image is mixed at all.
    """

    def __init__(self, *, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, probability=probability)

    def mix(self, images: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixing.mix`."""
        half = (1 - shares).sqrt() / 2
        rows, columns = (
            _between(middle - half, middle + half, length)
            for middle, length in zip(torch.rand(2, len(images)), images.shape[-2:], strict=True)
        )  # (B, H), (B, W)
        pasted = rows.float().mean(dim=1) * columns.float().mean(dim=1)
        box = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
        return torch.where(box, others, images), 1 - pasted


def _between(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Which of ``length`` pixels in a line have their centre from ``start`` to ``end``, fractions of it: ``(B, N)``."""
    centres = (torch.arange(length) + 0.5) / length
    return (start[:, None] <= centres) & (centres < end[:, None])
