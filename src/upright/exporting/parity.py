"""Does an ONNX graph say what PyTorch says, on every original of a real split? Where it does not, what does it lose?"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from tqdm import tqdm

from upright.data.cache import to_tensor
from upright.data.datamodule import ImageDataModule
from upright.data.source import Original
from upright.exporting.graph import Form, Graph
from upright.images import ImageSpec, Pixels, batches_of_one_size
from upright.runtime.predictor import run_batch
from upright.training.model import Model
from upright.warp import resize

Floats = npt.NDArray[np.float64]

OTHER_TOLERANCES = {"theta": 1e-3, "warped": 0.5, "logits": 1e-2, "features": 1e-2}
"""Largest differences of the other outputs: half images and radians, grey levels; of the last two, as a share of the
largest value."""

CALIBRATION_IMAGES = 512
MOST = 64
"""Images that go through at once, where the graph takes any number."""


def fitted(pixels: Pixels, size: tuple[int, int] | None, spec: ImageSpec) -> Pixels:
    """``pixels`` ``(H, W, C)`` as whoever uses a graph of fixed size has to hand them over."""
    if size is None or pixels.shape[:2] == size:
        return pixels
    rule = "stretch" if spec.resize == "none" else spec.resize
    resized = resize(to_tensor(pixels[None]).float(), *size, rule).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def fitted_originals(data: ImageDataModule, split: str, form: Form) -> Iterator[Original]:
    """Originals of a split, at the size that a graph of this form takes."""
    for original in data.originals(split):
        yield original._replace(pixels=fitted(original.pixels, form.size, data.spec))


def calibration_batches(
    data: ImageDataModule, judges: torch.Tensor, form: Form, count: int = CALIBRATION_IMAGES
) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches of training images, evenly spread, none of which has the content of a validation or test image.

    Args:
        data: gives them.
        judges: content hashes of validation and test images of the checkpoint; those of ``data`` are left out as well.
        form: of the graph that they are for.
        count: at most so many.
    """
    judged_by = torch.cat([judges, *(data.manifest.hashes[split] for split in ("val", "test"))]).numpy()
    train = data.splits["train"]
    train = train[~np.isin(data.images.facts["hash"][train], judged_by)]
    chosen = train[np.linspace(0, len(train) - 1, min(count, len(train))).astype(int)]
    views = data.views("train")

    def images() -> Iterator[Pixels]:
        for i in chosen.tolist():
            (shown,) = views.show(to_tensor(data.source.images[i][None]), torch.tensor([i]))
            for pixels in shown.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy():
                yield fitted(pixels, form.size, data.spec)

    for batch in batches_of_one_size(images(), lambda image: image, form.batch or MOST):
        # A graph of a fixed batch is given copies more.
        yield np.stack(batch)[np.arange(form.batch or len(batch)) % len(batch)]


class Drop(NamedTuple):
    """By how many points accuracy falls, with its interval of 95 %."""

    points: float
    low: float
    high: float
    resolution: float
    """The upper end if not one answer were another: what a split of this size cannot tell from nothing."""

    @classmethod
    def of(
        cls, was_right: npt.NDArray[np.bool_], is_right: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]
    ) -> "Drop":
        """From the answers to the same images, paired.

        The adjusted Wald interval of Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of
        binomial proportions based on paired data"; recommended by Fagerland, Lydersen and Laake 2014): to the
        differences one image lost and one gained are added, then it is the normal interval of their mean. Several
        views of one source image count as one, with the mean of their differences.

        Args:
            was_right: by image.
            is_right: by image.
            groups: source of each image.
        """
        lost = was_right.astype(float) - is_right.astype(float)
        by_group = np.bincount(groups, lost) / np.bincount(groups)
        adjusted = np.append(by_group, [1.0, -1.0])
        mean, count = adjusted.mean(), len(adjusted)
        half = 1.96 * adjusted.std() / sqrt(count)
        points = 100 * np.array([lost.mean(), mean - half, mean + half, 1.96 * sqrt(2) / count])
        return cls(*points.tolist())

    def holds(self, most: float) -> bool:
        """Whether it is at most so many points: certainly, or, where the split is too small to tell, as far as seen."""
        return (self.points if self.too_small(most) else self.high) <= most

    def too_small(self, most: float) -> bool:
        """Whether the split could not even show that a graph which says the same loses less."""
        return self.resolution > most


