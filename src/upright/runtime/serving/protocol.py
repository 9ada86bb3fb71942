"""The Open Inference Protocol (KServe v2) over HTTP: its JSON and its binary extension.

Source: https://github.com/kserve/open-inference-protocol (``inference_rest.md``, ``open_inference_rest.yaml``), and
the binary tensor data extension, https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol.
The protocol does not define encoded images in JSON. Here the elements of a BYTES tensor are base64.
"""

import binascii
import math
import struct
from typing import Annotated, Any

import msgspec
import numpy as np

from upright.errors import UserError
from upright.images import ImageSpec
from upright.runtime.serving.batching import Images, Rows

HEADER = "Inference-Header-Content-Length"
"""Header with the length of the JSON in bytes. The binary tensors follow the JSON."""
INPUT, PROBABILITIES, LABELS = "images", "probabilities", "labels"

Size = Annotated[int, msgspec.Meta(ge=0)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Elements = list[Byte | list[Byte | list[Byte | list[Byte]]]]
"""Elements of a UINT8 tensor in JSON, flat or nested. msgspec checks them first, because NumPy would allocate the size
of the longest string for every element."""


class InputTensor(msgspec.Struct):
    """An input tensor. Without ``data``, ``parameters["binary_data_size"]`` bytes follow the JSON."""

    name: str
    shape: list[Size]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


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


def number(text: str) -> int:
    """Parse digits. Return -1 for any other text, and for more digits than any limit has."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1


def read(body: bytes, header: str | None, channels: int) -> tuple[InferenceRequest, Images | list[bytes]]:
    """Parse a request. Return it with its images, which are decoded ``(B, H, W, C)`` or the bytes of files.

    Args:
        body: body of the request.
        header: value of `HEADER`, if the request has one.
        channels: number of channels of the model's input.

    Raises:
        UserError: if the request is wrong, or asks for an unknown output.
    """
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
        if output.name not in (PROBABILITIES, LABELS):
            raise UserError(f"The model has no output {output.name!r}; outputs: {PROBABILITIES}, {LABELS}.")
    if [tensor.name for tensor in request.inputs] != [INPUT]:
        names = ", ".join(repr(tensor.name) for tensor in request.inputs) or "none"
        raise UserError(f"The request must have one input, '{INPUT}'; got {names}.")
    (tensor,) = request.inputs
    rest, binary = memoryview(body)[end:], tensor.parameters.get("binary_data_size")
    if (binary is None) == (tensor.data is None) or len(rest) != (binary or 0):
        raise UserError(
            "An input must have either 'data' or parameters.binary_data_size, the number of bytes after the JSON "
            f"(whose length is in {HEADER}); got binary_data_size {binary}, and {len(rest)} bytes after the JSON."
        )
    data = rest if tensor.data is None else tensor.data
    if tensor.datatype == "UINT8":
        return request, _pixels(tensor.shape, data, channels)
    if tensor.datatype == "BYTES":
        return request, _encoded(tensor.shape, data)
    raise UserError(
        f"Input '{INPUT}' must be UINT8 (pixels, [B, H, W, {channels}]) or BYTES (encoded images, [B]); "
        f"got {tensor.datatype!r}."
    )


def _pixels(shape: list[int], data: list[Any] | memoryview, channels: int) -> Images:
    if len(shape) != 4 or min(shape) < 1 or shape[3] != channels:
        raise UserError(f"A UINT8 input must have the shape [B, H, W, {channels}], got {shape}.")
    try:
        if isinstance(data, memoryview):
            values = np.frombuffer(data, np.uint8)
        else:
            values = np.array(msgspec.convert(data, Elements), np.uint8)
    except msgspec.ValidationError as error:
        raise UserError(f"The elements of '{INPUT}' must be integers from 0 to 255: {error}.") from None
    except ValueError as error:
        raise UserError(f"The elements of '{INPUT}' do not form a tensor: {' '.join(str(error).split())}.") from None
    if values.size != math.prod(shape):
        raise UserError(f"The shape {shape} needs {math.prod(shape)} elements, got {values.size}.")
    return values.reshape(shape)


def _encoded(shape: list[int], data: list[Any] | memoryview) -> list[bytes]:
    if len(shape) != 1 or shape[0] < 1:
        raise UserError(f"A BYTES input must have the shape [B], got {shape}.")
    if isinstance(data, list):
        try:
            images = [binascii.a2b_base64(text, strict_mode=True) for text in msgspec.convert(data, list[str])]
        except (ValueError, msgspec.ValidationError) as error:
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


def write(request: InferenceRequest, rows: Rows, spec: ImageSpec, name: str, version: str) -> tuple[bytes, int | None]:
    """Return the body of the response, and the length of its JSON if binary tensors follow the JSON."""
    outputs, tail = [], []
    all_binary = request.parameters.get("binary_data_output") is True
    for requested in request.outputs or [RequestedOutput(PROBABILITIES), RequestedOutput(LABELS)]:
        if requested.name == PROBABILITIES:
            output, packed = OutputTensor(PROBABILITIES, list(rows.shape), "FP32"), rows.astype("<f4").tobytes()
            values: list[Any] = rows.ravel().tolist()
        else:
            values = [spec.classes[best] for best in rows.argmax(axis=1)]
            output, packed = OutputTensor(LABELS, [len(rows)], "BYTES"), b"".join(map(_packed, values))
        if requested.parameters.get("binary_data", all_binary) is True:
            output.parameters = {"binary_data_size": len(packed)}
            tail.append(packed)
        else:
            output.data = values
        outputs.append(output)
    json = msgspec.json.encode(InferenceResponse(name, version, outputs, request.id))
    return b"".join([json, *tail]), len(json) if tail else None


def _packed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def metadata(spec: ImageSpec, name: str, version: str) -> dict[str, Any]:
    """Return the metadata of the model."""
    return {
        "name": name,
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, -1, -1, spec.channels]}],
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(spec.classes)]},
            {"name": LABELS, "datatype": "BYTES", "shape": [-1]},
        ],
    }
