"""``upright verify``: check that a bundle is complete and reproduces its recorded predictions on this machine."""

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import onnxruntime

from upright.errors import BundleError, GateError, UserError
from upright.images import Pixels, decode
from upright.options import Verify
from upright.runtime.bundle import PARITY, SUMS, Bundle
from upright.runtime.predictor import fixed_batch, open_predictor, open_session, run_batch
from upright.runtime.speed import machine, side_by_side, turn

SPEED_BATCHES = (1, 64)

HINTS = {
    "int8": " On a processor without instructions for 8-bit products (VNNI), sums of full-range weights saturate: "
    "export without --full-range, or use another precision on this machine."
}


def verify(options: Verify) -> int:
    """Check hashes and format, and for each precision the model's metadata and its predictions for the samples.

    Raises:
        BundleError: if the bundle is damaged, is not the one that ``expect`` names, or was not signed by ``key``.
        UserError: if the speed is requested, and the bundle does not record that of its export.
        GateError: if it is complete, but its predictions differ on this machine.
    """
    bundle = Bundle.open(options.bundle, options.key)
    actual = sha256((bundle.files / SUMS).read_bytes()).hexdigest()
    if options.expect is not None and options.expect.lower() != actual:
        raise BundleError(f"'{options.bundle}' is not the expected bundle: SHA256SUMS has the SHA-256 {actual}.")
    lines = [_check(bundle, precision) for precision in bundle.precisions]
    signature = f"signature of {options.key}, " if options.key else ""
    print(
        f"Verified '{options.bundle}': {signature}hashes, format {bundle.manifest['format']}, "
        f"{len(bundle.samples)} samples; {', '.join(lines)}."
    )
    if options.speed:
        for line in compare_speed(bundle, options.speed_factor):
            print(line)
    return 0


def compare_speed(bundle: Bundle, factor: float) -> Iterator[str]:
    """Yield the speed of each precision beside that of the export, and a warning if it is slower by ``factor``.

    Raises:
        UserError: if the bundle does not record the speed of its export.
    """
    parity = json.loads((bundle.files / PARITY).read_text(encoding="utf-8"))
    if not all("speed" in metrics for metrics in parity["precisions"].values()):
        raise UserError(f"Bundle '{bundle.folder}' does not record the speed of its export; export it again.")
    here, there = machine(), parity["machine"]
    onnx_runtime = bundle.manifest["provenance"]["versions"]["onnxruntime"]
    yield f"Here:   {here['processor']}, onnxruntime {onnxruntime.__version__}, one thread."
    yield f"Export: {there['processor']}, onnxruntime {onnx_runtime}, one thread."
    sessions = {name: open_session(bundle.model(name), threads=1) for name in bundle.precisions}
    slow = []
    for name, speeds in speeds_by_batch(sessions, decode(bundle.sample_files[0], bundle.spec)).items():
        for batch, speed in speeds.items():
            now, before = speed["milliseconds"], parity["precisions"][name]["speed"][batch]["milliseconds"]
            times = now / before
            yield f"{name}, batch {batch}: {now:.3f} ms, {times:.2f} times the {before:.3f} ms of the export."
            if times > factor:
                slow.append(f"{name} at batch {batch} ({times:.2f} times)")
    if slow:
        yield (
            f"Warning: slower than at the export by more than {factor:g}: {', '.join(slow)}. The processor, other "
            "processes or the version of onnxruntime can be the cause; `upright benchmark` compares runtimes."
        )


def speeds_by_batch(
    sessions: Mapping[str, onnxruntime.InferenceSession], image: Pixels
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the speed of each session by batch size, in processor time, relative to the first session.

    Args:
        sessions: sessions with one thread, by precision.
        image: the image whose copies form the batches, ``(H, W, C)``.
    """
    speeds: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in sessions}
    only = fixed_batch(next(iter(sessions.values())))
    for batch in [only] if only else SPEED_BATCHES:
        images = np.repeat(image[None], batch, axis=0)
        turns = {
            name: partial(turn, partial(run_batch, session, images), time.process_time)
            for name, session in sessions.items()
        }
        for name, speed in side_by_side(turns).items():
            values = {"milliseconds": speed.p50, "times_fp32": speed.times, "quartiles": list(speed.quartiles)}
            speeds[name][str(batch)] = values
    return speeds


def _check(bundle: Bundle, precision: str) -> str:
    predictor, spec, task = open_predictor(bundle, precision), bundle.spec, bundle.task
    metadata = json.loads(predictor.session.get_modelmeta().custom_metadata_map.get("upright", "null"))
    if metadata != {"classes": list(spec.classes), "format": bundle.manifest["format"]}:
        raise GateError(f"The metadata of '{bundle.model(precision)}' differ from the manifest: {metadata}.")
    pixels = [decode(path, spec) for path in bundle.sample_files]
    expected, tolerance = bundle.expected(precision), bundle.tolerance(precision)
    # Run the samples one by one and in one batch, because the batch size must not change a prediction.
    for batch_size in (1, len(pixels)):
        actual = np.stack(list(predictor.rows(pixels, batch_size)))
        differences = task.differences(expected, actual)
        flipped = task.changed(expected, actual, tolerance)
        wrong = flipped | ~(differences <= tolerance)
        if wrong.any():
            files = [sample["file"] for sample, is_wrong in zip(bundle.samples, wrong, strict=True) if is_wrong]
            raise GateError(
                f"Bundle '{bundle.folder}' gives other predictions on this machine ({precision}, batches of "
                f"{batch_size}): {len(files)} of {len(pixels)} samples differ by up to {differences.max():.2g} "
                f"(allowed {tolerance:.2g}), {int(flipped.sum())} of them in {task.answer}: {', '.join(files)}."
                f"{HINTS.get(precision, '')}"
            )
    return f"{precision} within {differences.max():.1e} (allowed {tolerance:.0e})"
