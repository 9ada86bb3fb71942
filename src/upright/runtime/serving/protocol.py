"""The Open Inference Protocol (KServe v2) over HTTP: its JSON and its binary extension.

Source: https://github.com/kserve/open-inference-protocol (``inference_rest.md``, ``open_inference_rest.yaml``), and
the binary tensor data extension, https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol.
The protocol does not define encoded images in JSON. Here the elements of a BYTES tensor are base64.
"""

import binascii
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import onnxruntime

from upright.errors import UserError, one_line
from upright.runtime.openvino import OpenVINOSession
from upright.runtime.serving.batching import Images, Outputs

HEADER = "Inference-Header-Content-Length"
"""Header with the length of the JSON in bytes. The binary tensors follow the JSON."""
INPUT, PROBABILITIES, LABELS = "images", "probabilities", "labels"

DATATYPES = {
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
}
"""The protocol's names for the types of onnxruntime."""

Kind = TypeVar("Kind")
Size = Annotated[int, msgspec.Meta(ge=0)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Elements = list[Byte | list[Byte | list[Byte | list[Byte]]]]
"""Elements of a UINT8 tensor in JSON, flat or nested. msgspec checks them first, because NumPy would allocate the size
of the longest string for every element."""
RawElements = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "array"})]
"""JSON of an array. Its type depends on the datatype, which may come later in the JSON."""


class InputTensor(msgspec.Struct):
    """An input tensor. Without ``data``, ``parameters["binary_data_size"]`` bytes follow the JSON."""

    name: str
    shape: list[Size]
    datatype: str
    parameters: dict[str, Any] = {}
    data: RawElements | msgspec.UnsetType = msgspec.UNSET


class RequestedOutput(msgspec.Struct):
    """A requested output. With ``parameters["binary_data"]``, it follows the JSON as bytes."""

    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(msgspec.Struct):
    """An inference request. With ``parameters["binary_data_output"]``, all outputs follow the JSON as bytes."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] = []


class OutputTensor(msgspec.Struct, omit_defaults=True):
    """An output tensor."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class InferenceResponse(msgspec.Struct, omit_defaults=True):
    """An inference response."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


Parsed = tuple[InferenceRequest, Images | list[bytes]]
"""A request with its images, which are decoded ``(B, H, W, C)`` or the bytes of files."""


def number(text: str) -> int:
    """Parse digits. Return -1 for any other text, and for more digits than any limit has."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1


class Model:
    """The model as clients see it, and the conversion of its requests and responses.

    With ``classes``, one for each image, it has the further output `LABELS`.
    """

    def __init__(self, name: str, version: str, session: onnxruntime.InferenceSession, classes: Sequence[str]) -> None:
        self.name, self.version, self.classes = name, version, classes
        (images,) = session.get_inputs()
        *_, self.channels = images.shape
        # The server divides a request into batches, so the number of images is free even if that of the graph is not.
        self.metadata: dict[str, Any] = {
            "name": name,
            "versions": [version],
            "platform": "openvino" if isinstance(session, OpenVINOSession) else "onnxruntime_onnx",
            "inputs": [_tensor(images)],
            "outputs": [*map(_tensor, session.get_outputs())],
        }
        if classes:
            self.metadata["outputs"].append({"name": LABELS, "datatype": "BYTES", "shape": [-1]})
        self.outputs: dict[str, str] = {output["name"]: output["datatype"] for output in self.metadata["outputs"]}

    def read(self, body: bytes, header: str | None) -> Parsed:
        """Parse the body of a request, which may have a ``header``, `HEADER`, or raise a `UserError`."""
        end = len(body)
        if header is not None:
            end = number(header)
            if not 0 <= end <= len(body):
                raise UserError(f"{HEADER} must be a number of bytes up to the body's {len(body)}, got {header!r}.")
        try:
            request = msgspec.json.decode(memoryview(body)[:end], type=InferenceRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"The body is not an inference request: {error}.") from None
        for output in request.outputs:
            if output.name not in self.outputs:
                raise UserError(f"The model has no output {output.name!r}; outputs: {', '.join(self.outputs)}.")
        request.outputs = request.outputs or list(map(RequestedOutput, self.outputs))
        if [tensor.name for tensor in request.inputs] != [INPUT]:
            names = ", ".join(repr(tensor.name) for tensor in request.inputs) or "none"
            raise UserError(f"The request must have one input, '{INPUT}'; got {names}.")
        (tensor,) = request.inputs
        rest, binary = memoryview(body)[end:], tensor.parameters.get("binary_data_size")
        if (binary is None) == (tensor.data is msgspec.UNSET) or len(rest) != (binary or 0):
            raise UserError(
                "An input must have either 'data' or parameters.binary_data_size, the number of bytes after the JSON "
                f"(whose length is in {HEADER}); got binary_data_size {binary}, and {len(rest)} bytes after the JSON."
            )
        data = rest if isinstance(tensor.data, msgspec.UnsetType) else tensor.data
        tensor.data = msgspec.UNSET
        if tensor.datatype == "UINT8":
            return request, _pixels(tensor.shape, data, self.channels)
        if tensor.datatype == "BYTES":
            return request, _encoded(tensor.shape, data)
        raise UserError(
            f"Input '{INPUT}' must be UINT8 (pixels, [B, H, W, {self.channels}]) or BYTES (encoded images, [B]); "
            f"got {tensor.datatype!r}."
        )

    def needed(self, request: InferenceRequest) -> list[str]:
        """Return the outputs of the graph that the response needs."""
        return sorted({PROBABILITIES if output.name == LABELS else output.name for output in request.outputs})

    def write(self, request: InferenceRequest, outputs: Outputs) -> tuple[bytes, int | None]:
        """Return the body of the response, and the length of its JSON if binary tensors follow the JSON."""
        tensors, tail = [], []
        all_binary = request.parameters.get("binary_data_output") is True
        for requested in request.outputs:
            if requested.name == LABELS:
                array: Any = np.array(self.classes, object)[outputs[PROBABILITIES].argmax(axis=1)]
            else:
                array = outputs[requested.name]
            tensor = OutputTensor(requested.name, list(array.shape), self.outputs[requested.name])
            if requested.parameters.get("binary_data", all_binary) is True:
                tail.append(_packed(array))
                tensor.parameters = {"binary_data_size": len(tail[-1])}
            else:
                tensor.data = array.ravel().tolist()
            tensors.append(tensor)
        json = msgspec.json.encode(InferenceResponse(self.name, self.version, tensors, request.id))
        return b"".join([json, *tail]), len(json) if tail else None


