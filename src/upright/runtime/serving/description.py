"""OpenAPI description of the server, and a page that displays it offline."""

from html import escape
from importlib.metadata import version
from typing import Any

import msgspec

from upright.images import ImageSpec
from upright.runtime.serving.protocol import InferenceRequest, InferenceResponse


class RankedClass(msgspec.Struct):
    """A class and its probability."""

    label: str
    probability: float


class Result(msgspec.Struct, omit_defaults=True):
    """A prediction or an error for one image."""

    name: str | None = None
    label: str | None = None
    probability: float | None = None
    top: list[RankedClass] | None = None
    error: str | None = None


class ClassifyResponse(msgspec.Struct, omit_defaults=True):
    """One result per image, in the order of the images; ``error`` if no image could be read."""

    model: str
    version: str
    results: list[Result]
    error: str | None = None


class Error(msgspec.Struct):
    """An error message of one line."""

    error: str


SCHEMAS = "#/components/schemas/"


def openapi(name: str, spec: ImageSpec, limit: int) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of a server for the model ``name``, with ``limit`` images per request."""
    classes = len(spec.classes)
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    top = {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": classes, "default": 1}}
    _, components = msgspec.json.schema_components(
        [ClassifyResponse, Error, InferenceRequest, InferenceResponse], ref_template=SCHEMAS + "{name}"
    )
    model = f"/v2/models/{name}"
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{name}: an image classifier", "version": version("upright")},
        "paths": {
            "/v1/classify": {
                "post": _operation(
                    f"Classify an image, or up to {limit}",
                    "The body is one image, or multipart/form-data with one image per part. Each image has its own "
                    "result: a label with its probability, or an error. `top` is the number of classes to return.",
                    "ClassifyResponse",
                    f"curl --data-binary @image.png 'ADDRESS/v1/classify?top={min(3, classes)}'",
                    bad=(400, 408, 413, 422, 429, 500, 503),
                    parameters=[top],
                    requestBody={"content": {"image/*": binary, "multipart/form-data": {"schema": files}}},
                )
            },
            f"{model}/infer": {
                "post": _operation(
                    "Classify images by the Open Inference Protocol",
                    f"Input `images`: UINT8 [B, H, W, {spec.channels}], or BYTES [B] (encoded; base64 in JSON). "
                    f"Outputs: `probabilities` FP32 [B, {classes}], `labels` BYTES [B]. Binary tensors may follow the "
                    "JSON (Inference-Header-Content-Length).",
                    "InferenceResponse",
                    f"curl --json @request.json ADDRESS{model}/infer",
                    bad=(400, 404, 408, 413, 429, 500, 503),
                    requestBody={"content": {"application/json": {"schema": {"$ref": SCHEMAS + "InferenceRequest"}}}},
                )
            },
            model: {"get": _operation("Inputs, outputs and version of the model")},
            f"{model}/ready": {"get": _operation("Readiness of the model", bad=(404, 503))},
            "/v2": {"get": _operation("Name, version and extensions of the server")},
            "/v2/health/live": {"get": _operation("Liveness of the server")},
            "/v2/health/ready": {"get": _operation("Readiness of the server; false while it stops", bad=(503,))},
            "/metrics": {"get": _operation("Counts and times, for Prometheus")},
        },
        "components": {"schemas": components},
    }


MEANINGS = {
    400: "The request is wrong; see `error`.",
    404: "There is no such model or version.",
    408: "The body did not arrive in time.",
    413: "The request has more bytes or images than allowed.",
    422: "No image could be read.",
    429: "The queue is full: try again after the seconds in Retry-After.",
    500: "The model or the server failed; see the server's log.",
    503: "The server is stopping, or the model did not finish in time: try again after the seconds in Retry-After.",
}


def _operation(
    summary: str,
    description: str = "",
    response: str = "",
    example: str = "",
    bad: tuple[int, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "OK"}}
    if response:
        responses["200"]["content"] = {"application/json": {"schema": {"$ref": SCHEMAS + response}}}
    error = {"application/json": {"schema": {"$ref": SCHEMAS + "Error"}}}
    responses |= {str(status): {"description": MEANINGS[status], "content": error} for status in bad}
    operation = {"summary": summary, "description": description, "x-example": example, "responses": responses, **more}
    return {key: value for key, value in operation.items() if value}


def page(description: dict[str, Any]) -> str:
    """Return the description as HTML."""
    title = escape(description["info"]["title"])
    style = "body{max-width:46em;margin:2em auto;padding:0 1em;font:1em/1.5 sans-serif}pre{overflow:auto}"
    lines = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>",
        f"<h1>{title}</h1><p><a href=openapi.json>openapi.json</a>",
    ]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            lines.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.")
            lines.append(f"<p>{escape(operation.get('description', ''))}")
            if "x-example" in operation:
                lines.append(f"<pre>{escape(operation['x-example'])}</pre>")
            for status, response in operation["responses"].items():
                lines.append(f"<p>{status}: {escape(response['description'])}")
    return "\n".join(lines)
