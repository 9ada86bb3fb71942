"""``upright verify``: is this bundle what was exported, and does it give the same answers on this machine?"""

import json

import numpy as np

from upright.errors import GateError
from upright.images import decode
from upright.runtime.predictor import Predictor


def verify(bundle: str) -> int:
    """Check hashes, format, the ONNX file's own metadata, and the answers for the samples.

    Args:
        bundle: the folder of a bundle.

    Raises:
        UprightError: if the bundle is damaged.
        GateError: if it is whole, but does not say here what it said where it was exported.
    """
    predictor = Predictor(bundle)
    manifest, samples, spec = predictor.bundle.manifest, predictor.bundle.samples, predictor.spec
    told = json.loads(predictor.session.get_modelmeta().custom_metadata_map.get("upright", "null"))
    if told != {"classes": list(spec.classes), "format": manifest["format"]}:
        raise GateError(f"The metadata of '{bundle}/model.onnx' differ from the manifest: {told}.")
    pixels = [decode(predictor.bundle.folder / sample["file"], spec) for sample in samples]
    expected = np.array([sample["probabilities"] for sample in samples], dtype=np.float32)
    tolerance = predictor.bundle.tolerance
    # Alone and together: a batch must not change an answer.
    for batch_size in (1, len(pixels)):
        found = np.stack(list(predictor.probabilities(pixels, batch_size)))
        differences = np.abs(found - expected).max(axis=1)
        if off := [sample["file"] for sample, d in zip(samples, differences, strict=True) if not d <= tolerance]:
            raise GateError(
                f"Bundle '{bundle}' answers differently on this machine (batches of {batch_size}): "
                f"{len(off)} of {len(samples)} samples are off by up to {differences.max():.2g}, "
                f"allowed {tolerance:.2g}: {', '.join(off)}."
            )
    print(
        f"Verified '{bundle}': hashes, format {manifest['format']}, {len(samples)} samples "
        f"within {differences.max():.1e} (allowed {tolerance:.0e})."
    )
    return 0
