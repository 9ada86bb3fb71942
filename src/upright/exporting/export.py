"""``upright export``: write a verified bundle of a checkpoint.

The steps are: restore the checkpoint, write the graph, compare it with PyTorch, convert it to lower precisions, and
write samples, manifest, card and hashes.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from upright.checkpoint import find_checkpoint
from upright.data.configs import read_data
from upright.errors import UserError
from upright.exporting.abstention import measure, voting_transformer
from upright.exporting.apart import ANGLES
from upright.exporting.bom import BOM, bom
from upright.exporting.card import card, summary
from upright.exporting.gate import Batches, check_exact, convert_within
from upright.exporting.graph import Form, write_graph
from upright.exporting.parity import (
    Comparison,
    Reference,
    cached_accuracy,
    calibration_batches,
    choose_threshold,
    fitted_originals,
)
from upright.exporting.precision import TOLERANCES, Converter, Float16, Int8, PrecisionName
from upright.exporting.records import SAMPLE_COUNT, check_target, new_manifest, seal, write_records
from upright.exporting.triton import check_labels, model_folders, write_models
from upright.files import check_name, file_hash, replacing_file, replacing_folder
from upright.images import Pixels
from upright.options import Export, with_arguments_of
from upright.runs.tracking import bundle_mode, log_bundle
from upright.runtime.bundle import (
    ARCHIVE_SUFFIX,
    MODELS,
    Bundle,
    write_archive,
    write_json,
)
from upright.runtime.predictor import open_session
from upright.runtime.signature import read_signer
from upright.runtime.speed import machine, speeds_by_batch
from upright.runtime.task import MultiLabel
from upright.training.finetuning import head
from upright.training.model import Model
from upright.training.module import ImageModule
from upright.training.restoring import restore


@with_arguments_of(Export)
def export(options: Export) -> int:
    """Write a bundle, but only if its graphs reproduce PyTorch on the complete validation split.

    Call it with the path of a checkpoint, and the options of the command ``upright export`` by name, with underscores:
    ``name="mine"``, ``force=True``, ``precision=("int8",)``.

    Returns:
        The exit code, 0.

    Raises:
        UserError: if the checkpoint or its data cannot be used, or the bundle exists.
        GateError: if ONNX Runtime and PyTorch disagree, or a precision loses too much accuracy.
    """
    form = Form(options.opset, options.batch, options.size, tuple(dict.fromkeys(options.outputs)))
    precisions: list[PrecisionName] = [each for each in ("fp16", "int8") if each in options.precision]
    limits = {"--max-drop": (options.max_drop, "points of accuracy"), "--max-wrong": (options.max_wrong, "percent")}
    for flag, (value, unit) in limits.items():
        if not 0 <= value <= 100:
            raise UserError(f"{flag} must be from 0 to 100 {unit}, got {value:g}.")
    if options.full_range and "int8" not in precisions:
        raise UserError("--full-range changes the weights of int8; give --precision int8, too.")
    if options.name is not None:
        check_name(options.name)
    signer = read_signer(Path(options.sign)) if options.sign else None

    path = find_checkpoint(options.checkpoint)
    tracking = bundle_mode(options.wandb, path)
    restored = restore(path, read_data(options.data) if options.data else None)
    images, contents = restored.image_data("Parity needs the originals of the validation split"), restored.contents
    if "features" in form.outputs:
        form = replace(form, head=head_modules(restored.classifier))
    if not images.spec.classes:
        # Rounding can exchange two equal peaks, so parity compares the scores, too.
        form = replace(form, outputs=tuple(dict.fromkeys((*form.outputs, "logits"))))

    name = contents["run"]["name"] if options.name is None else options.name
    check_name(name)
    target = Path(options.to) / name
    check_target(target, options.force, "--name")
    archive_path, weights_path = target.with_name(name + ARCHIVE_SUFFIX), target.with_name(f"{name}.safetensors")
    for wanted, each in ((options.archive, archive_path), (options.safetensors, weights_path)):
        if wanted and each.exists() and not options.force:
            raise UserError(f"'{each}' exists: --force replaces it, --name writes another one.")
    if options.safetensors and find_spec("safetensors") is None:
        raise UserError("--safetensors needs the package safetensors: pip install 'upright[timm]'.")
    folders = {}
    if options.triton is not None:
        folders = model_folders(Path(options.triton), name, ("fp32", *precisions), target, options.force)
        check_labels(images.spec.classes)

    model, threshold, effect = restored.classifier.cpu().model.eval(), 0.0, None
    if options.threshold is not None or options.max_harm is not None:
        option = "--threshold" if options.max_harm is None else "--max-harm"
        transformer = voting_transformer(model, option)
        count = len(images.splits["val"])
        print(f"Measuring harm and gain on {count} images in {len(ANGLES)} rotations ...", flush=True)
        answers = measure(model, images, option, form.size)
        chosen = options.threshold if options.max_harm is None else answers.smallest_threshold(options.max_harm)
        transformer.threshold = threshold = float(np.float32(chosen))
        effect = answers.effect(threshold)
        form = replace(form, outputs=tuple(dict.fromkeys((*form.outputs, "confidence"))))

    with replacing_folder(target) as folder:
        print(f"Exporting '{options.checkpoint}' (opset {form.opset}) ...", flush=True)
        reference = Reference(model, images, form, threshold)
        split = contents["split"]
        excluded = torch.cat([split["hashes"][part] for part in ("val", "test")]) if split else torch.empty(0).long()
        calibration = partial(calibration_batches, images, excluded, form)
        comparisons, descriptions = _write_graphs(folder, reference, precisions, options, calibration)
        exact = comparisons["fp32"]
        parity = _parity(folder, reference, comparisons) | {"max_drop": options.max_drop}
        manifest = _manifest(name, contents, reference, descriptions)
        if isinstance(reference.task, MultiLabel):
            thresholds = reference.task.thresholds
            parity["multilabel"] = {"thresholds": thresholds}
            manifest["multilabel"] = {"thresholds": list(thresholds.values())}
        if not images.spec.classes:
            confidence = choose_threshold(exact, options.max_wrong)
            parity["orientation"] = {"max_wrong": options.max_wrong, **confidence._asdict()}
            manifest["orientation"] = {"threshold": confidence.threshold}
        if effect:
            parity |= {"angles": ANGLES, "max_harm": options.max_harm, "effect": effect}
            manifest["orientation"] = {"threshold": threshold}
        write_records(folder, manifest, parity, card(manifest, parity), _samples(reference, exact.stable))
        hashes = {MODELS[each]: file_hash(folder / MODELS[each]) for each in descriptions}
        write_json(folder / BOM, bom(manifest, parity, hashes))
        seal(folder, target, signer)

    log_bundle(tracking, path, target)
    for line in summary(parity, reference.task):
        print(line)
    if folders:
        write_models(Bundle.open(target), folders)
        print(f"Triton: {', '.join(map(str, folders.values()))}")
    if options.safetensors:
        write_weights(restored.classifier.model, weights_path)
        print(f"Weights: {weights_path}")
    if options.archive:
        write_archive(target, archive_path)
        print(f"Archive: {archive_path}")
    print(f"Bundle: {target}\nNext:   upright verify {target}")
    return 0


def head_modules(classifier: ImageModule) -> tuple[str, ...]:
    """Return the modules of the network that form its head, for `Form`."""
    return tuple(dict.fromkeys(parameter.rpartition(".")[0] for parameter in sorted(head(classifier))))


def _write_graphs(
    folder: Path,
    reference: Reference,
    precisions: Sequence[PrecisionName],
    options: Export,
    calibration: Batches,
) -> tuple[dict[str, Comparison], dict[str, Any]]:
    """Write a model for each precision that passes its gate. Return its comparison, and its entry in the manifest."""
    model, path = reference.graph.model, folder / MODELS["fp32"]
    write_graph(model, path, reference.form)
    session = open_session(path)
    print("Comparing with PyTorch on the originals of the validation split ...", flush=True)
    comparisons: dict[str, Comparison] = {"fp32": reference.compare(session)}
    check_exact(comparisons["fp32"])
    descriptions: dict[str, dict[str, Any]] = {
        "fp32": {"tolerance": TOLERANCES["fp32"], "how": "float32 throughout", "float_layers": {}}
    }
    for name in precisions:
        print(f"Converting to {name} and comparing again ...", flush=True)
        with tempfile.TemporaryDirectory() as workspace:
            converter: Converter = (
                Float16(path, model.network)
                if name == "fp16"
                else Int8(path, model.network, calibration, Path(workspace), options.full_range)
            )
            result = convert_within(converter, reference.compare, session, calibration, options.max_drop)
        (folder / MODELS[name]).write_bytes(result.content)
        comparisons[name] = result.comparison
        descriptions[name] = {
            "tolerance": TOLERANCES[name],
            "how": converter.description,
            "float_layers": result.float_layers,
        }
    return comparisons, descriptions


def _parity(folder: Path, reference: Reference, comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Return the content of ``parity.json`` except limits and threshold."""
    print("Measuring the speed ...", flush=True)
    image = next(fitted_originals(reference.data, reference.form)).pixels
    sessions = {name: open_session(folder / MODELS[name], threads=1) for name in comparisons}
    speeds = speeds_by_batch(sessions, image)
    exact = comparisons["fp32"]
    cached = cached_accuracy(reference.graph.model, reference.data, reference.task)
    return {
        "split": "val",
        "images": len(exact.names),
        "sources": int(exact.groups[-1]) + 1,
        "smallest_drop_to_tell": exact.drop.resolution,
        "accuracy": {"pytorch": exact.accuracy(exact.expected), "cached_pipeline": cached},
        "machine": machine() | {"threads": 1},
        "precisions": {
            name: each.metrics() | {"bytes": (folder / MODELS[name]).stat().st_size, "speed": speeds[name]}
            for name, each in comparisons.items()
        },
    }


