"""Conformance of any server to the Open Inference Protocol (KServe v2) over HTTP.

    python -m tests.runtime.conformance http://localhost:8000 NAME [--cases 5000]

The first part sends requests that the metadata of the model describe, as JSON and as binary tensors. The second part
(``--cases``, which needs schemathesis) generates requests from the protocol's own OpenAPI file. The third part sends
requests by tritonclient and by kserve, if they are installed. The command prints each violation, and exits with 1 if
there is one.
"""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import numpy as np
import yaml

PROTOCOL = Path(__file__).with_name("open_inference_rest.yaml")
HEADER = "Inference-Header-Content-Length"
TYPES = {"BOOL": "?", "FP16": "f2", "FP32": "f4", "FP64": "f8"}
TYPES |= {f"{sign}INT{8 * size}": f"{sign.lower() or 'i'}{size}" for sign in ("", "U") for size in (1, 2, 4, 8)}
FREE_SIDE = 8
"""Length of an axis that the metadata leave free."""


class Answer(NamedTuple):
    status: int
    header: int | None
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body[: self.header])


class Server(NamedTuple):
    """The address of a server and the name of a model."""

    address: str
    model: str

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, urlsplit(self.address).path + path, body, headers)
        response = connection.getresponse()
        length = response.getheader(HEADER)
        answer = Answer(response.status, int(length) if length else None, response.read())
        connection.close()
        return answer

    def infer(self, content: Any, tail: bytes = b"") -> Answer:
        body = json.dumps(content).encode()
        headers = {"Content_Type": "application/json"}
        if tail:
            headers = {HEADER: str(len(body)), "Content_Type": "application/octet-stream"}
        return self.ask("POST", f"/v2/models/{self.model}/infer", body + tail, **headers)


def document(model: str, version: str) -> dict[str, Any]:
    """Return the protocol's OpenAPI description for one model."""
    text = PROTOCOL.read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text.replace("${MODEL_NAME}", model).replace("${MODEL_VERSION}", version))
    for operations in content["paths"].values():
        operations.pop("parameters", None)
    return content


def schema_errors(name: str, value: Any) -> list[str]:
    """Validate a value by a schema of the protocol."""
    content = document("x", "1")
    schema = {"$ref": f"#/components/schemas/{name}", "components": content["components"]}
    errors = jsonschema.Draft4Validator(schema).iter_errors(value)
    return [f"{name}: {error.message[:200]}" for error in errors]


def array_for(tensor: dict[str, Any], seed: int = 0) -> Any:
    """Return an array for an input of the metadata, with two images."""
    shape = [side if side > 0 else FREE_SIDE for side in tensor["shape"]]
    if tensor["shape"][0] < 0:
        shape[0] = 2
    values = np.random.default_rng(seed).integers(0, 2 if tensor["datatype"] == "BOOL" else 100, shape)
    return values.astype(TYPES[tensor["datatype"]])