@dataclass(frozen=True, eq=False)
class Comparison:
    """What PyTorch and a graph said of every original of a split.

    Args:
        names: of the images.
        labels: ``(N,)``.
        groups: source of each image, ``(N,)``.
        expected: PyTorch's probabilities, ``(N, K)``.
        found: the graph's.
        others: largest difference of each other output, where they were compared; of ``logits`` and ``features`` as a
            share of the largest value.
    """

    names: list[str]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    expected: Floats
    found: Floats
    others: dict[str, float]

    @property
    def differences(self) -> Floats:
        """Largest of each image's probabilities, ``(N,)``."""
        differences: Floats = np.abs(self.expected - self.found).max(axis=1)
        return differences

    @property
    def flipped(self) -> npt.NDArray[np.int64]:
        """Images of another first class."""
        return np.flatnonzero(self.expected.argmax(axis=1) != self.found.argmax(axis=1))

    @property
    def drop(self) -> Drop:
        """Of accuracy."""
        was_right, is_right = (said.argmax(axis=1) == self.labels for said in (self.expected, self.found))
        return Drop.of(was_right, is_right, self.groups)

    @property
    def accuracy(self) -> float:
        """Of the graph."""
        return float((self.found.argmax(axis=1) == self.labels).mean())

    def told(self, images: npt.NDArray[np.int64], classes: tuple[str, ...]) -> list[dict[str, Any]]:
        """Some of the images by name, with what was said of them."""
        differences = self.differences
        return [
            {
                "name": self.names[i],
                "label": classes[self.labels[i]],
                "pytorch": classes[self.expected[i].argmax()],
                "onnxruntime": classes[self.found[i].argmax()],
                "difference": float(differences[i]),
            }
            for i in images.tolist()
        ]

    def figures(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """For ``parity.json``."""
        drop, differences = self.drop, self.differences
        return {
            "agreement": 1 - len(self.flipped) / len(self.names),
            "largest_difference": float(differences.max()),
            "mean_difference": float(differences.mean()),
            "accuracy": self.accuracy,
            "drop": drop.points,
            "drop_interval": [drop.low, drop.high],
            "flipped": self.told(self.flipped, classes),
        } | ({"other_outputs": self.others} if self.others else {})


class PyTorch:
    """What the model says of a split's batches, remembered: many graphs are compared with it.

    Args:
        model: in evaluation mode, on the CPU.
        form: of the graphs.
    """

    def __init__(self, model: Model, form: Form) -> None:
        self.graph, self.form = Graph(model, form).eval(), form
        self._said: dict[int, npt.NDArray[Any]] = {}

    @torch.no_grad()
    def __call__(self, position: int, pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        """Probabilities of the batch that starts at ``position``, and the other outputs when it is asked first."""
        if position in self._said:
            return [self._said[position]]
        outputs = [output.numpy() for output in self.graph(torch.from_numpy(pixels))]
        self._said[position] = outputs[0]
        return outputs


def compare(
    pytorch: PyTorch, session: onnxruntime.InferenceSession, data: ImageDataModule, split: str = "val"
) -> Comparison:
    """Run every original of ``split``, at its own size or that of the graph, through both.

    Args:
        pytorch: says what is expected.
        session: onnxruntime with the graph.
        data: gives the originals.
        split: its name.
    """
    form, names = pytorch.form, pytorch.graph.names
    others: dict[str, float] = {}
    images: list[tuple[str, int]] = []
    expected, found = [], []
    originals = fitted_originals(data, split, form)
    total = len(list(data.names(split)))
    with tqdm(total=total, desc="comparing", unit="image", disable=None, leave=False) as progress:
        for batch in batches_of_one_size(originals, lambda original: original.pixels, form.batch or MOST):
            pixels = np.stack([original.pixels for original in batch])
            ours, *mine = pytorch(len(images), pixels)
            theirs, *yours = run_batch(session, pixels, names[: 1 + len(mine)])
            for name, one, other in zip(names[1:], mine, yours, strict=False):
                scale = max(1.0, float(np.abs(one).max())) if name in ("logits", "features") else 1.0
                others[name] = max(others.get(name, 0.0), float(np.abs(one - other).max()) / scale)
            expected.append(ours)
            found.append(theirs)
            images += [(original.name, original.label) for original in batch]
            progress.update(len(batch))
    views = len(data.views(split).names)
    return Comparison(
        [name for name, _ in images],
        np.array([label for _, label in images]),
        np.arange(len(images)) // views,
        np.concatenate(expected).astype(float),
        np.concatenate(found).astype(float),
        others,
    )


def other_outputs_agree(comparison: Comparison) -> bool:
    """Whether all of them, where there are any, are within `OTHER_TOLERANCES`."""
    return all(value <= OTHER_TOLERANCES[name.partition("_")[0]] for name, value in comparison.others.items())


@torch.no_grad()
def cached_accuracy(model: Model, data: ImageDataModule, split: str = "val") -> float:
    """Of the uint8 images at the network's size that training used; a gate on it would punish their rounding."""
    right = [model(batch.images).argmax(dim=1) == batch.labels for batch in data.loader(split)]
    return float(torch.cat(right).double().mean())
