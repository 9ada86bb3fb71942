"""``upright export``: write a verified bundle of a checkpoint.

The steps are: restore the checkpoint, write the graph, compare it with PyTorch, convert it to lower precisions, and
write samples, manifest, card and hashes.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from upright.checkpoint import find_checkpoint
from upright.data.configs import read_data
from upright.data.source import Original
from upright.errors import UserError
from upright.exporting.bom import BOM, bom
from upright.exporting.card import card, summary
from upright.exporting.gate import check_exact, convert_within
from upright.exporting.graph import Form, Output, write_graph
from upright.exporting.parity import Reference, cached_accuracy, calibration_batches, choose_threshold, fitted_originals
from upright.exporting.precision import TOLERANCES, Converter, Float16, Int8, PrecisionName
from upright.exporting.triton import check_labels, model_folders, write_models
from upright.files import check_name, check_replaceable, file_hash, replacing_file, replacing_folder
from upright.runs.tracking import Mode, bundle_mode, log_bundle
from upright.runtime.bundle import (
    ARCHIVE_SUFFIX,
    EXPECTED,
    FORMAT,
    MANIFEST,
    MODELS,
    PARITY,
    SAMPLES,
    SUMS,
    Bundle,
    checksums,
    file_hashes,
    spec_entries,
    write_archive,
    write_json,
)
from upright.runtime.predictor import open_session, run_batch
from upright.runtime.signature import SIGNATURE, read_signer, write_signature
from upright.runtime.speed import machine, speeds_by_batch
from upright.runtime.task import task_of
from upright.training.finetuning import head
from upright.training.model import Model
from upright.training.restoring import restore

SAMPLE_COUNT = 16
PACKAGES = ("upright", "torch", "onnx", "onnxscript", "onnxruntime")


def export(
    checkpoint: str,
    name: str | None = None,
    force: bool = False,
    data: str | None = None,
    outputs: Sequence[Output] = (),
    opset: int = Form.opset,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    precision: Sequence[PrecisionName] = (),
    max_drop: float = 0.5,
    max_wrong: float = 1.0,
    full_range: bool = False,
    to: str = "export",
    archive: bool = False,
    sign: str | None = None,
    safetensors: bool = False,
    triton: str | None = None,
    wandb: Mode | None = None,
) -> int:
    """Write a bundle, but only if its graphs reproduce PyTorch on the complete validation split.

    Args:
        checkpoint: a checkpoint, or the folder of a run.
        name: name of the bundle; the run's name by default.
        force: replace an existing bundle.
        data: a YAML of data to use instead of the checkpoint's.
        outputs: outputs beside the probabilities: ``theta``, ``warped``, ``votes``, ``confidence``, ``logits``,
            ``features``.
        opset: ONNX opset, from 18 to 25.
        batch: the only batch size that the graph takes; None for any.
        size: the only ``(H, W)`` that the graph takes; None for any.
        precision: precisions besides float32, which every bundle has: ``fp16``, ``int8``.
        max_drop: points of accuracy, from 0 to 100, that each precision may lose.
        max_wrong: percentage of wrong sides that an orientation model may choose above its threshold of confidence.
        full_range: use 8 bits instead of 7 for the weights of ``int8``.
        to: the folder that contains the bundle.
        archive: also write the bundle as one file, ``NAME.upright.zip``.
        sign: a private key that signs the bundle, a PEM file.
        safetensors: also write the weights of the network, ``NAME.safetensors``.
        triton: a Triton model repository that gets copies of the models.
        wandb: ``offline``, ``online`` or ``off``; by default offline if W&B tracks the run, else off.

    Returns:
        The exit code, 0.

    Raises:
        UserError: if the checkpoint or its data cannot be used, or the bundle exists.
        GateError: if ONNX Runtime and PyTorch disagree, or a precision loses too much accuracy.
    """
    form = Form(opset, batch, size, tuple(dict.fromkeys(outputs)))
    precisions: list[PrecisionName] = [each for each in ("fp16", "int8") if each in precision]
    if not 0 <= max_drop <= 100:
        raise UserError(f"--max-drop must be from 0 to 100 points of accuracy, got {max_drop:g}.")
    if not 0 <= max_wrong <= 100:
        raise UserError(f"--max-wrong must be from 0 to 100 percent, got {max_wrong:g}.")
    if full_range and "int8" not in precisions:
        raise UserError("--full-range changes the weights of int8; give --precision int8, too.")
    if name is not None:
        check_name(name)
    signer = read_signer(Path(sign)) if sign else None

    path = find_checkpoint(checkpoint)
    tracking = bundle_mode(wandb, path)
    restored = restore(path, read_data(data) if data else None)
    images, contents = restored.image_data("Parity needs the originals of the validation split"), restored.contents
    if "features" in outputs:
        modules = dict.fromkeys(parameter.rpartition(".")[0] for parameter in sorted(head(restored.classifier)))
        form = replace(form, head=tuple(modules))

    if not images.spec.classes:
        # Rounding can exchange two equal peaks, so parity compares the scores, too.
        form = replace(form, outputs=tuple(dict.fromkeys((*form.outputs, "logits"))))

    name = contents["run"]["name"] if name is None else name
    check_name(name)
    target = Path(to) / name
    check_replaceable(target, "a bundle", SUMS)
    if target.exists() and not force:
        raise UserError(f"Bundle '{target}' exists: --force replaces it, --name writes another one.")
    archive_path, weights_path = target.with_name(name + ARCHIVE_SUFFIX), target.with_name(f"{name}.safetensors")
    for wanted, each in ((archive, archive_path), (safetensors, weights_path)):
        if wanted and each.exists() and not force:
            raise UserError(f"'{each}' exists: --force replaces it, --name writes another one.")
    if safetensors and find_spec("safetensors") is None:
        raise UserError("--safetensors needs the package safetensors: pip install 'upright[timm]'.")
    folders = {}
    if triton is not None:
        folders = model_folders(Path(triton), name, ("fp32", *precisions), target, force)
        check_labels(images.spec.classes)

    with replacing_folder(target) as folder:
        print(f"Exporting '{checkpoint}' (opset {opset}) ...", flush=True)
        reference = Reference(restored.classifier.cpu().model.eval(), images, form)
        split = contents["split"]
        excluded = torch.cat([split["hashes"][part] for part in ("val", "test")]) if split else torch.empty(0).long()
        parity, descriptions, stable = _write_graphs(
            folder, reference, precisions, max_drop, max_wrong, full_range, excluded
        )
        manifest = _manifest(name, contents, reference, descriptions)
        if orientation := parity.get("orientation"):
            manifest["orientation"] = {"threshold": orientation["threshold"]}
        _write_samples(folder, reference, list(descriptions), stable)
        write_json(folder / PARITY, parity)
        write_json(folder / MANIFEST, manifest)
        (folder / "README.md").write_text(card(manifest, parity), encoding="utf-8")
        write_json(
            folder / BOM,
            bom(manifest, parity, {MODELS[each]: file_hash(folder / MODELS[each]) for each in descriptions}),
        )
        if signer:
            write_signature(folder / SIGNATURE, target, file_hashes(folder), signer)
        (folder / SUMS).write_text(checksums(folder))

    log_bundle(tracking, path, target)
    for line in summary(parity, task_of(images.spec.classes)):
        print(line)
    if folders:
        write_models(Bundle.open(target), folders)
        print(f"Triton: {', '.join(map(str, folders.values()))}")
    if safetensors:
        write_weights(restored.classifier.model, weights_path)
        print(f"Weights: {weights_path}")
    if archive:
        write_archive(target, archive_path)
        print(f"Archive: {archive_path}")
    print(f"Bundle: {target}\nNext:   upright verify {target}")
    return 0


def _write_graphs(
    folder: Path,
    reference: Reference,
    precisions: Sequence[PrecisionName],
    max_drop: float,
    max_wrong: float,
    full_range: bool,
    excluded: torch.Tensor,
) -> tuple[dict[str, Any], dict[str, Any], npt.NDArray[np.bool_]]:
    """Write a model for each precision that passes its gate.

    Returns:
        The content of ``parity.json``, the precisions of the manifest, and `Comparison.stable`.
    """
    model, data, form = reference.graph.model, reference.data, reference.form
    path = folder / MODELS["fp32"]
    write_graph(model, path, form)
    session = open_session(path)
    print("Comparing with PyTorch on the originals of the validation split ...", flush=True)
    exact = reference.compare(session)
    check_exact(exact)
    comparisons = {"fp32": exact}
    descriptions: dict[str, Any] = {
        "fp32": {"tolerance": TOLERANCES["fp32"], "how": "float32 throughout", "float_layers": {}}
    }
    calibration = partial(calibration_batches, data, excluded, form)
    for name in precisions:
        print(f"Converting to {name} and comparing again ...", flush=True)
        with tempfile.TemporaryDirectory() as workspace:
            converter: Converter = (
                Float16(path, model.network)
                if name == "fp16"
                else Int8(path, model.network, calibration, Path(workspace), full_range)
            )
            result = convert_within(converter, reference.compare, session, calibration, max_drop)
        (folder / MODELS[name]).write_bytes(result.content)
        comparisons[name] = result.comparison
        descriptions[name] = {
            "tolerance": TOLERANCES[name],
            "how": converter.description,
            "float_layers": result.float_layers,
        }
    metrics = {name: comparison.metrics() for name, comparison in comparisons.items()}
    for each, values in metrics.items():
        values["bytes"] = (folder / MODELS[each]).stat().st_size
    print("Measuring the speed ...", flush=True)
    image = next(fitted_originals(data, form)).pixels
    sessions = {name: open_session(folder / MODELS[name], threads=1) for name in metrics}
    for each, speeds in speeds_by_batch(sessions, image).items():
        metrics[each]["speed"] = speeds
    parity: dict[str, Any] = {
        "split": "val",
        "images": len(exact.names),
        "sources": int(exact.groups[-1]) + 1,
        "max_drop": max_drop,
        "smallest_drop_to_tell": exact.drop.resolution,
        "accuracy": {"pytorch": exact.accuracy(exact.expected), "cached_pipeline": cached_accuracy(model, data)},
        "machine": machine() | {"threads": 1},
        "precisions": metrics,
    }
    if not data.spec.classes:
        parity["orientation"] = {"max_wrong": max_wrong} | choose_threshold(exact, max_wrong)._asdict()
    return parity, descriptions, exact.stable


def _write_samples(
    folder: Path, reference: Reference, precisions: Sequence[str], stable: npt.NDArray[np.bool_]
) -> None:
    """Write validation images with stable answers as PNG, with the answers of each graph."""
    data, task = reference.data, reference.task
    sessions = {name: open_session(folder / MODELS[name]) for name in precisions}
    candidates = np.flatnonzero(stable) if stable.any() else np.arange(len(stable))
    places = np.linspace(0, len(candidates) - 1, min(SAMPLE_COUNT, len(candidates))).astype(int)
    sample_indices = set(candidates[places].tolist())
    (folder / SAMPLES).mkdir()
    samples: list[dict[str, Any]] = []
    for i, original in enumerate(fitted_originals(data, reference.form)):
        if i in sample_indices:
            file = f"{SAMPLES}/{len(samples):02d}.png"
            write_png(folder / file, original)
            sample = {"file": file, "name": original.name, "label": task.label(original.label)}
            rows = {name: run_batch(each, original.pixels[None])[0][0].tolist() for name, each in sessions.items()}
            samples.append(sample | {task.output: rows})
    write_json(folder / EXPECTED, samples)


def write_weights(model: Model, path: Path) -> None:
    """Write the state dict of the network as safetensors, with the spec as metadata."""
    from safetensors.torch import save_file

    # Tensors may share memory, or have another layout in memory; the format has neither.
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.network.state_dict().items()
    }
    with replacing_file(path) as new:
        save_file(weights, new, {"format": "pt", "upright": json.dumps(model.spec.to_dict())})


def write_png(path: Path, original: Original) -> None:
    """Write the exact pixels of an image."""
    pixels = original.pixels[:, :, 0] if original.pixels.shape[2] == 1 else original.pixels
    Image.fromarray(pixels).save(path)


def _manifest(name: str, contents: dict[str, Any], reference: Reference, precisions: dict[str, Any]) -> dict[str, Any]:
    data, form = reference.data, reference.form
    batch, (height, width) = form.batch or "batch", form.size or ("height", "width")
    task = reference.task
    return {
        "format": FORMAT,
        "name": name,
        **spec_entries(reference.graph.model.spec),
        "input": {"name": "images", "dtype": "uint8", "shape": [batch, height, width, data.spec.channels]},
        "output": {"name": task.output, "dtype": "float32", "shape": [batch, task.columns]},
        "other_outputs": reference.graph.names[1:],
        "opset": form.opset,
        "precisions": precisions,
        "provenance": {
            "versions": {package: version(package) for package in PACKAGES},
            "run": contents["run"],
            "git_commit": contents["git_commit"],
            "model": contents["model"],
            "data": data.recipe,
            "split": {"digest": data.manifest.digest, "counts": data.manifest.counts},
            "metrics": contents["metrics"],
        },
    }
