"""What the server takes and gives, as OpenAPI, and as a page that needs nothing from elsewhere."""

from html import escape
from importlib.metadata import version
from typing import Any

import msgspec

from upright.images import ImageSpec
from upright.runtime.serving.protocol import InferenceRequest, InferenceResponse


class Ranked(msgspec.Struct):
    """A class, and how probable it is."""

    label: str
    probability: float


class Result(msgspec.Struct, omit_defaults=True):
    """Of one picture: an answer, or an error."""

    name: str | None = None
    label: str | None = None
    probability: float | None = None
    top: list[Ranked] | None = None
    error: str | None = None


class Answer(msgspec.Struct, omit_defaults=True):
    """One result per picture, in their order; ``error`` if none of them could be read."""

    model: str
    version: str
    results: list[Result]
    error: str | None = None


class Error(msgspec.Struct):
    """One line."""

    error: str


SCHEMAS = "#/components/schemas/"


def describe(name: str, spec: ImageSpec, most: int) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of the model ``name`` that takes up to ``most`` images at once."""
    classes = len(spec.classes)
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    top = {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": classes, "default": 1}}
    _, components = msgspec.json.schema_components(
        [Answer, Error, InferenceRequest, InferenceResponse], ref_template=SCHEMAS + "{name}"
    )
    model = f"/v2/models/{name}"
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{name}: an image classifier", "version": version("upright")},
        "paths": {
            "/v1/classify": {
                "post": _operation(
                    f"Classify a picture, or up to {most}",
                    "The body is one picture, or multipart/form-data with one per part. Each has a result of its own: "
                    "a label with its probability, or an error. `top` asks for the most probable classes.",
                    "Answer",
                    f"curl --data-binary @picture.png 'ADDRESS/v1/classify?top={min(3, classes)}'",
                    bad=(400, 408, 413, 422, 429, 503),
                    parameters=[top],
                    requestBody={"content": {"image/*": binary, "multipart/form-data": {"schema": files}}},
                )
            },
            f"{model}/infer": {
                "post": _operation(
                    "The same by the Open Inference Protocol",
                    f"Input `images`: UINT8 [B, H, W, {spec.channels}], or BYTES [B] (encoded; base64 in JSON). "
                    f"Outputs: `probabilities` FP32 [B, {classes}], `labels` BYTES [B]. Binary tensors may follow the "
                    "JSON (Inference-Header-Content-Length).",
                    "InferenceResponse",
                    f"curl --json @request.json ADDRESS{model}/infer",
                    bad=(400, 404, 408, 413, 429, 503),
                    requestBody={"content": {"application/json": {"schema": {"$ref": SCHEMAS + "InferenceRequest"}}}},
                )
            },
            model: {"get": _operation("Inputs, outputs and version of the model")},
            f"{model}/ready": {"get": _operation("Whether the model takes requests", bad=(404, 503))},
            "/v2": {"get": _operation("Name, version and extensions of the server")},
            "/v2/health/live": {"get": _operation("Whether the server runs")},
            "/v2/health/ready": {"get": _operation("Whether it takes requests; not while it stops", bad=(503,))},
            "/metrics": {"get": _operation("Counts and times, for Prometheus")},
        },
        "components": {"schemas": components},
    }


MEANINGS = {
    400: "The request cannot be read; `error` says why.",
    404: "There is no such model or version.",
    408: "The body did not come in time.",
    413: "More bytes or images than are taken.",
    422: "No picture could be read.",
    429: "Too many are waiting: try again after Retry-After.",
    503: "Stopping, or no answer in time: try again after Retry-After.",
}


def _operation(
    summary: str,
    description: str = "",
    answer: str = "",
    example: str = "",
    bad: tuple[int, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "OK"}}
    if answer:
        responses["200"]["content"] = {"application/json": {"schema": {"$ref": SCHEMAS + answer}}}
    error = {"application/json": {"schema": {"$ref": SCHEMAS + "Error"}}}
    responses |= {str(status): {"description": MEANINGS[status], "content": error} for status in bad}
    operation = {"summary": summary, "description": description, "x-example": example, "responses": responses, **more}
    return {key: value for key, value in operation.items() if value}


def page(description: dict[str, Any]) -> str:
    """The same as HTML."""
    lines = [f"<h1>{escape(description['info']['title'])}</h1><p><a href=openapi.json>openapi.json</a>"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            lines.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.")
            lines.append(f"<p>{escape(operation.get('description', ''))}")
            if "x-example" in operation:
                lines.append(f"<pre>{escape(operation['x-example'])}</pre>")
            answers = (
                f"<li>{status}: {escape(told['description'])}" for status, told in operation["responses"].items()
            )
            lines.append(f"<ul>{''.join(answers)}</ul>")
    style = "body{max-width:46em;margin:2em auto;padding:0 1em;font:1em/1.5 sans-serif}pre{overflow:auto}"
    title = escape(description["info"]["title"])
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>"
    return head + "\n".join(lines)
