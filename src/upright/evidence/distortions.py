"""Trained networks under a known distortion of their test images: shifted, turned, larger or smaller."""

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

AT_ONCE = 256

Kinds = Mapping[str, Mapping[float, Sequence[Tensor]]]
"""Name of a distortion, to how much, to matrices ``(3, 3)`` of which the mean is taken: to the left, to the right."""


class Curve(NamedTuple):
    """How a network does, a number for each amount of a distortion.

    Args:
        accuracy: share of the images that are right.
        consistency: share of the images that are taken for what they are taken for undistorted, right or wrong.
    """

    accuracy: list[float]
    consistency: list[float]


def shift(right: float, down: float, size: int) -> Tensor:
    """The matrix that moves what is seen in ``size`` x ``size`` by so many pixels."""
    matrix = identity(1)[0].clone()
    matrix[:2, 2] = -2 * torch.tensor([right, down]) / size
    return matrix


def turn(degrees: float) -> Tensor:
    """The matrix that turns what is seen in a square anticlockwise."""
    return rotation(torch.tensor([math.radians(degrees)]))[0]


def zoom(factor: float) -> Tensor:
    """The matrix that makes what is seen so many times as large."""
    return torch.diag(torch.tensor([1 / factor, 1 / factor, 1.0]))


def curves(bench: Bench, runs: Sequence[Run], kinds: Kinds, every: int = 1) -> list[dict[str, Curve]]:
    """What each run's network makes of its test images under each kind of distortion.

    Args:
        bench: which shares the work out.
        runs: with data whose images have the network's size.
        kinds: what is done to the images.
        every: so many-th image of the test split is shown.
    """
    return bench.map(_curves, [(run.folder, kinds, every) for run in runs])


@torch.no_grad()
def _curves(folder: Path, kinds: Kinds, every: int) -> dict[str, Curve]:
    classifier, data, _ = restore(folder / "best.ckpt")
    chosen = data.splits["test"][::every]
    counts = {kind: torch.zeros(len(amounts), 2) for kind, amounts in kinds.items()}
    for some in np.array_split(chosen, math.ceil(len(chosen) / AT_ONCE)):
        images = to_tensor(np.stack([data.source.images[index] for index in some]))
        labels = torch.tensor([data.source.labels[index] for index in some])
        plain = classifier(images).argmax(1)
        for kind, amounts in kinds.items():
            for place, matrices in enumerate(amounts.values()):
                for matrix in matrices:
                    given = classifier(warp(images, matrix.expand(len(images), 3, 3)).round()).argmax(1)
                    same = torch.stack([(given == labels).sum(), (given == plain).sum()])
                    counts[kind][place] += same / len(matrices)
    return {kind: Curve(*(found / len(chosen)).T.tolist()) for kind, found in counts.items()}
