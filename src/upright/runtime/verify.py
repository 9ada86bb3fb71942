"""``upright verify``: check that a bundle is complete and reproduces its recorded predictions on this machine."""

import json
from collections.abc import Iterator

import onnxruntime

from upright.errors import GateError, UserError
from upright.images import decode
from upright.options import Engine, Verify
from upright.runtime.bundle import PARITY, Bundle
from upright.runtime.predictor import open_predictor, open_session
from upright.runtime.speed import machine, speeds_by_batch


def verify(options: Verify) -> int:
    """Check hashes and format, and for each precision the model's metadata and its predictions for the samples."""
    bundle = Bundle.open(options.bundle, options.key, options.expect)
    engines: list[Engine] = list(dict.fromkeys(["onnxruntime", options.engine]))
    lines = [_check(bundle, precision, engine) for engine in engines for precision in bundle.precisions]
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
    """Yield the speed of each precision beside that of the export, and a warning if it is slower by ``factor``."""
    parity = json.loads((bundle.files / PARITY).read_text(encoding="utf-8"))
    if not all("speed" in metrics for metrics in parity["precisions"].values()):
        raise UserError(f"Bundle '{bundle.folder}' does not record the speed of its export; export it again.")
    versions = {"Here": onnxruntime.__version__, "Export": bundle.manifest["provenance"]["versions"]["onnxruntime"]}
    for (place, number), computer in zip(versions.items(), (machine(), parity["machine"]), strict=True):
        yield f"{place + ':':7} {computer['processor']}, onnxruntime {number}, one thread."
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


def _check(bundle: Bundle, precision: str, engine: Engine) -> str:
    predictor = open_predictor(bundle, precision, engine=engine)
    if engine == "onnxruntime":
        metadata = json.loads(predictor.session.get_modelmeta().custom_metadata_map.get("upright", "null"))
        if metadata != {"classes": list(bundle.spec.classes), "format": bundle.manifest["format"]}:
            raise GateError(f"The metadata of '{bundle.model(precision)}' differ from the manifest: {metadata}.")
    difference, suffix = predictor.check_samples(), "" if engine == "onnxruntime" else f" in {engine}"
    return f"{precision}{suffix} within {difference:.1e} (allowed {bundle.tolerance(precision):.0e})"
