"""Matrices of known distortions, and the accuracy of trained networks under them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upright.data.cache import to_tensor
from upright.evidence.bench import Bench, Run
from upright.training.restoring import restore
from upright.warp import identity, rotation, warp

CHUNK = 256
"""Images per batch."""

Kinds = Mapping[str, Mapping[float, Sequence[Tensor]]]
"""Name of a distortion -> strength -> matrices ``(3, 3)`` to average over, such as left and right."""


class Curve(NamedTuple):
    """Measures of a network, one number per strength of a distortion.

    Args:
        accuracy: share of correct answers.
        consistency: share of answers that equal the answer to the undistorted image, right or wrong.
    """

    accuracy: list[float]
    consistency: list[float]


def shift(right: float, down: float, height: int, width: int) -> Tensor:
    """Return the matrix ``(3, 3)`` that moves the content by pixels."""
    matrix = identity(1)[0].clone()
    matrix[:2, 2] = -2 * torch.tensor([right / width, down / height])
    return matrix


def turn(degrees: float, aspect: float = 1.0) -> Tensor:
    """Return the matrix ``(3, 3)`` that rotates the content anticlockwise; ``aspect`` is width / height."""
    return rotation(torch.tensor([math.radians(degrees)]), aspect)[0]


def zoom(factor: float) -> Tensor:
    """Return the matrix ``(3, 3)`` that enlarges the content."""
    return torch.diag(torch.tensor([1 / factor, 1 / factor, 1.0]))


def curves(bench: Bench, runs: Sequence[Run], kinds: Kinds, every: int = 1) -> list[dict[str, Curve]]:
    """Measure each run's network on its distorted test images.

    Args:
        bench: runs the measurements in parallel.
        runs: runs whose images have the network's size.
        kinds: the distortions.
        every: use every n-th image of the test split.
    """
    return bench.map(_curves, [(run.folder, kinds, every) for run in runs])


@torch.no_grad()
def _curves(folder: Path, kinds: Kinds, every: int) -> dict[str, Curve]:
    classifier, data, *_ = restore(folder / "best.ckpt")
    indices = data.splits["test"][::every]
    counts = {kind: torch.zeros(len(strengths), 2) for kind, strengths in kinds.items()}
    for chunk in np.array_split(indices, math.ceil(len(indices) / CHUNK)):
        images = to_tensor(np.stack([data.source.images[index] for index in chunk]))
        labels = torch.tensor([data.source.labels[index] for index in chunk])
        undistorted = classifier(images).argmax(1)
        for kind, strengths in kinds.items():
            for strength_index, matrices in enumerate(strengths.values()):
                for matrix in matrices:
                    answers = classifier(warp(images, matrix.expand(len(images), 3, 3)).round()).argmax(1)
                    matches = torch.stack([(answers == labels).sum(), (answers == undistorted).sum()])
                    counts[kind][strength_index] += matches / len(matrices)
    return {kind: Curve(*(count / len(indices)).T.tolist()) for kind, count in counts.items()}
