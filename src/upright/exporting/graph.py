"""A model as one ONNX graph: ``images`` uint8 ``(B, H, W, C)`` of any size -> ``probabilities`` ``(B, K)``."""

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
from upright.training.model import Model

Output = Literal["theta", "warped", "logits", "features"]

OPSET = 18
"""TensorRT gives wrong numbers for GridSample of opset 20, and right ones at 18."""
OPSETS = range(18, 26)
"""What torch's exporter writes without a converter that gives up on some node."""
MAX_BYTES = 2**31 - 2**20
"""A protobuf, and so an ONNX file, holds less than 2 GiB; some of it is the graph."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Under this key a node says which modules it is in, from the outermost one on."""


@dataclass(frozen=True)
class Form:
    """What a graph takes and what it gives.

    Args:
        opset: of ONNX.
        batch: how many images it takes, any number by default.
        size: ``(H, W)`` of the images it takes, any by default. What the network sees at that size anyway is not
            resized.
        outputs: what it gives beside probabilities. Of every spatial transformer: ``theta`` ``(B, P)``, and ``warped``,
            what it sees of the image, float32 ``(B, H', W', C)`` from 0 to 255. Of the network: ``logits`` ``(B, K)``,
            and ``features``, what goes into its head, as that takes them.
        head: names of the network's modules that make its head (`finetuning.head`); ``features`` needs them.
    """

    opset: int = OPSET
    batch: int | None = None
    size: tuple[int, int] | None = None
    outputs: tuple[Output, ...] = ()
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no graph can be."""
        if self.opset not in OPSETS:
            raise UserError(f"--opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}.")
        if self.batch is not None and self.batch < 1:
            raise UserError(f"--batch must be at least 1, got {self.batch}; without it, any batch will do.")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"--size must be at least 1x1, got {self.size[0]}x{self.size[1]}.")


class Graph(nn.Module):
    """The model as it is deployed: channels last in, probabilities out.

    Args:
        model: the one module that training used.
        form: says what it gives.

    Raises:
        UserError: if it is asked for what the network has not.
    """

    def __init__(self, model: Model, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form
        count = sum(isinstance(module, SpatialTransformer) for module in model.modules())
        if not count and (asked := [name for name in form.outputs if name in ("theta", "warped")]):
            raise UserError(f"The network has no spatial transformer, so it cannot give {', '.join(asked)}.")
        if "features" in form.outputs and not all(form.head):
            raise UserError(
                f"{type(model.network).__name__} holds its head's weights itself; to give features, the head must be "
                "a module of its own."
            )
        several = {"theta": count, "warped": count}
        self.names = ["probabilities"] + [
            f"{name}_{i + 1}" if several.get(name, 1) > 1 else name
            for name in form.outputs
            for i in range(several.get(name, 1))
        ]
        """Of what it gives; where there are several transformers, ``theta_1``, ``theta_2`` and so on."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 ``(B, H, W, C)`` to ``(B, K)`` and the other outputs, each for all transformers in their order."""
        normalised = self.model.normalised(images.permute(0, 3, 1, 2))
        features: list[Tensor] = []
        handles = [
            self.model.network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: features.extend(inputs))
            for name in self.form.head
        ]
        with observing() as seen:
            logits = self.model.network(normalised)
        for handle in handles:
            handle.remove()
        others: dict[Output, Callable[[], Sequence[Tensor]]] = {
            "theta": lambda: [one.theta for one in seen],
            "warped": lambda: [self.model.shown(one.view(normalised)).permute(0, 2, 3, 1) for one in seen],
            "logits": lambda: [logits],
            # Of a head of several modules, what the first one takes.
            "features": lambda: features[:1],
        }
        return logits.softmax(dim=1), *(tensor for name in self.form.outputs for tensor in others[name]())


def write_graph(model: Model, path: Path, form: Form | None = None) -> None:
    """Export ``model``, which must be in evaluation mode, to one file at ``path``.

    Resizing, normalisation and softmax are inside, and so are the names of the classes, as metadata.

    Args:
        model: the one module that training used.
        path: of the file.
        form: what the graph takes and gives.

    Raises:
        UserError: if the network cannot give or take that, or its weights are more than an ONNX file holds.
    """
    form = form or Form()
    spec, graph = model.spec, Graph(model, form).eval()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weights > MAX_BYTES:
        raise UserError(
            f"The network's weights are {weights / 1e9:.2f} GB, and one ONNX file holds less than "
            f"{MAX_BYTES / 1e9:.2f} GB; export a smaller network."
        )
    # What is free is traced with two images of another size than the network's: what is traced with 1, or with that
    # size, becomes a constant.
    size = form.size or (spec.height + 5, spec.width + 9)
    example = torch.zeros(form.batch or 2, *size, spec.channels, dtype=torch.uint8)
    if form.size:
        try:
            with torch.no_grad():
                graph(example)
        except RuntimeError as error:
            raise UserError(f"The network cannot take images of {size[0]}x{size[1]}: {error}") from None
    free = torch.export.Dim.DYNAMIC
    axes = {axis: free for axis, fixed in enumerate((form.batch, form.size, form.size)) if not fixed}
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
            dynamic_shapes={"images": axes} if axes else None,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        # Beside the module, the exporter notes lines of source, with the paths of this machine.
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    told = {"classes": list(spec.classes), "format": FORMAT}
    onnx.helper.set_model_props(proto, {"upright": json.dumps(told)})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def module_of(node: onnx.NodeProto) -> str:
    """Name of the innermost module of the network that a node of a graph computes for, as torch's exporter notes it.

    What a normalisation was folded into is of the layer, whose weights it still names.

    Returns:
        Relative to the network, which is ``.`` itself; empty for what is around it.
    """
    noted = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES, "[]")
    scopes: list[str] = ["", *ast.literal_eval(noted)[:-1]]  # the last one is the node itself
    weights = [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
    module = weights[0] if weights else scopes[-1]
    network = "model.network"
    return "." if module == network else module.removeprefix(f"{network}.") if module.startswith(f"{network}.") else ""
