"""OpenAPI description of the server, and a page that displays it offline."""

from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from typing import Any, NamedTuple

import msgspec

from upright.images import TaskName
from upright.runtime.serving.protocol import HEADER, LABELS, InferenceRequest, InferenceResponse, Model

JSON = "application/json"
BINARY = {"type": "string", "format": "binary"}
REFERENCE = "#/components/schemas/{name}"


class RankedClass(msgspec.Struct):
    """A class and its probability."""

    label: str
    probability: float


class Result(msgspec.Struct, omit_defaults=True):
    """A prediction, classes, an orientation or an error for one image.

    ``labels`` are classes whose probability reaches the threshold. ``angle`` is in degrees anticlockwise, -180 to 180.
    """

    name: str | None = None
    label: str | None = None
    probability: float | None = None
    top: list[RankedClass] | None = None
    labels: list[RankedClass] | None = None
    angle: float | None = None
    confidence: float | None = None
    outputs: dict[str, list[Any]] | None = None
    error: str | None = None


class Results(msgspec.Struct, omit_defaults=True):
    """One result per image, in the order of the images; ``error`` if no image could be read."""

    model: str
    version: str
    results: list[Result]
    error: str | None = None


class Error(msgspec.Struct):
    """An error message of one line."""

    error: str


class Answers(NamedTuple):
    """Route for images of one task, and texts about it."""

    route: str
    title: str
    action: str
    result: str


ANSWERS: dict[TaskName, Answers] = {
    "classification": Answers(
        "/v1/classify",
        "an image classifier",
        "Classify",
        "a label with its probability (`top` is the number of classes to return)",
    ),
    "multilabel": Answers(
        "/v1/labels",
        "an image classifier with several classes per image",
        "Find the classes of",
        "its classes with their probabilities, the most probable first; there may be none",
    ),
    "orientation": Answers(
        "/v1/orientation",
        "the orientation of images",
        "Estimate the orientation of",
        "its rotation in degrees anticlockwise with a confidence from 0 to 1",
    ),
}


def openapi(model: Model, task: TaskName, limit: int, root_path: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of a server that takes ``limit`` images per request."""
    classes, answers = len(model.classes), ANSWERS[task]
    names = {"type": "array", "items": {"enum": [name for name in model.outputs if name != LABELS]}}
    outputs = _parameter("outputs", "query", names, style="form", explode=False)
    top = _parameter("top", "query", {"type": "integer", "minimum": 1, "maximum": classes, "default": 1})
    encoding = _parameter("Content-Encoding", "header", {"enum": ["gzip", "deflate", "identity"]})
    length = _parameter(HEADER, "header", {"type": "integer", "minimum": 0})
    top_query = f"?top={min(3, classes)}" if classes else ""
    images = _operation(
        f"{answers.action} an image, or up to {limit}",
        (400, 408, 413, 415, 422, 429, 431, 500, 503),
        "The body is one image, of any content type, or multipart/form-data with one image per part that has a "
        "filename; parts without a filename are ignored. The result for each image is "
        f"{answers.result}, or an error. `outputs` lists further outputs of the model, separated by commas.",
        f"curl --data-binary @image.png 'ADDRESS{answers.route}{top_query}'",
        {JSON: _reference("Results")},
        {"*/*": BINARY, "multipart/form-data": {"type": "object", "additionalProperties": BINARY}},
        [*([top] if classes else []), outputs, encoding],
    )
    route = f"/v2/models/{model.name}"
    tensors = {kind: "; ".join(map(_tensor, model.metadata[kind])) for kind in ("inputs", "outputs")}
    infer = _operation(
        f"{answers.action} images by the Open Inference Protocol",
        (400, 404, 408, 413, 415, 429, 431, 500, 503),
        f"Input: {tensors['inputs']}, or images BYTES [-1] (encoded; base64 in JSON). Outputs: {tensors['outputs']}. "
        f"-1 is any length. Binary tensors may follow the JSON, whose length is then in {HEADER}.",
        f"curl --json @request.json ADDRESS{route}/infer",
        {JSON: _reference("InferenceResponse"), "application/octet-stream": BINARY},
        {JSON: _reference("InferenceRequest"), "application/octet-stream": BINARY},
        [encoding, length],
    )
    paths = {answers.route: {"post": images}}
    for model_route in (route, f"{route}/versions/{model.version}"):
        paths |= {
            f"{model_route}/infer": {"post": infer},
            model_route: {"get": _operation("Inputs, outputs and version of the model", (404,))},
            f"{model_route}/ready": {"get": _operation("Readiness of the model", (404, 503))},
        }
    paths |= {
        "/v2": {"get": _operation("Name, version and extensions of the server")},
        "/v2/health/live": {"get": _operation("Liveness of the server")},
        "/v2/health/ready": {"get": _operation("Readiness of the server; false while it stops", (503,))},
        "/metrics": {"get": _operation("Counts and times, for Prometheus")},
    }
    types = (Results, Error, InferenceRequest, InferenceResponse)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{model.name}: {answers.title}", "version": version("upright")},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": msgspec.json.schema_components(types, ref_template=REFERENCE)[1]},
    }


def _reference(schema: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=schema)}


def _parameter(name: str, place: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "schema": schema, **more}


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['datatype']} {tensor['shape']}"


MEANINGS = {
    400: "The request is wrong; see `error`.",
    404: "There is no such model or version, or the model has another task.",
    408: "The headers or the body did not arrive in time.",
    413: "The request has more bytes or images than allowed.",
    415: "The content encoding is unknown.",
    422: "No image could be read.",
    429: "The queue is full: try again after the seconds in Retry-After.",
    431: "The headers are too many or too large.",
    500: "The model or the server failed; see the server's log.",
    503: "The server is stopping, or the model did not finish in time: try again after the seconds in Retry-After.",
}


def _operation(
    summary: str,
    errors: Sequence[int] = (),
    description: str = "",
    example: str = "",
    answer: dict[str, Any] | None = None,
    body: dict[str, Any] | None = None,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return an operation. ``answer`` and ``body`` are schemas by content type."""

    def content(schemas: dict[str, Any]) -> dict[str, Any]:
        return {kind: {"schema": schema} for kind, schema in schemas.items()}

    responses: dict[str, Any] = {"200": {"description": "OK"} | ({"content": content(answer)} if answer else {})}
    for status in errors:
        responses[str(status)] = {"description": MEANINGS[status], "content": content({JSON: _reference("Error")})}
    operation: dict[str, Any] = {"summary": summary, "description": description, "x-example": example}
    operation |= {"responses": responses, "parameters": list(parameters)}
    if body:
        operation["requestBody"] = {"required": True, "content": content(body)}
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
