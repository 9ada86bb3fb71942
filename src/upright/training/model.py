"""Module that training, evaluation and export share: resize -> normalise -> mask -> network -> logits -> answers."""

import math

import torch
from torch import Tensor, nn

from upright.architectures.voting import near_peak
from upright.images import ImageSpec
from upright.warp import disc, resize


class Model(nn.Module):
    """A network with its preprocessing inside.

    Args:
        spec: shape, classes and normalisation of an image.
        network: maps normalised images ``(B, C, H, W)`` to logits ``(B, K)``. Without classes, these are the scores of
            ``K`` rotations, see `orientation`.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None

    def __init__(self, spec: ImageSpec, network: nn.Module) -> None:
        super().__init__()
        # In this layout, convolutions took 0.55 to 0.95 of the time (CPU, one thread, LeNet to ResNet-18).
        self.spec, self.network = spec, network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Not part of the weights, because the checkpoint holds the spec.
        self.register_buffer("mean", 255 * torch.tensor(spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std)[:, None, None], persistent=False)
        mask = disc(spec.height, spec.width) if spec.mask == "disc" else None
        self.register_buffer("mask", mask, persistent=False)

    def normalise(self, images: Tensor, *, masked: bool = True) -> Tensor:
        """Resize, normalise and mask images ``(B, C, h, w)`` of any size, values 0 to 255, for the network."""
        spec, input_size = self.spec, images.shape[-2:]
        size = spec.height, spec.width
        # A branch on a symbolic size cannot be exported; at equal size resizing changes no bit.
        if spec.resize != "none" and (any(isinstance(n, torch.SymInt) for n in input_size) or input_size != size):
            images = resize(images.float(), *size, spec.resize, spec.background, spec.interpolation)
        normalised = (images - self.mean) / self.std
        return normalised if self.mask is None or not masked else normalised * self.mask

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Return normalised images with their original values, 0 to 255; outside of a mask, with the mean."""
        return normalised * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, h, w)`` of any size, values 0 to 255 (uint8 or float), to logits ``(B, K)``."""
        logits: Tensor = self.network(self.normalise(images))
        return logits

    def answers(self, logits: Tensor) -> Tensor:
        """Return the main output of a deployed model: probabilities ``(B, K)``, or `orientation` ``(B, 2)``."""
        if self.spec.task == "multilabel":
            return logits.sigmoid()
        return logits.softmax(dim=1) if self.spec.classes else orientation(logits)


def orientation(scores: Tensor) -> Tensor:
    """Return the angle and the confidence of images, ``(B, 2)``, from the scores of rotations ``(B, N)``.

    Score ``k`` is that of a rotation by ``k * 360 / N`` degrees anticlockwise. The softmax of the scores are the votes.
    The angle, from -180 to 180 degrees, is the mean direction of the votes less than 45 degrees from their peak, see
    `near_peak`. The confidence, from 0 to 1, is the share of these votes.
    """
    counted = near_peak(scores.softmax(dim=1))
    angles = 2 * math.pi * torch.arange(scores.shape[1], device=scores.device) / scores.shape[1]
    x, y = (counted @ torch.stack([angles.cos(), angles.sin()], dim=1).to(scores.dtype)).unbind(dim=1)
    # Rounding can lift a sum above 1, and torchmetrics then takes all confidences for logits.
    return torch.stack([torch.atan2(y, x).rad2deg(), counted.sum(dim=1).clamp(max=1)], dim=1)
