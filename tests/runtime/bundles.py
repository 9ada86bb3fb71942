"""Bundles for tests: of untrained networks with any spec and any form, and of a graph that computes an orientation."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import FLOAT, UINT8, script
from onnxscript import opset18 as op
from PIL import Image
from torch import nn

from upright.architectures.mlp import MLP
from upright.architectures.nin import NiN
from upright.exporting.graph import Form, Graph, write_graph
from upright.images import ImageSpec, Pixels
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODELS, SAMPLES, SUMS, checksums, spec_entries
from upright.runtime.predictor import open_session, run_batch
from upright.training.model import Model


def write_unresized_bundle(folder: Path) -> Path:
    """Write a bundle of a network that does not resize its images and fails on small ones."""
    spec = ImageSpec(1, 20, 20, ("a", "b"), (0.4,), (0.5,), resize="none")
    return write_bundle(folder, spec, partial(NiN, widths=(4, 4, 4), stem=(5, 1, 2)))


def write_bundle(
    folder: Path, spec: ImageSpec, network: Callable[[tuple[int, int, int], int], nn.Module], form: Form | None = None
) -> Path:
    """Write a complete bundle into ``folder``, with four samples of noise."""
    form = form or Form()
    torch.manual_seed(0)
    model = Model(spec, network(spec.input_shape, len(spec.classes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Without this, an untrained transformer is the identity.
            parameter.add_(0.05 * torch.randn_like(parameter))
    (folder / SAMPLES).mkdir(parents=True)
    write_graph(model, folder / MODELS["fp32"], form)
    height, width = form.size or (spec.height + 3, spec.width + 7)
    noise = [np.random.default_rng(n).integers(0, 256, (height, width, spec.channels), np.uint8) for n in range(4)]
    shape = [form.batch or "batch", *(form.size or ("height", "width")), spec.channels]
    return _complete(folder, spec, noise, shape, Graph(model, form).names, type(model.network).__name__)


def write_multilabel_bundle(folder: Path) -> Path:
    """Write a bundle of an untrained network with several classes per image. Half of the samples have each class."""
    spec = ImageSpec(1, 8, 8, ("cat", "dog", "indoor"), (0.4,), (0.5,), multilabel=True)
    write_bundle(folder, spec, partial(MLP, widths=[16]))
    rows = [sample["probabilities"]["fp32"] for sample in json.loads((folder / EXPECTED).read_text())]
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["multilabel"] = {"thresholds": np.median(rows, axis=0).tolist()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SUMS).write_text(checksums(folder))
    return folder


@script(default_opset=op)
def brightness(images):  # type: ignore[no-untyped-def]
    """Estimate the orientation of images whose upper half is the bright one.

    ``theta`` points from the centre of an image to its centre of brightness. This is up in an upright image. The angle
    of ``theta`` to this is the orientation, and its length the confidence.
    """
    grey = op.ReduceMean(op.Cast(images, to=1), [-1], keepdims=0)
    height, width = op.Split(op.Cast(op.Shape(images, start=1, end=3), to=1), num_outputs=2)
    x = 2.0 * (op.Range(0.0, op.Squeeze(width), 1.0) + 0.5) / width - 1.0
    y = 1.0 - 2.0 * (op.Range(0.0, op.Squeeze(height), 1.0) + 0.5) / height
    total = op.Max(op.ReduceSum(grey, [1, 2], keepdims=0), 1e-9)
    sine = -op.ReduceSum(grey * x, [1, 2], keepdims=0) / total
    cosine = op.ReduceSum(grey * op.Unsqueeze(y, [1]), [1, 2], keepdims=0) / total
    theta = op.Concat(op.Unsqueeze(sine, [1]), op.Unsqueeze(cosine, [1]), axis=1)
    length = op.Sqrt(sine * sine + cosine * cosine)
    size = op.Acos(cosine / op.Max(length, 1e-9)) * 57.29577951308232
    angle = op.Where(sine < 0.0, -size, size)
    orientation = op.Concat(op.Unsqueeze(angle, [1]), op.Unsqueeze(op.Min(length, 1.0), [1]), axis=1)
    return orientation, theta


def photograph(angle: float, side: int = 40, channels: int = 1) -> Pixels:
    """Return a picture that is bright at the top, rotated by ``angle`` degrees anticlockwise."""
    y, x = ((2 * np.indices((side, side)) + 1) / side - 1) * [[[-1]], [[1]]]
    slope = -x * np.sin(np.deg2rad(angle)) + y * np.cos(np.deg2rad(angle))
    return np.repeat((127 + 85 * slope).round().astype(np.uint8)[..., None], channels, axis=2)


ANGLES = (0.0, 30.0, -90.0, 180.0)
"""Angles of the samples of an orientation bundle."""


def write_orientation_bundle(
    folder: Path, channels: int = 1, side: int | None = None, batch: int | None = None
) -> Path:
    """Write a complete bundle of `brightness` into ``folder``, with a photograph for each of `ANGLES`.

    Args:
        folder: folder of the bundle.
        channels: 1 or 3.
        side: side of the images, if it is fixed.
        batch: number of images in a batch, if it is fixed.
    """
    spec = ImageSpec(channels, 32, 32, (), (0.5,) * channels, (0.5,) * channels)
    (folder / SAMPLES).mkdir(parents=True)
    shape = [batch or "batch", *((side, side) if side else ("height", "width")), channels]
    model = brightness.to_model_proto(input_types=[UINT8[tuple(shape)]], output_types=[FLOAT[shape[0], 2]] * 2)
    onnx.helper.set_model_props(model, {"upright": json.dumps({"classes": [], "format": FORMAT})})
    onnx.save(model, folder / MODELS["fp32"])
    photographs = [photograph(angle, side or 40, channels) for angle in ANGLES]
    return _complete(folder, spec, photographs, shape, ["orientation", "theta"], "Brightness")


def _complete(
    folder: Path,
    spec: ImageSpec,
    images: Sequence[Pixels],
    shape: list[Any],
    outputs: list[str],
    network: str,
) -> Path:
    """Add samples, manifest and hashes to the folder of a model."""
    session = open_session(folder / MODELS["fp32"])
    rows = [run_batch(session, image[None])[0][0] for image in images]
    samples = []
    for number, (pixels, row) in enumerate(zip(images, rows, strict=True)):
        file = f"{SAMPLES}/{number:02d}.png"
        Image.fromarray(pixels.squeeze()).save(folder / file)
        label = {"label": spec.classes[0]} if spec.classes else {}
        samples.append({"file": file, outputs[0]: {"fp32": row.tolist()}} | label)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        **spec_entries(spec),
        "input": {"shape": shape},
        "other_outputs": outputs[1:],
        "precisions": {"fp32": {"tolerance": 1e-4}},
        "provenance": {
            "versions": {"upright": "0.1.0"},
            "model": {"network": network},
            "data": {"root": "/home/somebody"},
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / EXPECTED).write_text(json.dumps(samples))
    (folder / SUMS).write_text(checksums(folder))
    return folder
