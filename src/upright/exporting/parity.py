"""Does the ONNX graph say what PyTorch says, on every original of a real split?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch

from upright.data.datamodule import ImageDataModule
from upright.exporting.graph import Graph, Output, output_names
from upright.images import batches_of_one_size
from upright.runtime.predictor import run_session
from upright.training.model import Model

TOLERANCE = 1e-4
"""Largest difference of a probability. So a first class that flips had a margin of less than twice this."""

OTHER_TOLERANCES: dict[Output, float] = {"theta": 1e-3, "warped": 0.5}
"""Largest differences of the other outputs: half images and radians, and grey levels."""


def measure_parity(
    model: Model,
    session: onnxruntime.InferenceSession,
    data: ImageDataModule,
    split: str = "val",
    outputs: Sequence[Output] = (),
) -> dict[str, Any]:
    """Run every original of ``split``, at its own size, through both.

    Args:
        model: in evaluation mode, on the CPU.
        session: onnxruntime with the exported graph.
        data: gives the originals.
        split: its name.
        outputs: what else the graph gives.

    Returns:
        What ``parity.json`` holds. ``offending`` names the samples over budget; ``passed`` is whether there are none.
    """
    graph = Graph(model, outputs).eval()
    budgets = {name: OTHER_TOLERANCES[output] for output in outputs for name in output_names(model, [output])[1:]}
    others = dict.fromkeys(budgets, 0.0)
    offending: list[dict[str, Any]] = []
    total = agreeing = right_torch = right_onnx = 0
    largest = sum_of_largest = 0.0
    for batch in batches_of_one_size(data.originals(split), lambda original: original.pixels, 64):
        pixels = np.stack([original.pixels for original in batch])
        labels = np.array([original.label for original in batch])
        with torch.no_grad():
            ours, *mine = (output.numpy() for output in graph(torch.from_numpy(pixels)))
        theirs = np.stack(list(run_session(session, pixels, len(pixels))))
        difference = np.abs(ours - theirs).max(axis=1)
        for name, output in zip(others, mine, strict=True):
            others[name] = max(others[name], float(np.abs(output - session.run([name], {"images": pixels})[0]).max()))
        flipped = ours.argmax(axis=1) != theirs.argmax(axis=1)
        # A NaN is over budget, too.
        for i in np.flatnonzero(~(difference <= TOLERANCE)):
            names = {
                "pytorch": data.spec.classes[ours[i].argmax()],
                "onnxruntime": data.spec.classes[theirs[i].argmax()],
            }
            offending.append({"name": batch[i].name, "difference": float(difference[i]), **names})
        total += len(batch)
        agreeing += int((~flipped).sum())
        right_torch += int((ours.argmax(axis=1) == labels).sum())
        right_onnx += int((theirs.argmax(axis=1) == labels).sum())
        largest = max(largest, float(difference.max()))
        sum_of_largest += float(difference.sum())
    return {
        "split": split,
        "images": total,
        "tolerance": TOLERANCE,
        "agreement": agreeing / total,
        "largest_difference": largest,
        "mean_difference": sum_of_largest / total,
        "accuracy": {
            "pytorch": right_torch / total,
            "onnxruntime": right_onnx / total,
            "cached_pipeline": _cached_accuracy(model, data, split),
        },
        "other_outputs": others,
        "offending": offending,
        "passed": not offending and all(others[name] <= budget for name, budget in budgets.items()),
    }


@torch.no_grad()
def _cached_accuracy(model: Model, data: ImageDataModule, split: str) -> float:
    """Of the uint8 images at the network's size that training used; a gate on it would punish their rounding."""
    right = [model(batch.images).argmax(dim=1) == batch.labels for batch in data.loader(split)]
    return float(torch.cat(right).double().mean())
