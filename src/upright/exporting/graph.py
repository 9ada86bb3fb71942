"""Export a model to one ONNX graph, from uint8 images ``(B, H, W, C)`` of any size to the answers of its task."""

import ast
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from upright.architectures.spatial_transformer import SpatialTransformer, observing
from upright.errors import UserError
from upright.runtime.bundle import FORMAT
from upright.runtime.task import task_of
from upright.training.model import Model

Output = Literal["theta", "warped", "votes", "confidence", "logits", "features"]

OPSET = 18
"""Default opset. TensorRT computes GridSample correctly for opset 18, but not for opset 20."""
OPSETS = range(18, 26)
"""Opsets that torch's exporter writes directly; its converter to other opsets fails on some nodes."""
MAX_BYTES = 2**31 - 2**20
"""Limit for the weights. An ONNX file is a protobuf of less than 2 GiB, and the graph needs a part of it."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata that lists the modules around the node, the outermost first."""


@dataclass(frozen=True)
class Form:
    """Inputs and outputs of a graph.

    Args:
        opset: ONNX opset.
        batch: number of images in a batch; None for any number.
        size: ``(H, W)`` of the images; None for any size. At the network's own size the graph does not resize.
        outputs: additional outputs. Every spatial transformer has ``theta`` ``(B, P)`` and ``warped``, its output for
            the image, float32 ``(B, H', W', C)`` from 0 to 255. If its localiser votes, it has ``votes`` ``(B, N)`` and
            ``confidence`` ``(B, 1)``. The network has ``logits`` ``(B, K)`` and ``features``, the input of its head.
        head: names of the network's modules that form its head, for ``features``.

    Raises:
        UserError: for a number out of range.
    """

    opset: int = OPSET
    batch: int | None = None
    size: tuple[int, int] | None = None
    outputs: tuple[Output, ...] = ()
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise UserError(f"--opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}.")
        if self.batch is not None and self.batch < 1:
            raise UserError(f"--batch must be at least 1, got {self.batch}; omit it to allow any batch.")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"--size must be at least 1x1, got {self.size[0]}x{self.size[1]}.")


class Graph(nn.Module):
    """The deployed form of a model: from channels-last images to probabilities, or to an orientation.

    Raises:
        UserError: if the network does not have one of the outputs.
    """

    names: list[str]
    """Names of the outputs. Several transformers have ``theta_1``, ``theta_2`` and so on, in the order of modules."""

    def __init__(self, model: Model, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form
        transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
        numbers = [""] if len(transformers) == 1 else [f"_{number + 1}" for number in range(len(transformers))]
        voting = [number for number, each in zip(numbers, transformers, strict=True) if each.voting]
        suffixes = {"theta": numbers, "warped": numbers, "votes": voting, "confidence": voting}
        self.names = [task_of(model.spec).output]
        for name in form.outputs:
            if name in suffixes and not transformers:
                raise UserError(f"The network has no spatial transformer, so it has no output {name}.")
            if not suffixes.get(name, [""]):
                raise UserError(
                    f"No spatial transformer of the network has a localiser that votes, so it has no output {name}; "
                    "those of upright.architectures.voting vote."
                )
            self.names += [name + suffix for suffix in suffixes.get(name, [""])]
        if "features" in form.outputs and not (form.head and all(form.head)):
            raise UserError(
                f"{type(model.network).__name__} has no separate module for its head, so it has no output features; "
                "move the weights of the head into a separate module."
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 ``(B, H, W, C)`` to `Model.answers` and the additional outputs."""
        normalised = self.model.normalise(images.permute(0, 3, 1, 2))
        features: list[Tensor] = []
        hooks = [
            self.model.network.get_submodule(name).register_forward_pre_hook(lambda _, args: features.extend(args))
            for name in self.form.head
        ]
        with observing() as observations:
            logits = self.model.network(normalised)
        for hook in hooks:
            hook.remove()
        outputs: dict[Output, Callable[[], Sequence[Tensor | None]]] = {
            "theta": lambda: [each.theta for each in observations],
            "warped": lambda: [
                self.model.denormalise(each.view(normalised)).permute(0, 2, 3, 1) for each in observations
            ],
            "votes": lambda: [each.votes for each in observations],
            "confidence": lambda: [each.confidence[:, None] for each in observations if each.confidence is not None],
            "logits": lambda: [logits],
            "features": lambda: [features[0]],  # if several modules form the head, the input of the first one
        }
        others = (output for name in self.form.outputs for output in outputs[name]() if output is not None)
        return (self.model.answers(logits), *others)


def check_weights(size: int, owner: str) -> None:
    """Raise a `UserError` if weights of this size in bytes do not fit into one ONNX file."""
    if size > MAX_BYTES:
        raise UserError(
            f"The weights of {owner} have {size / 1e9:.2f} GB, but an ONNX file holds at most "
            f"{MAX_BYTES / 1e9:.2f} GB; use a smaller network."
        )


def write_graph(model: Model, path: Path, form: Form | None = None) -> None:
    """Write a model in evaluation mode to one ONNX file. Its metadata contain the class names.

    Raise a `UserError` if the network does not support the form, or its weights do not fit into an ONNX file.
    """
    form = form or Form()
    spec, graph = model.spec, Graph(model, form).eval()
    check_weights(sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()), "the network")
    # In the example, a free axis must differ from 1 and from the network's own size. Else tracing makes it a constant.
    height, width = form.size or (spec.height + 5, spec.width + 9)
    example = torch.zeros(form.batch or 2, height, width, spec.channels, dtype=torch.uint8)
    if form.size:
        try:
            with torch.no_grad():
                graph(example)
        except RuntimeError as error:
            raise UserError(f"The network does not accept images of {height}x{width}: {error}") from None
    axes = zip(("batch", "height", "width"), (form.batch, form.size, form.size), strict=True)
    free = {number: name for number, (name, length) in enumerate(axes) if not length}
    with warnings.catch_warnings():
        # torch's exporter calls its own deprecated functions.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=form.opset,
            input_names=["images"],
            output_names=graph.names,
            dynamic_shapes={"images": free} if free else None,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    graph_proto = proto.graph
    for part in (graph_proto, *graph_proto.input, *graph_proto.output, *graph_proto.value_info, *graph_proto.node):
        # Remove the exporter's notes. Its lines of source code contain paths of this machine.
        scopes = [entry for entry in part.metadata_props if entry.key == SCOPES]
        del part.metadata_props[:]
        part.metadata_props.extend(scopes)
    lower_requirements(proto)
    onnx.helper.set_model_props(proto, {"upright": json.dumps({"classes": list(spec.classes), "format": FORMAT})})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def lower_requirements(model: onnx.ModelProto) -> None:
    """Remove the imports of unused opsets, and set the IR version to the oldest one that has the others.

    An old runtime refuses a newer IR version or opset, even if no operator needs it.
    """
    domains = {node.domain for node in model.graph.node}
    imports = [each for each in model.opset_import if each.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.ir_version = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)


def module_of(node: onnx.NodeProto) -> str:
    """Return the name of the innermost module of the network that a node belongs to.

    A normalisation that was folded into a layer belongs to this layer, because the node uses the weights of the layer.

    Returns:
        The name relative to the network: ``.`` for the network itself, and an empty string outside of the network.
    """
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    scopes: list[str] = ["", *ast.literal_eval(metadata.get(SCOPES, "[]"))[:-1]]  # the last one is the node itself
    weights = [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
    module = weights[0] if weights else scopes[-1]
    if module == "model.network":
        return "."
    return module.removeprefix("model.network.") if module.startswith("model.network.") else ""
