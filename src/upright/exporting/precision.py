"""What else than float32 a network may compute in: which of its layers, and how a graph becomes one that does.

Layers are the network's modules, under the names that PyTorch has for them. Resizing, normalisation and softmax stay
float32, and so does every spatial transformer, its localiser included: in int8 its 8 bits of an angle cost 13 points
of accuracy (configs/stn_lenet.yaml, 10 epochs, 1,350 validation images), and half precision rounds where it samples.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import SeriesTransformer
from upright.errors import UserError
from upright.exporting.graph import module_of

PrecisionName = Literal["fp32", "fp16", "int8"]

TOLERANCES: dict[PrecisionName, float] = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.05}
"""Largest difference of a probability between machines that run the same graph.

Of fp32 also between PyTorch and the graph. Of int8 twice what two implementations of the same graph differed by:
onnxruntime's integer kernels and the same graph in floats, 0.026 on 6,000 images (VGG-11 on MNIST).
"""

LAYERS = ("Conv", "Gemm", "MatMul")


class Lowered(ABC):
    """A graph, some of whose layers compute in less than float32.

    Args:
        path: of the float32 graph.
        network: whose it is.

    Raises:
        UserError: if there is nothing to lower.
    """

    name: PrecisionName

    def __init__(self, path: Path, network: nn.Module) -> None:
        self.model = onnx.load(path)
        transformers = [
            name
            for name, module in network.named_modules()
            if isinstance(module, SpatialTransformer | SeriesTransformer)
        ]
        constants = {"", *(tensor.name for tensor in self.model.graph.initializer)}
        for node in self.model.graph.node:
            # Large weights are reshaped and cut in the graph.
            constants |= set(node.output) if node.input and constants.issuperset(node.input) else set()
        self.layers: dict[str, list[str]] = defaultdict(list)
        """Names of the nodes of each layer that may be lowered, in the order of the graph."""
        for node in self.model.graph.node:
            module = module_of(node)
            floats = any(f"{module}.".startswith(f"{transformer}.") for transformer in transformers)
            if module and not floats and self.takes(node, constants):
                self.layers[module].append(node.name)
        if not self.layers:
            raise UserError(f"--precision {self.name}: there is nothing in this network that it would change.")

    @abstractmethod
    def takes(self, node: NodeProto, constants: Collection[str]) -> bool:
        """Whether a node of the network can be lowered; ``constants`` are names of tensors that are no activations."""

    @abstractmethod
    def convert(self, nodes: Collection[str]) -> ModelProto:
        """The graph with these nodes lowered."""

    @abstractmethod
    def description(self) -> str:
        """How, in a sentence for manifest and card."""

    def lower(self, layers: Collection[str]) -> bytes:
        """The graph as a file, with these layers lowered."""
        made = self.convert({node for layer in layers for node in self.layers[layer]})
        props = {entry.key: entry.value for entry in self.model.metadata_props}
        del made.metadata_props[:]
        onnx.helper.set_model_props(made, props)
        onnx.checker.check_model(made)
        content: bytes = made.SerializeToString()
        return content


class Half(Lowered):
    """The network in float16, what goes in and out of it in float32.

    The converters of onnxruntime and onnxconverter-common cast between any two neighbours that stay float32, so that
    sampling points and sizes would pass through float16, too.
    """

    name: PrecisionName = "fp16"

    def takes(self, node: NodeProto, constants: Collection[str]) -> bool:
        """All that makes floats of floats."""
        return node.op_type not in ("Cast", "Constant", "ConstantOfShape", "Range", "Shape")

    def description(self) -> str:
        """See `Lowered`."""
        return "float16 weights and activations of the network, float32 around it and in spatial transformers"

    def convert(self, nodes: Collection[str]) -> ModelProto:
        """See `Lowered`."""
        made = onnx.shape_inference.infer_shapes(self.model)
        graph = made.graph
        known = (*graph.value_info, *graph.output)
        floats = {info.name for info in known if info.type.tensor_type.elem_type == TensorProto.FLOAT}
        weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
        made_here: dict[str, NodeProto | TensorProto] = {}
        halves: set[str] = set()

        def cast(name: str, to: int, suffix: str) -> str:
            if (new := f"{name}_{suffix}") not in made_here:
                made_here[new] = onnx.helper.make_node("Cast", [name], [new], name=f"cast_{new}", to=to)
                nodes_now.append(made_here[new])
            return new

        def weight(name: str) -> str:
            if (new := f"{name}_fp16") not in made_here:
                with np.errstate(over="ignore"):  # the gate finds what became infinite
                    made_here[new] = numpy_helper.from_array(
                        numpy_helper.to_array(weights[name]).astype(np.float16), new
                    )
                graph.initializer.append(made_here[new])
            return new

        # Outputs stay float32: what computes one gets another name, and a node that is not lowered passes it on.
        own = {name: f"{name}_inside" for node in graph.node if node.name in nodes for name in node.output}
        inside = {output.name: own[output.name] for output in graph.output if output.name in own}
        for node in graph.node:
            node.input[:] = [inside.get(name, name) for name in node.input]
            node.output[:] = [inside.get(name, name) for name in node.output]
        passed_on = [
            onnx.helper.make_node("Identity", [new], [name], name=f"out_{name}") for name, new in inside.items()
        ]
        floats |= set(inside.values())
        nodes_now: list[NodeProto] = []
        for node in (*graph.node, *passed_on):
            if node.name in nodes:
                for i, name in enumerate(node.input):
                    if name in weights:
                        node.input[i] = weight(name)
                    elif name in floats and name not in halves:
                        node.input[i] = cast(name, TensorProto.FLOAT16, "fp16")
                halves |= floats & set(node.output)
            else:
                node.input[:] = [
                    cast(name, TensorProto.FLOAT, "fp32") if name in halves else name for name in node.input
                ]
            nodes_now.append(node)
        read = {name for node in nodes_now for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes_now)
        graph.initializer.extend(kept)
        return made


class Int8(Lowered):
    """Convolutions and linear layers in 8 bits: uint8 activations, int8 weights with a scale for each channel.

    Static, in the form of ONNX's QuantizeLinear and DequantizeLinear, which every engine reads. In a graph with an
    LSTM, that is quantised dynamically, as an operator of onnxruntime's own, and linear layers stay float32.

    Args:
        path: of the float32 graph.
        network: whose it is.
        calibration: batches of images, from which the ranges of activations are taken.
        workspace: a folder for files in between.
        full_range: 8 bits of weights in place of 7. Without instructions for 8-bit products (VNNI), a processor adds
            two of them in 16 bits, which 8 bits overflow; 7 do not (255 * 64 * 2 < 2**15).
    """

    name: PrecisionName = "int8"

    @cached_property
    def recurrent(self) -> bool:
        """Whether there is an LSTM."""
        return any(node.op_type == "LSTM" for node in self.model.graph.node)

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        calibration: Callable[[], Iterator[npt.NDArray[np.uint8]]],
        workspace: Path,
        full_range: bool = False,
    ) -> None:
        super().__init__(path, network)
        self.calibration, self.full_range = calibration, full_range
        self._ranges, self._prepared, self._made = (workspace / name for name in ("ranges.json", "in.onnx", "out.onnx"))
        # The exporter has noted all shapes.
        quant_pre_process(path, self._prepared, skip_symbolic_shape=True)

    def takes(self, node: NodeProto, constants: Collection[str]) -> bool:
        """What multiplies by weights."""
        kinds = ("Conv", "LSTM") if self.recurrent else LAYERS
        return node.op_type in kinds and node.input[1] in constants

    def description(self) -> str:
        """See `Lowered`."""
        how = "dynamic: LSTM, static QDQ: convolutions" if self.recurrent else "static QDQ"
        bits = "8 bits (full range: needs VNNI or the like)" if self.full_range else "7 bits (reduced range)"
        return f"{how}; uint8 activations, int8 weights per channel of {bits}"

    def convert(self, nodes: Collection[str]) -> ModelProto:
        """See `Lowered`."""
        options: dict[str, Any] = {
            "per_channel": True,
            "reduce_range": not self.full_range,
            "weight_type": QuantType.QInt8,
        }
        made = onnx.load(self._prepared)
        kinds = {node.name: node.op_type for node in made.graph.node if node.name in nodes}
        if static := [name for name, kind in kinds.items() if kind in LAYERS]:
            quantize_static(
                self._prepared,
                self._made,
                _Reader(self.calibration()),
                op_types_to_quantize=list(LAYERS),
                nodes_to_quantize=static,
                activation_type=QuantType.QUInt8,
                calibration_cache_path=self._ranges,
                **options,
            )
            made = onnx.load(self._made)
        if dynamic := [name for name, kind in kinds.items() if kind == "LSTM"]:
            # It turns linear layers into products and sums, whose shapes it then finds wrong.
            del made.graph.value_info[:]
            quantize_dynamic(made, self._made, op_types_to_quantize=["LSTM"], nodes_to_quantize=dynamic, **options)
            made = onnx.load(self._made)
        return made


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterator[npt.NDArray[np.uint8]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}
