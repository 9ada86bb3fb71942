"""``upright verify``: check that a bundle is complete and reproduces its recorded predictions on this machine."""

import json

import numpy as np

from upright.errors import GateError
from upright.images import decode
from upright.options import Verify
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import Predictor

HINTS = {
    "int8": " On a processor without instructions for 8-bit products (VNNI), sums of full-range weights saturate: "
    "export without --full-range, or use another precision on this machine."
}


def verify(options: Verify) -> int:
    """Check hashes and format, and for each precision the model's metadata and its predictions for the samples.

    Raises:
        BundleError: if the bundle is damaged.
        GateError: if it is complete, but its predictions differ on this machine.
    """
    bundle = Bundle.open(options.bundle)
    lines = [_check(bundle, precision) for precision in bundle.precisions]
    print(
        f"Verified '{options.bundle}': hashes, format {bundle.manifest['format']}, {len(bundle.samples)} samples; "
        f"{', '.join(lines)}."
    )
    return 0


def _check(bundle: Bundle, precision: str) -> str:
    predictor, spec = Predictor(bundle, precision), bundle.spec
    metadata = json.loads(predictor.session.get_modelmeta().custom_metadata_map.get("upright", "null"))
    if metadata != {"classes": list(spec.classes), "format": bundle.manifest["format"]}:
        raise GateError(f"The metadata of '{bundle.model(precision)}' differ from the manifest: {metadata}.")
    pixels = [decode(path, spec) for path in bundle.sample_files]
    expected, tolerance = bundle.expected(precision), bundle.tolerance(precision)
    # Run the samples one by one and in one batch, because the batch size must not change a prediction.
    for batch_size in (1, len(pixels)):
        probabilities = np.stack(list(predictor.probabilities(pixels, batch_size)))
        differences = np.abs(probabilities - expected).max(axis=1)
        # Two classes that were closer than the tolerance may swap.
        second, first = np.sort(expected, axis=1)[:, -2:].T
        flipped = (probabilities.argmax(axis=1) != expected.argmax(axis=1)) & (first - second > tolerance)
        wrong = flipped | ~(differences <= tolerance)
        if wrong.any():
            files = [sample["file"] for sample, is_wrong in zip(bundle.samples, wrong, strict=True) if is_wrong]
            raise GateError(
                f"Bundle '{bundle.folder}' gives other predictions on this machine ({precision}, batches of "
                f"{batch_size}): {len(files)} of {len(pixels)} samples differ by up to {differences.max():.2g} "
                f"(allowed {tolerance:.2g}), {int(flipped.sum())} of them in the first class: {', '.join(files)}."
                f"{HINTS.get(precision, '')}"
            )
    return f"{precision} within {differences.max():.1e} (allowed {tolerance:.0e})"
