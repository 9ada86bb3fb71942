"""Gates of `export`: a float32 graph must reproduce PyTorch, and a graph of lower precision must keep the accuracy.

If a graph of lower precision loses too much, its most harmful layers are set back to float32, one after the other.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from tqdm import tqdm

from upright.errors import GateError
from upright.exporting.parity import Comparison
from upright.exporting.precision import TOLERANCES, Converter
from upright.runtime.predictor import open_session, run_batch
from upright.runtime.task import Task

Batches = Callable[[], Iterator[npt.NDArray[np.uint8]]]

RANKING_SECONDS = 300.0
"""Time limit of the ranking. Layers that are not measured within it rank as the least harmful ones."""


def check_exact(comparison: Comparison) -> None:
    """Raise a `GateError` if a float32 graph does not reproduce PyTorch, and print the images."""
    limit = TOLERANCES["fp32"]
    # NaN counts as a difference. Within the limit, a first class flips only if its margin is less than twice the limit.
    offending = np.flatnonzero(~(comparison.differences <= limit))
    if not len(offending) and comparison.others_agree:
        return
    for image in comparison.image_records(offending):
        print("  {name}: PyTorch {pytorch}, ONNX Runtime {onnxruntime}, difference {difference:.2g}".format(**image))
    raise GateError(
        f"ONNX Runtime and PyTorch disagree on {len(offending)} of {len(comparison.names)} validation images (allowed "
        f"difference {limit:.0e}). They are listed above. No bundle was written. "
        f"Largest differences of the other outputs: {comparison.others}."
    )


class GatedGraph(NamedTuple):
    """A graph of lower precision that passed its gate: its file, and its comparison with PyTorch."""

    content: bytes
    comparison: Comparison
    float_layers: dict[str, float]
    """Harm of each layer that stays float32, see `rank_layers`."""


def convert_within(
    converter: Converter,
    compare: Callable[[onnxruntime.InferenceSession], Comparison],
    reference: onnxruntime.InferenceSession,
    images: Batches,
    max_drop: float,
) -> GatedGraph:
    """Convert all layers. Until the graph passes, set the most harmful layer back to float32, at most half of them.

    Args:
        converter: converter of the float32 graph.
        compare: function that compares a graph with PyTorch on the validation split.
        reference: the float32 graph.
        images: batches of training images, so that the validation split does not choose layers.
        max_drop: largest loss of accuracy in points, see `Drop.is_within`.

    Raises:
        GateError: if the graph loses too much, even with half of the layers in float32.
    """
    name, layers = converter.name, list(converter.layers)
    harms: dict[str, float] = {}
    float_layers: dict[str, float] = {}
    while True:
        content = converter.convert(layers)
        comparison = compare(open_session(content))
        drop = comparison.drop
        if drop.is_within(max_drop):
            return GatedGraph(content, comparison, float_layers)
        harms = harms or rank_layers(converter, reference, images, comparison.task)
        print(f"  {name} loses {drop.points:.2f} points (95 %: {drop.low:.2f} to {drop.high:.2f}).", flush=True)
        if len(layers) <= len(converter.layers) / 2:
            worst = ", ".join(f"{layer} {harm:.2g}" for layer, harm in list(harms.items())[:10])
            raise GateError(
                f"{name} loses {drop.points:.2f} points of {comparison.task.score} (95 %: {drop.low:.2f} to "
                f"{drop.high:.2f}; allowed --max-drop {max_drop:g}), even with {len(float_layers)} of "
                f"{len(converter.layers)} layers in float32. No bundle was written. Omit {name}, or allow a larger "
                f"drop. Mean change of an answer by each single layer: {worst}."
            )
        layer = next(layer for layer in harms if layer in layers)
        layers.remove(layer)
        float_layers[layer] = harms[layer]
        print(f"  {layer} stays float32: it changes answers by {harms[layer]:.2g}.", flush=True)


def rank_layers(
    converter: Converter, reference: onnxruntime.InferenceSession, images: Batches, task: Task
) -> dict[str, float]:
    """Return the harm of each layer, the worst first.

    The harm is the difference if only this layer is converted, see `Classification.differences`, averaged over images.
    """
    batches = list(images())
    expected = [run_batch(reference, batch)[0] for batch in batches]
    start, harms = time.monotonic(), dict.fromkeys(converter.layers, 0.0)
    for layer in tqdm(converter.layers, desc="ranking layers", unit="layer", disable=None, leave=False):
        if time.monotonic() - start > RANKING_SECONDS:
            break
        session = open_session(converter.convert([layer]))
        changes = [
            task.differences(rows, run_batch(session, batch)[0]) for batch, rows in zip(batches, expected, strict=True)
        ]
        harms[layer] = float(np.nan_to_num(np.concatenate(changes), nan=1.0).mean())
    return dict(sorted(harms.items(), key=lambda item: -item[1]))
