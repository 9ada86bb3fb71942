"""Bundles of untrained networks, with any spec and any form."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from upright.architectures.nin import NiN
from upright.exporting.graph import Form, Graph, write_graph
from upright.images import ImageSpec
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODELS, SAMPLES, SUMS, checksums
from upright.runtime.predictor import open_session, run_session
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
    session = open_session(folder / MODELS["fp32"])
    height, width = form.size or (spec.height + 3, spec.width + 7)
    samples = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, spec.channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / SAMPLES / f"{number:02d}.png")
        (probabilities,) = run_session(session, [pixels], 1)
        file = f"{SAMPLES}/{number:02d}.png"
        samples.append({"file": file, "label": spec.classes[0], "probabilities": {"fp32": probabilities.tolist()}})
    plain_spec = spec.to_dict()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        "mask": plain_spec.pop("mask"),
        "interpolation": plain_spec.pop("interpolation"),
        "spec": plain_spec,
        "input": {"shape": [form.batch or "batch", *(form.size or ("height", "width")), spec.channels]},
        "other_outputs": Graph(model, form).names[1:],
        "precisions": {"fp32": {"tolerance": 1e-4}},
        "provenance": {
            "versions": {"upright": "0.1.0"},
            "model": {"network": type(model.network).__name__},
            "data": {"root": "/home/somebody"},
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / EXPECTED).write_text(json.dumps(samples))
    (folder / SUMS).write_text(checksums(folder))
    return folder
