"""``upright export``: checkpoint -> bundle, which appears whole or not at all."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from upright.data.datamodule import ImageDataModule
from upright.data.source import Original
from upright.errors import GateError, UprightError
from upright.exporting.graph import OPSET, Output, output_names, write_graph
from upright.exporting.parity import TOLERANCE, measure_parity
from upright.files import replacing_folder
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODEL, SAMPLES, SUMS, checksums
from upright.runtime.predictor import open_session, run_session
from upright.training.checkpoint import check_name, find_checkpoint, read_data, restore
from upright.training.tracking import Mode, bundle_mode, log_bundle

SAMPLE_COUNT = 16


def export(
    checkpoint: str,
    name: str | None = None,
    force: bool = False,
    data: str | None = None,
    outputs: Sequence[Output] = (),
    wandb: Mode | None = None,
) -> int:
    """Export, compare with PyTorch on the whole validation split, and only then show the bundle.

    Args:
        checkpoint: a checkpoint, or the folder of a run.
        name: of the bundle; the run's by default.
        force: replace an existing bundle.
        data: a YAML of the data, if they are not where they were.
        outputs: what the graph gives beside probabilities, see `Graph`.
        wandb: whether and how the bundle is noted there, see `bundle_mode`.

    Raises:
        UprightError: if the checkpoint or its data cannot be used, or the bundle exists.
        GateError: if ONNX Runtime and PyTorch do not agree; no bundle is written.
    """
    outputs = list(dict.fromkeys(outputs))
    tracking = bundle_mode(wandb, find_checkpoint(checkpoint))
    restored = restore(checkpoint, read_data(data) if data else None)
    name = restored.contents["run"]["name"] if name is None else name
    check_name(name)
    target = Path("export") / name
    if target.exists() and not force:
        raise UprightError(f"Bundle '{target}' exists: --force replaces it, --name gives this one another name.")
    if target.exists() and any(target.iterdir()) and not (target / SUMS).is_file():
        raise UprightError(f"'{target}' is not a bundle; --force does not replace it.")
    model, datamodule = restored.classifier.cpu().model.eval(), restored.data
    with replacing_folder(target) as folder:
        print(f"Exporting '{checkpoint}' (opset {OPSET}) ...", flush=True)
        write_graph(model, folder / MODEL, outputs=outputs)
        session = open_session(folder / MODEL)
        print("Comparing with PyTorch on the validation split's originals ...", flush=True)
        parity = measure_parity(model, session, datamodule, outputs=outputs)
        if not parity["passed"]:
            for sample in parity["offending"]:
                print(
                    "  {name}: PyTorch {pytorch}, ONNX Runtime {onnxruntime}, off by {difference:.2g}".format(**sample)
                )
            raise GateError(
                f"ONNX Runtime and PyTorch disagree on {len(parity['offending'])} of {parity['images']} validation "
                f"images (allowed difference {TOLERANCE:.0e}), which are listed above; largest differences of other "
                f"outputs {parity['other_outputs']}; so there is no bundle."
            )
        _write_json(folder / "parity.json", parity)
        _write_samples(folder, session, datamodule)
        manifest = _manifest(restored.contents, datamodule, name, output_names(model, outputs)[1:])
        _write_json(folder / MANIFEST, manifest)
        (folder / "README.md").write_text(_card(manifest, parity, name), encoding="utf-8")
        (folder / SUMS).write_text(checksums(folder))
    log_bundle(tracking, find_checkpoint(checkpoint), target)
    accuracy = parity["accuracy"]
    print(
        f"{parity['images']} images: agreement {parity['agreement']:.2%}, largest difference "
        f"{parity['largest_difference']:.1e}, accuracy PyTorch {accuracy['pytorch']:.4f}, "
        f"ONNX Runtime {accuracy['onnxruntime']:.4f}.\n"
        f"Bundle: {target}\nNext:   upright verify {target}"
    )
    return 0


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_samples(folder: Path, session: Any, data: ImageDataModule) -> None:
    """Real validation images as PNG, with what the graph says of them."""
    count = len(list(data.names("val")))
    chosen = set(np.linspace(0, count - 1, min(SAMPLE_COUNT, count)).astype(int).tolist())
    (folder / SAMPLES).mkdir()
    expected: list[dict[str, Any]] = []
    for original in (original for i, original in enumerate(data.originals("val")) if i in chosen):
        number = len(expected)
        file = f"{SAMPLES}/{number:02d}.png"
        write_png(folder / file, original)
        (row,) = run_session(session, [original.pixels], 1)
        sample = {"file": file, "name": original.name, "label": data.spec.classes[original.label]}
        expected.append(sample | {"probabilities": [float(p) for p in row]})
    _write_json(folder / EXPECTED, expected)


def write_png(path: Path, original: Original) -> None:
    """The very pixels, losslessly."""
    pixels = original.pixels[:, :, 0] if original.pixels.shape[2] == 1 else original.pixels
    Image.fromarray(pixels).save(path)


def _manifest(contents: dict[str, Any], data: ImageDataModule, name: str, others: list[str]) -> dict[str, Any]:
    packages = ("upright", "torch", "onnx", "onnxscript", "onnxruntime")
    return {
        "format": FORMAT,
        "name": name,
        "spec": data.spec.to_dict(),
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", "height", "width", data.spec.channels]},
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["batch", len(data.spec.classes)]},
        "other_outputs": others,
        "opset": OPSET,
        "tolerance": TOLERANCE,
        "provenance": {
            "versions": {package: version(package) for package in packages},
            "run": contents["run"],
            "git_commit": contents["git_commit"],
            "model": contents["model"],
            "data": data.recipe,
            "split": {"digest": data.manifest.digest, "counts": data.manifest.counts},
            "metrics": contents["metrics"],
        },
    }


def _card(manifest: dict[str, Any], parity: dict[str, Any], name: str) -> str:
    spec, provenance, accuracy = manifest["spec"], manifest["provenance"], parity["accuracy"]
    network = provenance["model"]["init_args"]["network"]["class_path"]
    data = provenance["data"]["class_path"]
    fitted = "" if spec["resize"] == "none" else f"{spec['resize']} to {spec['height']} x {spec['width']} and "
    others = "".join(f", `{other}`" for other in manifest["other_outputs"])
    metrics = "\n".join(f"| {key} | {value:.4f} |" for key, value in provenance["metrics"].items())
    return f"""# {name}