def protocol_violations(server: Server) -> Iterator[str]:
    """Yield violations by requests that the metadata describe."""
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{server.model}/ready"):
        if (status := server.ask("GET", path).status) != 200:
            yield f"GET {path}: status {status}, not 200"
    metadata = server.ask("GET", "/v2").json
    yield from schema_errors("metadata_server_response", metadata)
    answer = server.ask("GET", f"/v2/models/{server.model}")
    if answer.status != 200:
        yield f"GET /v2/models/{server.model}: status {answer.status}, not 200"
        return
    model = answer.json
    yield from schema_errors("metadata_model_response", model)
    for version in model.get("versions", []):
        path = f"/v2/models/{server.model}/versions/{version}"
        if server.ask("GET", path).json != model or server.ask("GET", f"{path}/ready").status != 200:
            yield f"{path} does not answer as /v2/models/{server.model}"
    answer = server.ask("GET", "/v2/models/no-such-model")
    if not 400 <= answer.status < 500 or schema_errors("metadata_model_error_response", answer.json):
        yield f"an unknown model: status {answer.status}, {answer.body[:100]!r}"
    arrays = {tensor["name"]: array_for(tensor) for tensor in model["inputs"]}
    heads = [
        {"name": tensor["name"], "shape": list(arrays[tensor["name"]].shape), "datatype": tensor["datatype"]}
        for tensor in model["inputs"]
    ]
    flat = [head | {"data": arrays[head["name"]].ravel().tolist()} for head in heads]
    nested = [head | {"data": arrays[head["name"]].tolist()} for head in heads]
    answer = server.infer({"inputs": flat, "id": "an id"})
    yield from response_violations(server, model, answer, [tensor["name"] for tensor in model["outputs"]])
    if answer.status != 200:
        return
    response = answer.json
    if response.get("id") != "an id":
        yield f"the id 'an id' became {response.get('id')!r}"
    if not same(server.infer({"inputs": nested}).json["outputs"], response["outputs"]):
        yield "nested data give other outputs than flat data"
    names = [tensor["name"] for tensor in reversed(model["outputs"])]
    for requested in (names, names[:1]):
        answer = server.infer({"inputs": flat, "outputs": [{"name": name} for name in requested]})
        yield from response_violations(server, model, answer, requested)
    bad = {
        "an unknown output": {"inputs": flat, "outputs": [{"name": "no such output"}]},
        "no inputs": {"inputs": []},
        "an unknown input": {"inputs": [*flat, flat[0] | {"name": "no such input"}]},
        "too few elements": {"inputs": [flat[0] | {"data": flat[0]["data"][1:]}, *flat[1:]]},
        "an unknown datatype": {"inputs": [flat[0] | {"datatype": "FP7"}, *flat[1:]]},
        "no JSON object": [],
    }
    for kind, content in bad.items():
        answer = server.infer(content)
        if not 400 <= answer.status < 500 or schema_errors("inference_error_response", answer.json):
            yield f"{kind}: status {answer.status}, {answer.body[:100]!r}"
    if "binary_tensor_data" in metadata.get("extensions", []):
        tail = [arrays[head["name"]].tobytes() for head in heads]
        binary = [
            head | {"parameters": {"binary_data_size": len(part)}} for head, part in zip(heads, tail, strict=True)
        ]
        answer = server.infer({"inputs": binary, "parameters": {"binary_data_output": True}}, b"".join(tail))
        if answer.status != 200 or not same(unpacked(answer), response["outputs"]):
            yield f"binary tensors give other outputs than JSON: status {answer.status}, {answer.body[:100]!r}"


def response_violations(server: Server, model: dict[str, Any], answer: Answer, names: list[str]) -> Iterator[str]:
    """Yield violations of a response that must have the outputs ``names``."""
    if answer.status != 200:
        yield f"an inference by the metadata: status {answer.status}, {answer.body[:200]!r}"
        return
    response = answer.json
    yield from schema_errors("inference_response", response)
    if response["model_name"] != server.model:
        yield f"model_name is {response['model_name']!r}, not {server.model!r}"
    if (actual := [output["name"] for output in response["outputs"]]) != names:
        yield f"the outputs are {actual}, not {names}"
    declared = {tensor["name"]: tensor for tensor in model["outputs"]}
    for output in response["outputs"]:
        shape, tensor = output["shape"], declared[output["name"]]
        fits = len(shape) == len(tensor["shape"])
        fits = fits and all(side < 0 or side == actual for side, actual in zip(tensor["shape"], shape, strict=True))
        if not fits or output["datatype"] != tensor["datatype"]:
            yield f"output {output['name']} is {output['datatype']} {shape}, not as in the metadata"
        if (size := np.size(output.get("data", []))) != math.prod(shape):
            yield f"output {output['name']} has {size} elements for the shape {shape}"


def unpacked(answer: Answer) -> list[dict[str, Any]]:
    """Return the outputs of a response with binary tensors, with ``data`` as in JSON."""
    assert answer.header is not None
    start, outputs = answer.header, answer.json["outputs"]
    for output in outputs:
        part = answer.body[start : start + output["parameters"]["binary_data_size"]]
        start += len(part)
        if output["datatype"] == "BYTES":
            output["data"] = []
            while part:
                end = 4 + int.from_bytes(part[:4], "little")
                output["data"].append(part[4:end].decode())
                part = part[end:]
        else:
            output["data"] = np.frombuffer(part, TYPES[output["datatype"]]).tolist()
    return outputs


