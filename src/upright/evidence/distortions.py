"""Distort images by known matrices, and measure the accuracy of trained networks on them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from upright.data.cache import to_tensor
from upright.evidence.bench import Run
from upright.training.restoring import restore
from upright.warp import identity, rotation, warp

CHUNK = 256
"""Images per batch."""

MEASURES = ("accuracy", "consistency")
Kinds = Mapping[str, Mapping[float, Sequence[Tensor]]]
"""Matrices ``(3, 3)`` by name of the distortion, then by strength. Results are averaged over the matrices of a
strength, such as a rotation to the left and to the right."""
Curves = dict[str, dict[str, list[float]]]
"""A number per strength, by name of the distortion, then by name of the measure."""


def shift(right: float, down: float, height: int, width: int) -> Tensor:
    """Return the matrix ``(3, 3)`` that moves the content of a ``height`` x ``width`` image by pixels."""
    matrix = identity(1)[0].clone()
    matrix[:2, 2] = -2 * torch.tensor([right / width, down / height])
    return matrix


def rotate(degrees: float, aspect: float = 1.0) -> Tensor:
    """Return the matrix ``(3, 3)`` that rotates the content anticlockwise; ``aspect`` is width / height."""
    return rotation(torch.tensor([math.radians(degrees)]), aspect)[0]


def zoom(factor: float) -> Tensor:
    """Return the matrix ``(3, 3)`` that enlarges the content by ``factor``."""
    return torch.diag(torch.tensor([1 / factor, 1 / factor, 1.0]))


@torch.no_grad()
def curves(run: Run, kinds: Kinds, every: int = 1) -> Curves:
    """Measure ``accuracy`` and ``consistency`` of a run's network on every n-th of its test images, distorted.

    Consistency is the share of predictions that equal the prediction for the undistorted image, correct or not. The
    images must have the network's size, because they are not resized.
    """
    classifier, data, *_ = restore(run.folder / "best.ckpt")
    indices = data.splits["test"][::every]
    counts = {kind: torch.zeros(len(strengths), 2) for kind, strengths in kinds.items()}
    for chunk in np.array_split(indices, math.ceil(len(indices) / CHUNK)):
        images = to_tensor(np.stack([data.source.images[index] for index in chunk]))
        labels = torch.tensor([data.source.labels[index] for index in chunk])
        undistorted = classifier(images).argmax(1)
        for kind, strengths in kinds.items():
            for strength_index, matrices in enumerate(strengths.values()):
                for matrix in matrices:
                    predictions = classifier(warp(images, matrix.expand(len(images), 3, 3)).round()).argmax(1)
                    matches = torch.stack([(predictions == labels).sum(), (predictions == undistorted).sum()])
                    counts[kind][strength_index] += matches / len(matrices)
    return {kind: dict(zip(MEASURES, (count / len(indices)).T.tolist(), strict=True)) for kind, count in counts.items()}