An image classifier exported by Upright {provenance["versions"]["upright"]} from run `{provenance["run"]["name"]}`
(id {provenance["run"]["id"]}, git {provenance["git_commit"] or "not known"}).

| | |
|---|---|
| Network | `{network}` |
| Data | `{data}`, split `{provenance["split"]["digest"][:16]}` |
| Classes | {", ".join(spec["classes"])} |
| Input | `images`: uint8 (batch, height, width, {spec["channels"]}), any size; {fitted}normalisation inside |
| Output | `probabilities`: float32 (batch, {len(spec["classes"])}){others} |
| ONNX opset | {manifest["opset"]} |

## Parity on the validation split

PyTorch and ONNX Runtime on all {parity["images"]} originals; `parity.json` holds the same.

| | |
|---|---|
| Agreement of the first class | {parity["agreement"]:.4%} |
| Largest difference of a probability | {parity["largest_difference"]:.2e} (allowed {parity["tolerance"]:.0e}) |
| Accuracy, PyTorch | {accuracy["pytorch"]:.4f} |
| Accuracy, ONNX Runtime | {accuracy["onnxruntime"]:.4f} |
| Accuracy, the cached pipeline that training used | {accuracy["cached_pipeline"]:.4f} |

## When it was trained

| metric | value |
|---|---|
{metrics}

## Use

With Upright installed (its base install needs no PyTorch):

    upright verify {name}          # hashes, and the same answers on this machine
    upright infer {name} IMAGE ...

In Python: `from upright.runtime.predictor import Predictor; Predictor("{name}")("image.png").label`
"""
