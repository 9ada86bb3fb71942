"""``upright export``: checkpoint -> bundle, which appears whole or not at all."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from upright.checkpoint import find_checkpoint
from upright.data.configs import read_data
from upright.data.datamodule import ImageDataModule
from upright.data.source import Original
from upright.errors import UserError
from upright.exporting.card import card, summary
from upright.exporting.gate import check_exact, gated
from upright.exporting.graph import Form, Graph, Output, write_graph
from upright.exporting.parity import PyTorch, cached_accuracy, calibration_batches, compare, fitted_originals
from upright.exporting.precision import TOLERANCES, Half, Int8, Lowered, PrecisionName
from upright.exporting.triton import check_labels, model_folders, write_models
from upright.files import check_name, check_replaceable, replacing_folder
from upright.images import Pixels
from upright.runs.tracking import Mode, bundle_mode, log_bundle
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODELS, SAMPLES, SUMS, Bundle, checksums
from upright.runtime.predictor import open_session, run_batch, run_session
from upright.runtime.speed import machine, side_by_side, turn
from upright.training.finetuning import head
from upright.training.restoring import Restored, restore

SAMPLE_COUNT = 16
BATCHES = (1, 64)


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
    full_range: bool = False,
    to: str = "export",
    triton: str | None = None,
    wandb: Mode | None = None,
) -> int:
    """Export, compare with PyTorch on the whole validation split, and only then show the bundle.

    Args:
        checkpoint: a checkpoint, or the folder of a run.
        name: of the bundle; the run's by default.
        force: replace an existing bundle.
        data: a YAML of the data, if they are not where they were.
        outputs: what the graph gives beside probabilities, see `Form`.
        opset: of ONNX.
        batch: how many images the graph takes, any number by default.
        size: ``(H, W)`` of the images that it takes, any by default.
        precision: what else than float32, which is always there: the others are measured by it.
        max_drop: by how many points accuracy may fall with each of them.
        full_range: see `Int8`.
        to: the folder that the bundle is put in.
        triton: a Triton model repository that its models are copied to, see `triton.write_models`.
        wandb: whether and how the bundle is noted there, see `bundle_mode`.

    Raises:
        UserError: if the checkpoint or its data cannot be used, or the bundle exists.
        GateError: if ONNX Runtime and PyTorch do not agree, or a precision loses too much; no bundle is written.
    """
    form = Form(opset, batch, size, tuple(dict.fromkeys(outputs)))
    lower = [name for name in MODELS if name in precision and name != "fp32"]
    if not 0 <= max_drop <= 100:
        raise UserError(f"--max-drop is in points of accuracy, from 0 to 100; got {max_drop:g}.")
    if full_range and "int8" not in lower:
        raise UserError("--full-range is of int8's weights; it needs --precision int8.")
    if name is not None:
        check_name(name)
    tracking = bundle_mode(wandb, find_checkpoint(checkpoint))
    restored = restore(checkpoint, read_data(data) if data else None)
    name = restored.contents["run"]["name"] if name is None else name
    check_name(name)
    target = Path(to) / name
    check_replaceable(target, "a bundle", SUMS)
    if target.exists() and not force:
        raise UserError(f"Bundle '{target}' exists: --force replaces it, --name gives this one another name.")
    models = {}
    if triton is not None:
        models = model_folders(Path(triton), name, ("fp32", *lower), target, force)
        check_labels(restored.data.spec.classes)
    if "features" in outputs:
        modules = dict.fromkeys(parameter.rpartition(".")[0] for parameter in sorted(head(restored.classifier)))
        form = replace(form, head=tuple(modules))
    with replacing_folder(target) as folder:
        print(f"Exporting '{checkpoint}' (opset {opset}) ...", flush=True)
        parity, described = _write_models(folder, restored, form, lower, max_drop, full_range)
        _write_json(folder / "parity.json", parity)
        _write_samples(folder, restored.data, form, list(described))
        outputs_given = Graph(restored.classifier.model, form).names[1:]
        manifest = _manifest(restored.contents, restored.data, name, form, outputs_given, described)
        _write_json(folder / MANIFEST, manifest)
        (folder / "README.md").write_text(card(manifest, parity), encoding="utf-8")
        (folder / SUMS).write_text(checksums(folder))
    log_bundle(tracking, find_checkpoint(checkpoint), target)
    for line in summary(parity, max_drop):
        print(line)
    if models:
        write_models(Bundle.open(target), models)
        print(f"Triton: {', '.join(map(str, models.values()))}")
    print(f"Bundle: {target}\nNext:   upright verify {target}")
    return 0


def _write_models(
    folder: Path, restored: Restored, form: Form, lower: Sequence[str], max_drop: float, full_range: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file for each precision, if its gate holds: what ``parity.json`` and the manifest say of them."""
    model, data = restored.classifier.cpu().model.eval(), restored.data
    classes = data.spec.classes
    path, pytorch = folder / MODELS["fp32"], PyTorch(model, form)
    write_graph(model, path, form)
    session = open_session(path)
    print("Comparing with PyTorch on the validation split's originals ...", flush=True)
    comparison = compare(pytorch, session, data)
    check_exact(comparison, classes)
    figures = {"fp32": comparison.figures(classes)}
    described = {"fp32": {"tolerance": TOLERANCES["fp32"], "how": "float32 throughout", "float_layers": {}}}
    split = restored.contents["split"]
    judges = torch.cat([split["hashes"][part] for part in ("val", "test")]) if split else torch.empty(0).long()
    calibration = partial(calibration_batches, data, judges, form)
    kinds: dict[str, Callable[[], Lowered]] = {
        "fp16": lambda: Half(path, model.network),
        "int8": lambda: Int8(path, model.network, calibration, Path(workspace), full_range),
    }
    for name in lower:
        print(f"Lowering to {name}, comparing again ...", flush=True)
        with tempfile.TemporaryDirectory() as workspace:
            lowered = kinds[name]()
            passed = gated(lowered, lambda session: compare(pytorch, session, data), session, calibration, max_drop)
        (folder / MODELS[name]).write_bytes(passed.content)
        figures[name] = passed.comparison.figures(classes)
        described[name] = {
            "tolerance": TOLERANCES[lowered.name],
            "how": lowered.description(),
            "float_layers": passed.floats,
        }
    speeds = {}
    if lower:
        print("Timing them side by side ...", flush=True)
        image = next(fitted_originals(data, "val", form)).pixels
        speeds = _speeds({name: folder / MODELS[name] for name in figures}, image, form)
    for name, figure in figures.items():
        figure["bytes"] = (folder / MODELS[name]).stat().st_size
        figure |= {"speed": speeds[name]} if speeds else {}
    return {
        "split": "val",
        "images": len(comparison.names),
        "sources": int(comparison.groups[-1]) + 1,
        "max_drop": max_drop,
        "smallest_drop_to_tell": comparison.drop.resolution,
        "accuracy": {
            "pytorch": float((comparison.expected.argmax(axis=1) == comparison.labels).mean()),
            "cached_pipeline": cached_accuracy(model, data),
        },
        "machine": machine() | {"threads": 1},
        "precisions": figures,
    }, described