def _samples(reference: Reference, stable: npt.NDArray[np.bool_]) -> Iterator[tuple[dict[str, Any], Pixels]]:
    """Yield evenly spaced validation images with stable answers, and their descriptions."""
    candidates = np.flatnonzero(stable) if stable.any() else np.arange(len(stable))
    places = np.linspace(0, len(candidates) - 1, min(SAMPLE_COUNT, len(candidates))).astype(int)
    chosen = set(candidates[places].tolist())
    for i, original in enumerate(fitted_originals(reference.data, reference.form)):
        if i in chosen:
            yield {"name": original.name, "label": reference.task.label(original.label)}, original.pixels


def write_weights(model: Model, path: Path) -> None:
    """Write the state dict of the network as safetensors, with the spec as metadata."""
    from safetensors.torch import save_file

    # Tensors may share memory, or have another layout in memory; the format has neither.
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.network.state_dict().items()
    }
    with replacing_file(path) as new:
        save_file(weights, new, {"format": "pt", "upright": json.dumps(model.spec.to_dict())})


def _manifest(name: str, contents: dict[str, Any], reference: Reference, precisions: dict[str, Any]) -> dict[str, Any]:
    data, form = reference.data, reference.form
    shape = (form.batch or "batch", *(form.size or ("height", "width")))
    manifest = new_manifest(name, reference.graph.model.spec, shape, ("torch", "onnx", "onnxscript", "onnxruntime"))
    manifest["provenance"] |= {
        **{key: contents[key] for key in ("run", "git_commit", "model", "metrics")},
        "data": data.recipe,
        "split": {"digest": data.manifest.digest, "counts": data.manifest.counts},
    }
    return manifest | {"other_outputs": reference.graph.names[1:], "opset": form.opset, "precisions": precisions}
