"""One ONNX graph that straightens images, preprocesses them for a foreign model, and classifies them with it."""

import json
from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, version_converter

from upright.errors import UserError, one_line
from upright.exporting.foreign import HALF, Foreign, Preprocessing
from upright.runtime.bundle import FORMAT
from upright.warp import Padding

OPSET = 18
"""Smallest opset of the graph, and that of Upright's own bundles."""
IMAGES, ORIENTATION, PROBABILITIES, STRAIGHTENED = "images", "orientation", "probabilities", "straightened"


@dataclass(frozen=True)
class Decision:
    """When and how an image is rotated.

    Args:
        threshold: smallest confidence; below it, the image passes unchanged.
        min_angle: smallest angle in degrees; below it, the image passes unchanged.
        padding: values beyond the border of the image.
    """

    threshold: float
    min_angle: float
    padding: Padding


class Nodes(list[onnx.NodeProto]):
    """The nodes of a part of a graph, in their order."""

    def __call__(self, operator: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output.

        Inputs are names of tensors, or constants: a float, an integer, a list of integers, a float32 array.
        """
        names = [each if isinstance(each, str) else self("Constant", value=_tensor(each)) for each in inputs]
        name = f"front/{operator}_{len(self)}"
        self.append(helper.make_node(operator, names, [output or name], name, **attributes))
        return output or name


def _tensor(value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, np.float32 if isinstance(value, float | np.ndarray) else np.int64))


def add_front(n: Nodes, preprocessing: Preprocessing, decision: Decision, opset: int) -> str:
    """Add the nodes from ``images`` and ``orientation`` to ``straightened``, and to the input whose name is returned.

    Each image is put into the top left corner of a square canvas with the longer side of the input. The height of an
    image there is its width in the input if it is rotated by about a quarter turn.
    """
    angle, confidence = (n("Gather", ORIENTATION, column, axis=1) for column in (0, 1))
    is_sure = n("GreaterOrEqual", confidence, float(decision.threshold))
    acts = n("And", is_sure, n("GreaterOrEqual", n("Abs", angle), float(decision.min_angle)))
    radians = n("Mul", angle, pi / 180)
    cos, sin = n("Cos", radians), n("Sin", radians)
    lies = n("And", acts, n("Greater", n("Abs", sin), n("Abs", cos)))

    lengths = n("Gather", n("Shape", IMAGES), [1, 2])
    longer = n("ReduceMax", lengths, keepdims=0)
    positions = n("Add", n("Cast", n("Range", 0, longer, 1), to=onnx.TensorProto.FLOAT), 0.5)  # (S)
    height, width = (n("Cast", n("Gather", lengths, [i]), to=onnx.TensorProto.FLOAT) for i in (0, 1))
    extents = [n("Unsqueeze", n("Where", lies, *pair), [1]) for pair in ((width, height), (height, width))]  # (B, 1)

    # Sample the input at points around its centre, (B, S, S).
    down, across = (
        n("Unsqueeze", n("Sub", positions, n("Mul", extent, 0.5)), [axis])
        for extent, axis in zip(extents, (2, 1), strict=True)
    )
    cos, sin = (n("Unsqueeze", each, [1, 2]) for each in (cos, sin))
    x = n("Add", n("Mul", cos, across), n("Mul", sin, down))
    y = n("Sub", n("Mul", cos, down), n("Mul", sin, across))
    scaled = [n("Unsqueeze", n("Div", each, n("Mul", side, 0.5)), [3]) for each, side in ((x, width), (y, height))]
    pixels = n("Cast", n("Transpose", IMAGES, perm=[0, 3, 1, 2]), to=onnx.TensorProto.FLOAT)
    rotated = n(
        "GridSample",
        pixels,
        n("Concat", *scaled, axis=3),
        mode="bilinear" if opset < 20 else "linear",
        padding_mode=decision.padding,
        align_corners=0,
    )
    unchanged = n("Pad", pixels, n("Concat", [0] * 6, n("Sub", longer, lengths), axis=0))
    canvas = n("Where", n("Unsqueeze", acts, [1, 2, 3]), rotated, unchanged)

    # Resize as `Preprocessing.fit` does, with one box per image.
    spec, sizes = preprocessing.spec, preprocessing.spec.input_shape[1:]
    steps = [n("Div", extent, float(side)) for extent, side in zip(extents, preprocessing.enlarged, strict=True)]
    if spec.resize != "stretch":
        steps = [n("Min" if spec.resize == "crop" else "Max", *steps)] * 2
    rows, columns = (
        n("Unsqueeze", _filter(n, positions, *line), [1]) for line in zip(extents, steps, sizes, strict=True)
    )  # (B, 1, h, S), (B, 1, w, S)
    background = float(spec.background)
    resized = n("MatMul", rows, n("Sub", canvas, background))
    fitted = n("Add", n("MatMul", resized, n("Transpose", columns, perm=[0, 1, 3, 2])), background)
    n("Transpose", fitted, perm=[0, 2, 3, 1], output=STRAIGHTENED)

    if preprocessing.channels == "bgr":
        fitted = n("Gather", fitted, [2, 1, 0], axis=1)
    if preprocessing.dtype == "uint8":
        values = n("Clip", n("Floor", n("Add", fitted, HALF)), 0.0, 255.0)
    else:
        mean, std = (np.float32(255) * np.array(each, np.float32)[:, None, None] for each in (spec.mean, spec.std))
        values = n("Div", n("Sub", fitted, mean), std)
    if preprocessing.layout == "nhwc":
        values = n("Transpose", values, perm=[0, 2, 3, 1])
    return n("Cast", values, to=helper.np_dtype_to_tensor_dtype(np.dtype(preprocessing.dtype)))


def _filter(n: Nodes, positions: str, extent: str, step: str, size: int) -> str:
    """Return the weights ``(B, size, S)`` of the triangle filter that `warp.resize` uses, zero beyond the image."""
    start = n("Mul", n("Sub", extent, n("Mul", step, float(size))), 0.5)
    centres = n("Add", n("Mul", step, np.arange(size, dtype=np.float32) + 0.5), start)  # (B, size)
    distances = n("Abs", n("Sub", positions, n("Unsqueeze", centres, [2])))
    slopes = n("Div", distances, n("Unsqueeze", n("Max", step, 1.0), [2]))
    is_image = n("Unsqueeze", n("Less", positions, extent), [1])
    weights = n("Where", is_image, n("Relu", n("Sub", 1.0, slopes)), 0.0)
    shares = n("Div", weights, n("Max", n("ReduceSum", weights, [2], keepdims=1), 1e-6))
    is_inside = n("And", n("GreaterOrEqual", centres, 0.0), n("LessOrEqual", centres, extent))
    return n("Where", n("Unsqueeze", is_inside, [2]), shares, 0.0)


def attached_graph(
    orientation: onnx.ModelProto, foreign: Foreign, decision: Decision, *, are_logits: bool
) -> onnx.ModelProto:
    """Return the graph from uint8 images ``(B, H, W, C)`` of any size to probabilities ``(B, K)``.

    Its other outputs are `model_outputs` of the foreign model, ``orientation``, and at the end ``straightened``: the
    images that the foreign model gets, before the normalisation, float32 ``(B, h, w, C)``, values 0 to 255.

    Args:
        orientation: the graph of an orientation bundle.
        foreign: the foreign model.
        decision: when and how an image is rotated.
        are_logits: True to apply softmax to the scores of the foreign model.

    Raises:
        UserError: if a model cannot be converted to the opset of the other one.
    """
    opset = max(OPSET, _opset(orientation), _opset(foreign.proto))
    first = _prepared(orientation, opset, "The orientation bundle")
    second = _prepared(foreign.proto, opset, foreign.name)
    front, tail = Nodes(), Nodes()
    model_input = add_front(front, foreign.preprocessing, decision, opset)
    names = model_outputs(foreign)
    _rename(first.graph, "orientation/", {first.graph.input[0].name: IMAGES, ORIENTATION: ORIENTATION})
    _rename(second.graph, "model/", {second.graph.input[0].name: model_input, **names})
    for output in second.graph.output:  # the names of free axes are those of another graph
        for axis, length in enumerate(output.type.tensor_type.shape.dim):
            if length.dim_param:
                length.dim_param = "" if axis else "batch"
    scores = tail("Cast", names[foreign.scores], to=onnx.TensorProto.FLOAT)
    tail("Softmax" if are_logits else "Identity", scores, output=PROBABILITIES, **({"axis": 1} if are_logits else {}))

    spec, batch = foreign.spec, foreign.batch or "batch"
    float32, uint8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    outputs = [
        helper.make_tensor_value_info(PROBABILITIES, float32, [batch, len(spec.classes)]),
        *second.graph.output,
        helper.make_tensor_value_info(ORIENTATION, float32, [batch, 2]),
        helper.make_tensor_value_info(STRAIGHTENED, float32, [batch, spec.height, spec.width, spec.channels]),
    ]
    graph = helper.make_graph(
        [*first.graph.node, *front, *second.graph.node, *tail],
        "attached",
        [helper.make_tensor_value_info(IMAGES, uint8, [batch, "height", "width", spec.channels])],
        outputs,
        [*first.graph.initializer, *second.graph.initializer],
        sparse_initializer=[*first.graph.sparse_initializer, *second.graph.sparse_initializer],
    )
    imports = {each.domain: each for model in (first, second) for each in model.opset_import}
    # The oldest version that has the opset, unless a part needs a newer one.
    oldest = helper.find_min_ir_version_for(list(imports.values()), ignore_unknown=True)
    version = max(oldest, first.ir_version, second.ir_version)
    model = helper.make_model(graph, opset_imports=list(imports.values()), ir_version=version)
    helper.set_model_props(model, {"upright": json.dumps({"classes": list(spec.classes), "format": FORMAT})})
    return model


def model_outputs(foreign: Foreign) -> dict[str, str]:
    """Return the name in the attached graph of each output of a foreign model: its own, if that is free."""
    names: dict[str, str] = {}
    for name in foreign.output_names:
        # The server adds an output `labels`.
        used = {IMAGES, ORIENTATION, PROBABILITIES, STRAIGHTENED, "labels", *names.values()}
        names[name] = next(each for each in (name, f"model_{name}", f"model__{name}") if each not in used)
    return names


def _opset(model: onnx.ModelProto) -> int:
    return next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)


def _prepared(model: onnx.ModelProto, opset: int, name: str) -> onnx.ModelProto:
    """Return a copy of a model with this opset, without functions, and whose only inputs are images."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {each.name for each in copy.graph.initializer}
    inputs = [each for each in copy.graph.input if each.name not in constants]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    copy.ir_version = max(copy.ir_version, 4)  # older ones list constants among the inputs
    for each in copy.opset_import:
        each.domain = "" if each.domain == "ai.onnx" else each.domain
    try:
        if copy.functions:
            copy = inliner.inline_local_functions(copy)
        if _opset(copy) != opset:
            copy = version_converter.convert_version(copy, opset)
    except Exception as error:  # the converter is C++, with exceptions of several types
        reason = one_line(error)
        raise UserError(
            f"{name} has opset {_opset(model)}, and ONNX cannot convert it to opset {opset}: {reason}. "
            f"Export it with opset {opset}."
        ) from None
    return copy


def _rename(graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
    """Rename all tensors of a graph: by ``names``, or with a prefix. Inner graphs use tensors of outer ones."""

    def new(name: str) -> str:
        return names.get(name, prefix + name if name else "")

    for node in graph.node:
        node.name = prefix + (node.name or node.output[0])
        node.input[:], node.output[:] = map(new, node.input), map(new, node.output)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, prefix, names)
    for each in (*graph.initializer, *graph.input, *graph.output):
        each.name = new(each.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = new(sparse.values.name)
    # Shapes of intermediate tensors have the names of the axes of their own graph. onnxruntime infers them again.
    del graph.value_info[:]