def same(outputs: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Return whether two lists of outputs are equal, apart from rounding."""

    def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
        if one["name"] != other["name"]:
            return False
        if one["datatype"] == "BYTES":
            return bool(one.get("data") == other.get("data"))
        values = np.ravel(one.get("data", [])), np.ravel(other.get("data", []))
        return values[0].shape == values[1].shape and np.allclose(*values, atol=1e-4)

    return len(outputs) == len(others) and all(map(equal, outputs, others))


def generated_violations(server: Server, cases: int) -> Iterator[str]:
    """Yield violations by requests that schemathesis generates: ``cases`` inferences, and a few of each other route."""
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error

    (version,) = server.ask("GET", f"/v2/models/{server.model}").json["versions"][:1]
    content = document(server.model, version)
    schema = schemathesis.openapi.from_dict(content)
    counts = {"valid": 0, "invalid": 0}
    violations: list[str] = []

    def check(case: Any) -> None:
        response = case.call(base_url=server.address)
        counts["invalid" if case.meta and case.meta.generation.mode.is_negative else "valid"] += 1
        try:
            case.validate_response(response, checks=[not_a_server_error])
            body = response.json()
            if response.status_code >= 400:
                errors = schema_errors("inference_error_response", body)
                errors += [] if isinstance(body.get("error"), str) else ["no error"]
            elif case.method == "POST":
                errors = schema_errors("inference_response", body)
            else:
                errors = []
        except Exception as error:
            errors = [repr(error)]
        violations.extend(f"{case.method} {case.path}, body {str(case.body)[:200]}: {error}" for error in errors)

    for result in schema.get_all_operations():
        operation = result.ok()
        count = cases if operation.method == "post" else 10
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            if mode.is_negative and operation.method != "post":
                continue
            settings = hypothesis.settings(
                max_examples=count // 2 or 1,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            settings(hypothesis.given(case=operation.as_strategy(generation_mode=mode))(check))()
    print(
        f"schemathesis: {counts['valid']} valid and {counts['invalid']} invalid requests, {len(violations)} violations"
    )
    yield from violations


def triton_violations(server: Server) -> Iterator[str]:
    """Yield violations by round trips of tritonclient."""
    import tritonclient.http as triton

    client = triton.InferenceServerClient(urlsplit(server.address).netloc)
    model = client.get_model_metadata(server.model)
    if not (client.is_server_live() and client.is_server_ready() and client.is_model_ready(server.model)):
        yield "tritonclient: the server is not ready"
    answers = []
    for binary in (False, True):
        for compression in (None, "gzip", "deflate"):
            inputs = []
            for tensor in model["inputs"]:
                array = array_for(tensor)
                inputs.append(triton.InferInput(tensor["name"], list(array.shape), tensor["datatype"]))
                inputs[-1].set_data_from_numpy(array, binary_data=binary)
            outputs = [triton.InferRequestedOutput(tensor["name"], binary_data=binary) for tensor in model["outputs"]]
            result = client.infer(server.model, inputs, outputs=outputs, request_compression_algorithm=compression)
            answers.append({tensor["name"]: result.as_numpy(tensor["name"]) for tensor in model["outputs"]})
    for answer in answers[1:]:
        for name, array in answer.items():
            first = answers[0][name]
            if not (np.allclose(first, array, atol=1e-4) if array.dtype.kind == "f" else texts(first) == texts(array)):
                yield f"tritonclient: output {name} depends on the encoding of the request"


def texts(array: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in array.ravel()]


def kserve_violations(server: Server) -> Iterator[str]:
    """Yield violations by round trips of kserve's client."""
    import kserve

    async def ask() -> list[str]:
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=60))
        violations = []
        if not (await client.is_server_live(server.address) and await client.is_server_ready(server.address)):
            violations.append("kserve: the server is not ready")
        if not await client.is_model_ready(server.address, server.model):
            violations.append("kserve: the model is not ready")
        answers = []
        for binary in (False, True):
            inputs = []
            for tensor in server.ask("GET", f"/v2/models/{server.model}").json["inputs"]:
                array = array_for(tensor)
                inputs.append(kserve.InferInput(tensor["name"], list(array.shape), tensor["datatype"]))
                inputs[-1].set_data_from_numpy(array, binary_data=binary)
            request = kserve.InferRequest(model_name=server.model, infer_inputs=inputs)
            response = await client.infer(server.address, request, model_name=server.model)
            answers.append({output.name: output.as_numpy() for output in response.outputs})
        for name, array in answers[0].items():
            if array.dtype.kind == "f" and not np.allclose(array, answers[1][name], atol=1e-4):
                violations.append(f"kserve: output {name} depends on the encoding of the request")
        await client.close()
        return violations

    yield from asyncio.run(ask())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="for example http://localhost:8000")
    parser.add_argument("model", help="name of the model")
    parser.add_argument("--cases", type=int, default=0, help="number of inferences that schemathesis generates")
    options = parser.parse_args()
    server = Server(options.address.rstrip("/"), options.model)
    parts = [protocol_violations(server)]
    if options.cases:
        parts.append(generated_violations(server, options.cases))
    for package, part in (("geventhttpclient", triton_violations), ("kserve", kserve_violations)):
        if find_spec(package):
            parts.append(part(server))
        else:
            print(f"{package} is not installed, so {part.__name__} did not run")
    violations = [violation for part in parts for violation in part]
    print(*violations[:50], f"{len(violations)} violations", sep="\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
