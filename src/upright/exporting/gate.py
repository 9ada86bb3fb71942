"""A float32 graph must say the same as PyTorch, and one of less precision must not lose accuracy.

Where it does, the layers that harm most go back to float32 until it does not.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from tqdm import tqdm

from upright.errors import GateError
from upright.exporting.parity import Comparison, other_outputs_agree
from upright.exporting.precision import TOLERANCES, Lowered
from upright.runtime.predictor import open_session, run_batch

Batches = Callable[[], Iterator[npt.NDArray[np.uint8]]]

RANKING_SECONDS = 300.0
"""After so long the layers that were not measured yet count as the least harmful."""


def check_exact(comparison: Comparison, classes: tuple[str, ...]) -> None:
    """Refuse a float32 graph that does not say the same as PyTorch.

    Args:
        comparison: of the two, on the validation split.
        classes: names, for messages.

    Raises:
        GateError: if it does not; the images are listed.
    """
    allowed = TOLERANCES["fp32"]
    # A NaN is over budget, too. A first class that flips had a margin of less than twice this.
    offending = np.flatnonzero(~(comparison.differences <= allowed))
    if not len(offending) and other_outputs_agree(comparison):
        return
    for sample in comparison.told(offending, classes):
        print("  {name}: PyTorch {pytorch}, ONNX Runtime {onnxruntime}, off by {difference:.2g}".format(**sample))
    raise GateError(
        f"ONNX Runtime and PyTorch disagree on {len(offending)} of {len(comparison.names)} validation images (allowed "
        f"difference {allowed:.0e}), which are listed above; largest differences of other outputs {comparison.others}; "
        "so there is no bundle."
    )


class Passed(NamedTuple):
    """A graph that holds.

    Args:
        content: of its file.
        comparison: with PyTorch.
        floats: layers that had to stay float32, and what each did alone, see `harm`.
    """

    content: bytes
    comparison: Comparison
    floats: dict[str, float]


def gated(
    lowered: Lowered,
    compared: Callable[[onnxruntime.InferenceSession], Comparison],
    reference: onnxruntime.InferenceSession,
    images: Batches,
    max_drop: float,
) -> Passed:
    """Lower all layers, then all but the most harmful one, and so on, at most half of them.

    Args:
        lowered: the graph.
        compared: compares one with PyTorch on the validation split.
        reference: the float32 graph.
        images: what layers are ranked by; training images, so that the validation split decides and chooses nothing.
        max_drop: points of accuracy, see `Drop.holds`.

    Raises:
        GateError: if too much is lost even then, with the layers and their harm.
    """
    layers, floats = list(lowered.layers), dict[str, float]()
    harms: dict[str, float] = {}
    while True:
        content = lowered.lower(layers)
        comparison = compared(open_session(content))
        drop = comparison.drop
        if drop.holds(max_drop):
            return Passed(content, comparison, floats)
        harms = harms or harm(lowered, reference, images)
        print(f"  {lowered.name} loses {drop.points:.2f} points ({drop.low:.2f} to {drop.high:.2f}) ...", flush=True)
        if len(layers) <= len(lowered.layers) / 2:
            told = ", ".join(f"{layer} {value:.2g}" for layer, value in list(harms.items())[:10])
            raise GateError(
                f"{lowered.name} loses {drop.points:.2f} points of accuracy (95 %: {drop.low:.2f} to {drop.high:.2f}; "
                f"allowed --max-drop {max_drop:g}), even with {len(floats)} of {len(lowered.layers)} layers in "
                f"float32; so there is no bundle. Leave {lowered.name} out, or allow more. "
                f"Mean change of a probability by each layer alone: {told}."
            )
        worst = next(layer for layer in harms if layer in layers)
        layers.remove(worst)
        floats[worst] = harms[worst]
        print(f"  {worst} goes back to float32: alone it changes probabilities by {harms[worst]:.2g}.", flush=True)


def harm(lowered: Lowered, reference: onnxruntime.InferenceSession, images: Batches) -> dict[str, float]:
    """What lowering each layer alone does: the mean of each image's largest change of a probability, worst first."""
    batches = list(images())
    expected = [run_batch(reference, batch)[0] for batch in batches]
    start, found = time.monotonic(), dict.fromkeys(lowered.layers, 0.0)
    for layer in tqdm(lowered.layers, desc="ranking layers", unit="layer", disable=None, leave=False):
        if time.monotonic() - start > RANKING_SECONDS:
            break
        session = open_session(lowered.lower([layer]))
        changes = [
            np.abs(run_batch(session, batch)[0] - said).max(axis=1)
            for batch, said in zip(batches, expected, strict=True)
        ]
        found[layer] = float(np.nan_to_num(np.concatenate(changes), nan=1.0).mean())
    return dict(sorted(found.items(), key=lambda item: -item[1]))