def _speeds(models: dict[str, Path], image: Pixels, form: Form) -> dict[str, Any]:
    """Of each precision by batch, on one thread; the first one is what the others are measured by."""
    sessions = {name: open_session(path, threads=1) for name, path in models.items()}
    found: dict[str, Any] = {name: {} for name in models}
    for batch in [form.batch] if form.batch else BATCHES:
        images = np.repeat(image[None], batch, axis=0)
        turns = {
            name: partial(turn, partial(run_batch, session, images), time.process_time)
            for name, session in sessions.items()
        }
        for name, speed in side_by_side(turns).items():
            figures = {"milliseconds": speed.p50, "times_fp32": speed.times, "quartiles": list(speed.quartiles)}
            found[name][str(batch)] = figures
    return found


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_samples(folder: Path, data: ImageDataModule, form: Form, precisions: Sequence[str]) -> None:
    """Real validation images as PNG, with what each graph says of them."""
    sessions = {name: open_session(folder / MODELS[name]) for name in precisions}
    count = len(list(data.names("val")))
    chosen = set(np.linspace(0, count - 1, min(SAMPLE_COUNT, count)).astype(int).tolist())
    (folder / SAMPLES).mkdir()
    expected: list[dict[str, Any]] = []
    for original in (original for i, original in enumerate(fitted_originals(data, "val", form)) if i in chosen):
        number = len(expected)
        file = f"{SAMPLES}/{number:02d}.png"
        write_png(folder / file, original)
        said = {name: next(run_session(session, [original.pixels], 1)).tolist() for name, session in sessions.items()}
        sample = {"file": file, "name": original.name, "label": data.spec.classes[original.label]}
        expected.append(sample | {"probabilities": said})
    _write_json(folder / EXPECTED, expected)


def write_png(path: Path, original: Original) -> None:
    """The very pixels, losslessly."""
    pixels = original.pixels[:, :, 0] if original.pixels.shape[2] == 1 else original.pixels
    Image.fromarray(pixels).save(path)


def _manifest(
    contents: dict[str, Any],
    data: ImageDataModule,
    name: str,
    form: Form,
    outputs: list[str],
    described: dict[str, Any],
) -> dict[str, Any]:
    packages = ("upright", "torch", "onnx", "onnxscript", "onnxruntime")
    height, width = form.size or ("height", "width")
    batch = form.batch or "batch"
    return {
        "format": FORMAT,
        "name": name,
        "spec": data.spec.to_dict(),
        "input": {"name": "images", "dtype": "uint8", "shape": [batch, height, width, data.spec.channels]},
        "output": {"name": "probabilities", "dtype": "float32", "shape": [batch, len(data.spec.classes)]},
        "other_outputs": outputs,
        "opset": form.opset,
        "precisions": described,
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
