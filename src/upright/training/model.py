"""Module that training, evaluation and export share: resize -> normalise -> network -> logits."""

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

    def __init__(self, spec: ImageSpec, network: nn.Module) -> None:
        super().__init__()
        # In this layout, convolutions took 0.55 to 0.95 of the time (CPU, one thread, LeNet to ResNet-18).
        self.spec, self.network = spec, network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Not part of the weights, because the checkpoint holds the spec.
        self.register_buffer("mean", 255 * torch.tensor(spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std)[:, None, None], persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Resize and normalise images ``(B, C, h, w)`` of any size, values 0 to 255, for the network."""
        size, input_size = (self.spec.height, self.spec.width), images.shape[-2:]
        # A branch on a symbolic size cannot be exported; at equal size resizing changes no bit.
        if self.spec.resize != "none" and (any(isinstance(n, torch.SymInt) for n in input_size) or input_size != size):
            images = resize(images.float(), *size, self.spec.resize)
        return (images - self.mean) / self.std

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Return normalised images with their original values, 0 to 255."""
        return normalised * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, h, w)`` of any size, values 0 to 255 (uint8 or float), to logits ``(B, K)``."""
        logits: Tensor = self.network(self.normalise(images))
        return logits
