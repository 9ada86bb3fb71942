"""``upright verify``: is this bundle what was exported, and does it give the same answers on this machine?"""

import json

import numpy as np

from upright.errors import GateError
from upright.images import decode
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import Predictor

HINTS = {
    "int8": " Where a processor has no instructions for 8-bit products (VNNI), sums of full-range weights saturate: "
    "export without --full-range, or use another precision here."
}


def verify(bundle: str) -> int:
    """Check hashes and format, and of every precision the ONNX file's own metadata and the answers for the samples.

    Args:
        bundle: the folder of a bundle.

    Raises:
        UserError: if the bundle is damaged.
        GateError: if it is whole, but does not say here what it said where it was exported.
    """
    opened = Bundle.open(bundle)
    lines = [_check(opened, precision) for precision in opened.precisions]
    print(
        f"Verified '{bundle}': hashes, format {opened.manifest['format']}, {len(opened.samples)} samples; "
        f"{', '.join(lines)}."
    )
    return 0


def _check(bundle: Bundle, precision: str) -> str:
    predictor, samples, spec = Predictor(bundle, precision), bundle.samples, bundle.spec
    told = json.loads(predictor.session.get_modelmeta().custom_metadata_map.get("upright", "null"))
    if told != {"classes": list(spec.classes), "format": bundle.manifest["format"]}:
        raise GateError(f"The metadata of '{bundle.model(precision)}' differ from the manifest: {told}.")
    pixels = [decode(bundle.folder / sample["file"], spec) for sample in samples]
    expected, tolerance = bundle.expected(precision), bundle.tolerance(precision)
    # Alone and together: a batch must not change an answer.
    for batch_size in (1, len(pixels)):
        found = np.stack(list(predictor.probabilities(pixels, batch_size)))
        differences = np.abs(found - expected).max(axis=1)
        # Two classes that were closer than the tolerance may change places.
        second, first = np.sort(expected, axis=1)[:, -2:].T
        flipped = (found.argmax(axis=1) != expected.argmax(axis=1)) & (first - second > tolerance)
        wrong = flipped | ~(differences <= tolerance)
        if wrong.any():
            off = [sample["file"] for sample, is_wrong in zip(samples, wrong, strict=True) if is_wrong]
            raise GateError(
                f"Bundle '{bundle.folder}' answers differently on this machine ({precision}, batches of {batch_size}): "
                f"{len(off)} of {len(samples)} samples are off by up to {differences.max():.2g}, "
                f"allowed {tolerance:.2g}, {int(flipped.sum())} of them in the first class: {', '.join(off)}."
                f"{HINTS.get(precision, '')}"
            )
    return f"{precision} within {differences.max():.1e} (allowed {tolerance:.0e})"
