"""Parts for `upright attach`, written without torch: an orientation bundle, foreign classifiers, and images for both.

Upright images are brighter at the top. Each class has one colour at the left, and the complementary one at the right.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, parser
from PIL import Image

from upright.images import ImageSpec
from upright.runtime.bundle import EXPECTED, FORMAT, MANIFEST, MODELS, SAMPLES, SUMS, checksums, spec_entries
from upright.runtime.predictor import open_session, run_batch

COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], np.float32)
CLASSES = ("red", "green", "blue", "yellow")
SIDE = 16

# The direction from the centre of the image to the centre of its brightness is up in an upright image.
ORIENTATION = """
<ir_version: 8, opset_import: ["" : 18]>
orientation (uint8[batch,height,width,3] images) => (float[batch,2] orientation)
<float half = {0.5}, float zero = {0}, float tiny = {1e-9}, float turn = {180}, float radian = {57.29577951308232},
 int64 first = {0}, int64 one = {1}, int64[1] last = {3}, int64[1] row = {1}, int64[1] column = {2},
 int64[2] plane = {1, 2}, float gain = {8}, float most = {1}>
{
  values = Cast <to = 1> (images)
  light = ReduceMean <keepdims = 0> (values, last)
  shape = Shape (images)
  height_int = Gather (shape, one)
  two = Add (one, one)
  width_int = Gather (shape, two)
  height_float = Cast <to = 1> (height_int)
  width_float = Cast <to = 1> (width_int)
  rows = Range (first, height_int, one)
  columns = Range (first, width_int, one)
  rows_float = Cast <to = 1> (rows)
  columns_float = Cast <to = 1> (columns)
  rows_middle = Add (rows_float, half)
  columns_middle = Add (columns_float, half)
  height_half = Mul (height_float, half)
  width_half = Mul (width_float, half)
  y_line = Sub (rows_middle, height_half)
  x = Sub (columns_middle, width_half)
  y = Unsqueeze (y_line, row)
  sum = ReduceSum <keepdims = 0> (light, plane)
  weighted_x = Mul (light, x)
  weighted_y = Mul (light, y)
  sum_x = ReduceSum <keepdims = 0> (weighted_x, plane)
  sum_y = ReduceSum <keepdims = 0> (weighted_y, plane)
  left = Neg (sum_x)
  up_raw = Neg (sum_y)
  up = Add (up_raw, tiny)
  ratio = Div (left, up)
  half_angle = Atan (ratio)
  degrees = Mul (half_angle, radian)
  sign = Sign (left)
  other_half = Mul (sign, turn)
  below = Less (up, zero)
  added = Where (below, other_half, zero)
  angle = Add (degrees, added)
  squares_x = Mul (sum_x, sum_x)
  squares_y = Mul (sum_y, sum_y)
  squares = Add (squares_x, squares_y)
  length = Sqrt (squares)
  shorter = Min (height_float, width_float)
  extent = Mul (sum, shorter)
  extent_safe = Add (extent, most)
  concentration = Div (length, extent_safe)
  scaled = Mul (concentration, gain)
  confidence = Min (scaled, most)
  angle_column = Unsqueeze (angle, row)
  confidence_column = Unsqueeze (confidence, row)
  orientation = Concat <axis = 1> (angle_column, confidence_column)
}
"""


def image(label: int, height: int, width: int, seed: int, contrast: float = 1.0) -> npt.NDArray[np.uint8]:
    """Return an upright image of a class, ``(height, width, 3)``."""
    generator = np.random.default_rng(seed)
    x = (np.arange(width) + 0.5) / width
    light = 1 - contrast * (np.arange(height) + 0.5)[:, None, None] / height
    colour = np.where(x[:, None] < 0.5, COLOURS[label], 1 - COLOURS[label])
    pixels = light * (40 + 180 * colour) + generator.normal(0, 6, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int = 3) -> Path:
    """Write images of several sizes, one folder per class. Some are too even for a confident orientation."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = image(label, *((24, 24), (20, 31), (33, 18))[i % 3], seed=10 * label + i, contrast=i / (count - 1))
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_orientation_bundle(folder: Path, threshold: float | None = 0.2, channels: int = 3) -> Path:
    """Write a bundle whose graph computes the orientation of an image from its brightness."""
    spec = ImageSpec(channels, SIDE, SIDE, (), (0.5,) * channels, (0.5,) * channels)
    (folder / SAMPLES).mkdir(parents=True)
    model = parser.parse_model(ORIENTATION.replace("width,3]", f"width,{channels}]"))
    helper.set_model_props(model, {"upright": json.dumps({"classes": [], "format": FORMAT})})
    onnx.save(model, folder / MODELS["fp32"])
    session = open_session(folder / MODELS["fp32"])
    samples = []
    for label in range(4):
        pixels, file = image(label, 24, 30, seed=label)[:, :, :channels], f"{SAMPLES}/{label:02d}.png"
        Image.fromarray(pixels.squeeze()).save(folder / file)
        (row,) = run_batch(session, pixels[None])[0]
        samples.append({"file": file, "label": "", "orientation": {"fp32": row.tolist()}})
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        **spec_entries(spec),
        "input": {"shape": ["batch", "height", "width", channels]},
        "other_outputs": [],
        "precisions": {"fp32": {"tolerance": 1e-4}},
        "provenance": {"versions": {"upright": "0.1.0"}, "model": {}},
        **({} if threshold is None else {"orientation": {"threshold": threshold}}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / EXPECTED).write_text(json.dumps(samples))
    (folder / SUMS).write_text(checksums(folder))
    return folder


def weights(side: int = SIDE) -> npt.NDArray[np.float32]:
    """Return the weights ``(3 * side * side, 4)`` of a classifier by the colours at the left and at the right."""
    signs = np.where(np.arange(side) < side / 2, 1, -1)
    colours = 2 * COLOURS - 1
    planes = colours[:, :, None, None] * signs * np.ones((side, 1))  # (4, 3, side, side)
    return (planes.reshape(4, -1).T / side**2).astype(np.float32)


def write_classifier(
    path: Path,
    *,
    dtype: str = "float32",
    layout: str = "nchw",
    shape: tuple[int | str, ...] | None = None,
    opset: int = 18,
    softmax: bool = False,
    ir_version: int = 8,
    names: tuple[str, str, str] = ("input", "output", "features"),
) -> Path:
    """Write a linear classifier with the scores, and the features under them, as outputs."""
    shape = shape or ("N", *((3, SIDE, SIDE) if layout == "nchw" else (SIDE, SIDE, 3)))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    images, scores, features = names
    nodes = [] if dtype == "float32" else [helper.make_node("Cast", [images], ["float"], to=1)]
    nodes += [] if layout == "nchw" else [helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2])]
    nodes += [
        helper.make_node("Flatten", [nodes[-1].output[0] if nodes else images], [features]),
        helper.make_node("MatMul", [features, "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [scores], axis=1)
        if softmax
        else helper.make_node("Identity", ["logits"], [scores]),
    ]
    scale = 1 if dtype != "uint8" else 1 / 64
    side = shape[2] if isinstance(shape[2], int) else SIDE
    constant = numpy_helper.from_array(scale * weights(side), "weights")
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(images, kind, shape)],
        [
            helper.make_tensor_value_info(scores, 1, [shape[0], 4]),
            helper.make_tensor_value_info(features, 1, [shape[0], 768]),
        ],
        [constant],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), path)
    return path
