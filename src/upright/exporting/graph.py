"""A model as one ONNX graph: ``images`` uint8 ``(B, H, W, C)`` of any size -> ``probabilities`` ``(B, K)``."""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from upright.architectures.spatial_transformer import Observation, SpatialTransformer, observing
from upright.errors import UprightError
from upright.runtime.bundle import FORMAT
from upright.training.model import Model

Output = Literal["theta", "warped"]

OPSET = 18
"""TensorRT gives wrong numbers for GridSample of opset 20, and right ones at 18."""


class Graph(nn.Module):
    """The model as it is deployed: channels last in, probabilities out.

    Args:
        model: the one module that training used.
        outputs: what else to give, of every spatial transformer: ``theta`` ``(B, P)``, and ``warped``, what it sees of
            the image, float32 ``(B, H', W', C)`` from 0 to 255.
    """

    def __init__(self, model: Model, outputs: Sequence[Output] = ()) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 ``(B, H, W, C)`` to ``(B, K)`` and the other outputs, each for all transformers in their order."""
        normalised = self.model.normalised(images.permute(0, 3, 1, 2))
        with observing() as seen:
            probabilities = self.model.network(normalised).softmax(dim=1)
        others: dict[Output, Callable[[Observation], Tensor]] = {
            "theta": lambda one: one.theta,
            "warped": lambda one: self.model.shown(one.view(normalised)).permute(0, 2, 3, 1),
        }
        return probabilities, *(others[name](one) for name in self.outputs for one in seen)


def output_names(model: Model, outputs: Sequence[Output]) -> list[str]:
    """Names of what `Graph` gives; where there are several transformers, ``theta_1``, ``theta_2`` and so on."""
    count = sum(isinstance(module, SpatialTransformer) for module in model.modules())
    if outputs and not count:
        raise UprightError(f"The network has no spatial transformer, so it cannot give {', '.join(outputs)}.")
    return ["probabilities"] + [f"{name}_{i + 1}" if count > 1 else name for name in outputs for i in range(count)]


def write_graph(model: Model, path: Path, opset: int = OPSET, outputs: Sequence[Output] = ()) -> None:
    """Export ``model``, which must be in evaluation mode, to one file at ``path``.

    Batch, height and width stay free; resizing, normalisation and softmax are inside, and so are the names of the
    classes, as metadata.

    Args:
        model: the one module that training used.
        path: of the file.
        opset: of ONNX.
        outputs: see `Graph`.

    Raises:
        UprightError: if other outputs are asked of a network without a spatial transformer.
    """
    spec = model.spec
    # Two images of another size than the network's: what is traced with 1, or with that size, becomes a constant.
    example = torch.zeros(2, spec.height + 5, spec.width + 9, spec.channels, dtype=torch.uint8)
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        # torch's exporter calls its own deprecated functions.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Graph(model, outputs).eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=output_names(model, outputs),
            dynamic_shapes={"images": {0: free, 1: free, 2: free}},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    told = {"classes": list(spec.classes), "format": FORMAT}
    onnx.helper.set_model_props(proto, {"upright": json.dumps(told)})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
