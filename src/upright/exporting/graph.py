"""A model as one ONNX graph: ``images`` uint8 ``(B, H, W, C)`` of any size -> ``probabilities`` ``(B, K)``."""

import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from upright.runtime.bundle import FORMAT
from upright.training.model import Model

OPSET = 18
"""TensorRT gives wrong numbers for GridSample of opset 20, and right ones at 18."""


class Graph(nn.Module):
    """The model as it is deployed: channels last in, probabilities out.

    Args:
        model: the one module that training used.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``(B, H, W, C)`` to ``(B, K)``."""
        probabilities: Tensor = self.model(images.permute(0, 3, 1, 2)).softmax(dim=1)
        return probabilities


def write_graph(model: Model, path: Path, opset: int = OPSET) -> None:
    """Export ``model``, which must be in evaluation mode, to one file at ``path``.

    Batch, height and width stay free; resizing, normalisation and softmax are inside, and so are the names of the
    classes, as metadata.
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
            Graph(model).eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: free, 1: free, 2: free}},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    told = {"classes": list(spec.classes), "format": FORMAT}
    onnx.helper.set_model_props(proto, {"upright": json.dumps(told)})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
