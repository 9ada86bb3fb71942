"""Module that training, evaluation and export share: resize -> normalise -> mask -> network -> logits."""

import torch
from torch import Tensor, nn

from upright.images import ImageSpec
from upright.warp import resize


class Model(nn.Module):
    """A network with its preprocessing inside.

    Args:
        spec: shape, classes and normalisation of an image.
        network: maps normalised images ``(B, C, H, W)`` to logits ``(B, K)``.
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

    def normalise(self, images: Tensor) -> Tensor:
        """Resize, normalise and mask images ``(B, C, h, w)`` of any size, values 0 to 255, for the network."""
        spec, input_size = self.spec, images.shape[-2:]
        size = spec.height, spec.width
        # A branch on a symbolic size cannot be exported; at equal size resizing changes no bit.
        if spec.resize != "none" and (any(isinstance(n, torch.SymInt) for n in input_size) or input_size != size):
            images = resize(images.float(), *size, spec.resize, spec.background, spec.interpolation)
        normalised = (images - self.mean) / self.std
        return normalised if self.mask is None else normalised * self.mask

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Return normalised images with their original values, 0 to 255; outside of a mask, with the mean."""
        return normalised * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, h, w)`` of any size, values 0 to 255 (uint8 or float), to logits ``(B, K)``."""
        logits: Tensor = self.network(self.normalise(images))
        return logits


def disc(height: int, width: int) -> Tensor:
    """Return the weights ``(H, W)`` of a centred disc: 1 inside, 0 outside, with an edge of one pixel between them.

    The edge ends at the centres of the outermost pixels. Within it, a rotation around the centre never interpolates
    with the padding, so neither the corners nor the edge depend on the angle.
    """
    radius = (min(height, width) - 1) / 2
    y, x = (torch.arange(length) - (length - 1) / 2 for length in (height, width))
    # The sums of squares are exact, so the disc has exactly the symmetries of a square.
    return (radius - (y.square()[:, None] + x.square()).sqrt()).clamp(0, 1)