def _tensor(end: Any) -> dict[str, Any]:
    """Return the metadata of an input or output of onnxruntime, for any number of images."""
    sides = [side if isinstance(side, int) else -1 for side in end.shape[1:]]
    return {"name": end.name, "datatype": DATATYPES[end.type], "shape": [-1, *sides]}


def _elements(data: msgspec.Raw, kind: type[Kind], text: str) -> Kind:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"The elements of '{INPUT}' must be {text}: {error}.") from None


def _pixels(shape: list[int], data: msgspec.Raw | memoryview, channels: int) -> Images:
    if len(shape) != 4 or min(shape) < 1 or shape[3] != channels:
        raise UserError(f"A UINT8 input must have the shape [B, H, W, {channels}], got {shape}.")
    try:
        if isinstance(data, memoryview):
            values = np.frombuffer(data, np.uint8)
        else:
            values = np.array(_elements(data, Elements, "integers from 0 to 255"), np.uint8)
    except ValueError as error:
        raise UserError(f"The elements of '{INPUT}' do not form a tensor: {one_line(error)}.") from None
    if values.size != math.prod(shape):
        raise UserError(f"The shape {shape} needs {math.prod(shape)} elements, got {values.size}.")
    return values.reshape(shape)


def _encoded(shape: list[int], data: msgspec.Raw | memoryview) -> list[bytes]:
    if len(shape) != 1 or shape[0] < 1:
        raise UserError(f"A BYTES input must have the shape [B], got {shape}.")
    if isinstance(data, msgspec.Raw):
        try:
            texts = _elements(data, list[str], "images in base64")
            images = [binascii.a2b_base64(text, strict_mode=True) for text in texts]
        except ValueError as error:
            raise UserError(f"The elements of '{INPUT}' must be images in base64: {error}.") from None
    else:
        images, start = [], 0
        while start + 4 <= len(data):
            (size,) = struct.unpack_from("<I", data, start)
            images.append(bytes(data[start + 4 : start + 4 + size]))
            start += 4 + size
        if start != len(data):
            raise UserError(
                "Each element of a BYTES tensor must be its length (4 bytes, little endian), followed by its bytes."
            )
    if len(images) != shape[0]:
        raise UserError(f"The shape {shape} needs {shape[0]} elements, got {len(images)}.")
    return images


def _packed(array: Any) -> bytes:
    """Return the bytes of a tensor, little endian. A string has its length in front."""
    if array.dtype != object:
        return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    texts = [text.encode() for text in array]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
