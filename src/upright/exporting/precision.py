"""Convert layers of a float32 graph to float16 or 8 bits.

A layer is a module of the network, with its name in PyTorch. Resizing, normalisation and softmax stay float32. Every
spatial transformer with its localiser stays float32, too: in int8 the 8 bits of an angle cost 13 points of accuracy
(an affine transformer on digits, 10 epochs, 1,350 validation images), and float16 rounds the sampling points.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
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
from upright.architectures.voting import PolarGrid
from upright.errors import UserError
from upright.exporting.graph import lower_requirements, module_of

PrecisionName = Literal["fp32", "fp16", "int8"]

TOLERANCES: dict[PrecisionName, float] = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.05}
"""Largest allowed difference of a probability between machines that run the same graph.

The value for fp32 also bounds the difference between PyTorch and the graph. The value for int8 is twice the difference
between two implementations of one graph, onnxruntime's integer kernels and float kernels: 0.026 on 6,000 images
(VGG-11 on MNIST).
"""

LINEAR_LAYERS = ("Conv", "Gemm", "MatMul")


class Converter(ABC):
    """Convert chosen layers of a float32 graph, which was written from a network, to a lower precision.

    Raises:
        UserError: if no layer can be converted.
    """

    name: PrecisionName
    description: str
    """Description of the method, for the manifest and the card."""
    ranks: dict[str, int]
    """Number of axes of each tensor, where the graph states it."""
    layers: dict[str, list[str]]
    """For each layer, the names of its nodes that can be converted, in the order of the graph."""

    def __init__(self, path: Path, network: nn.Module) -> None:
        self.model = onnx.load(path)
        nodes = self.model.graph.node
        kinds = (SpatialTransformer, SeriesTransformer, PolarGrid)
        transformers = [f"{name}." for name, module in network.named_modules() if isinstance(module, kinds)]
        constants = {"", *(tensor.name for tensor in self.model.graph.initializer)}
        for node in nodes:
            # The graph reshapes and slices large weights.
            constants |= set(node.output) if node.input and constants.issuperset(node.input) else set()
        shapes = {info.name: len(info.type.tensor_type.shape.dim) for info in self.model.graph.value_info}
        self.ranks = shapes | {tensor.name: len(tensor.dims) for tensor in self.model.graph.initializer}
        self.layers = defaultdict(list)
        for node in nodes:
            module = module_of(node)
            if module and not f"{module}.".startswith(tuple(transformers)) and self.can_convert(node, constants):
                self.layers[module].append(node.name)
        if not self.layers:
            raise UserError(f"--precision {self.name}: the network has no layer that can be converted to {self.name}.")

    @abstractmethod
    def can_convert(self, node: NodeProto, constants: Collection[str]) -> bool:
        """Return whether a node can be converted; ``constants`` are the tensors that do not depend on the images."""

    @abstractmethod
    def convert_nodes(self, nodes: Collection[str]) -> ModelProto:
        """Return the graph with these nodes converted."""

    def convert(self, layers: Collection[str]) -> bytes:
        """Return the content of an ONNX file with these layers converted."""
        model = self.convert_nodes({node for layer in layers for node in self.layers[layer]})
        lower_requirements(model)
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {entry.key: entry.value for entry in self.model.metadata_props})
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content


class Float16(Converter):
    """Compute the network in float16. Its inputs and outputs stay float32.

    The converters of onnxruntime and onnxconverter-common insert casts even between nodes that stay float32, so they
    would round sampling points and image sizes to float16.
    """

    name: PrecisionName = "fp16"
    description = "float16 weights and activations in the network, float32 around it and in spatial transformers"

    def can_convert(self, node: NodeProto, constants: Collection[str]) -> bool:
        """Accept nodes that compute floats from floats."""
        return node.op_type not in ("Cast", "Constant", "ConstantOfShape", "Range", "Shape")

    def convert_nodes(self, nodes: Collection[str]) -> ModelProto:
        """Add a float16 twin ``x_fp16`` of each float tensor ``x`` of a converted node; ``x`` itself stays float32."""
        model = onnx.shape_inference.infer_shapes(self.model)
        graph = model.graph
        infos = (*graph.value_info, *graph.output)
        floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
        weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
        half_inputs = {name for node in graph.node if node.name in nodes for name in node.input}
        float_inputs = {name for node in graph.node if node.name not in nodes for name in node.input}
        float_inputs |= {output.name for output in graph.output}

        def cast(source: str, target: str, dtype: int) -> NodeProto:
            return onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=dtype)

        new_nodes: list[NodeProto] = []
        for node in graph.node:
            new_nodes.append(node)
            outputs = [name for name in node.output if name in floats]
            if node.name in nodes:
                new_nodes += [cast(f"{name}_fp16", name, TensorProto.FLOAT) for name in outputs if name in float_inputs]
                for names in (node.input, node.output):
                    names[:] = [f"{name}_fp16" if name in floats or name in weights else name for name in names]
            else:
                new_nodes += [
                    cast(name, f"{name}_fp16", TensorProto.FLOAT16) for name in outputs if name in half_inputs
                ]
        for name, tensor in weights.items():
            if name in half_inputs:
                with np.errstate(over="ignore"):  # the gate rejects a graph with infinite weights
                    half = numpy_helper.to_array(tensor).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(half, f"{name}_fp16"))
        inputs = {name for node in new_nodes for name in node.input}
        initializers = [tensor for tensor in graph.initializer if tensor.name in inputs]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(new_nodes)
        graph.initializer.extend(initializers)
        return model


class Int8(Converter):
    """Compute convolutions and linear layers in 8 bits: uint8 activations, int8 weights with a scale per channel.

    Quantization is static and uses ONNX's QuantizeLinear and DequantizeLinear, which every engine reads. In a graph
    with an LSTM, the LSTM is quantized dynamically by an operator of onnxruntime, and linear layers stay float32.

    Args:
        path: path of the float32 graph.
        network: network that the graph was written from.
        calibration: function that returns batches of images, which set the ranges of the activations.
        workspace: a folder for temporary files.
        full_range: use 8 bits of the weights instead of 7. A processor without instructions for 8-bit products (VNNI)
            adds two products in 16 bits. The sum overflows with 8 bits, but not with 7 (255 * 64 * 2 < 2**15).
    """

    name: PrecisionName = "int8"

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        calibration: Callable[[], Iterator[npt.NDArray[np.uint8]]],
        workspace: Path,
        full_range: bool = False,
    ) -> None:
        self.recurrent = any(node.op_type == "LSTM" for node in onnx.load(path).graph.node)
        super().__init__(path, network)
        self.calibration, self.workspace, self.full_range = calibration, workspace, full_range
        # The exporter has inferred all shapes already.
        quant_pre_process(path, workspace / "prepared.onnx", skip_symbolic_shape=True)
        method = "dynamic: LSTM, static QDQ: convolutions" if self.recurrent else "static QDQ"
        bits = "8 bits (full range: needs VNNI or similar)" if full_range else "7 bits (reduced range)"
        self.description = f"{method}; uint8 activations, int8 weights per channel of {bits}"

    def can_convert(self, node: NodeProto, constants: Collection[str]) -> bool:
        """Accept nodes that multiply by constant weights."""
        kinds = ("Conv", "LSTM") if self.recurrent else LINEAR_LAYERS
        # onnxruntime has no scale per channel for a stack of matrices.
        stack = node.op_type == "MatMul" and self.ranks.get(node.input[1], 0) > 2
        return node.op_type in kinds and node.input[1] in constants and not stack

    def convert_nodes(self, nodes: Collection[str]) -> ModelProto:
        """Quantize statically, then the LSTM dynamically."""
        options: dict[str, Any] = {
            "per_channel": True,
            "reduce_range": not self.full_range,
            "weight_type": QuantType.QInt8,
        }
        source, target = self.workspace / "prepared.onnx", self.workspace / "quantized.onnx"
        model = onnx.load(source)
        lstm = [node.name for node in model.graph.node if node.name in nodes and node.op_type == "LSTM"]
        static = [node.name for node in model.graph.node if node.name in nodes and node.op_type in LINEAR_LAYERS]
        if static:
            quantize_static(
                source,
                target,
                CalibrationBatches(self.calibration()),
                op_types_to_quantize=list(LINEAR_LAYERS),
                nodes_to_quantize=static,
                activation_type=QuantType.QUInt8,
                calibration_cache_path=self.workspace / "ranges.json",
                **options,
            )
            model = onnx.load(target)
        if lstm:
            # onnxruntime splits linear layers into products and sums, and then rejects the recorded shapes.
            del model.graph.value_info[:]
            quantize_dynamic(model, target, op_types_to_quantize=["LSTM"], nodes_to_quantize=lstm, **options)
            model = onnx.load(target)
        return model


class CalibrationBatches(CalibrationDataReader):  # type: ignore[misc]
    """Adapter from an iterator of batches to the interface of onnxruntime."""

    def __init__(self, batches: Iterator[npt.NDArray[np.uint8]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}
