"""`upright serve` conforms to the Open Inference Protocol and returns every output; the suite finds deviations."""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Upright
from tests.runtime.bundles import write_bundle
from tests.runtime.conformance import Answer, Server, generated_violations, protocol_violations, triton_violations
from tests.runtime.test_server import request, serving
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.errors import UprightError
from upright.exporting.graph import Form
from upright.images import ImageSpec
from upright.options import Serve
from upright.runtime.predictor import Predictor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a fixed size and further outputs."""
    spec = ImageSpec(1, 20, 20, ("a", "b"), (0.5,), (0.5,))
    network = partial(TransformerNetwork, network=LeNet, transformer=partial(SpatialTransformer, transform="rotation"))
    form = Form(size=(20, 20), outputs=("theta", "warped", "logits"))
    return write_bundle(tmp_path_factory.mktemp("bundles") / "made", spec, network, form)


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[Server]:
    with serving(made, "--name", "named", "--model-version", "7", "--quiet") as running:
        yield Server(f"http://127.0.0.1:{running.port}", "named")


def test_serve_conforms(served: Server) -> None:
    assert list(protocol_violations(served)) == []


def test_the_metadata_state_fixed_sizes_and_all_outputs(served: Server) -> None:
    metadata = served.ask("GET", "/v2/models/named").json
    assert metadata["versions"] == ["7"]
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 20, 20, 1]}]
    shapes = {output["name"]: output["shape"] for output in metadata["outputs"]}
    assert shapes == {
        "probabilities": [-1, 2],
        "theta": [-1, 2],
        "warped": [-1, 20, 20, 1],
        "logits": [-1, 2],
        "labels": [-1],
    }


def test_every_output_is_reachable(made: Path, upright: Upright) -> None:
    from upright.runtime.serving.service import Service

    predictor, paths = Predictor(made), sorted(made.glob("samples/*.png"))
    expected = predictor.outputs(paths)
    assert list(expected) == predictor.output_names == ["probabilities", "theta", "warped", "logits"]
    softmax = np.exp(expected["logits"]) / np.exp(expected["logits"]).sum(axis=1, keepdims=True)
    assert softmax == pytest.approx(expected["probabilities"], abs=1e-5) and len(softmax) == 4
    with pytest.raises(UprightError, match="has no output 'votes', only probabilities, theta, warped, logits; "):
        predictor.outputs(paths, ["votes"])
    with pytest.raises(UprightError, match="at least one image, got none"):
        predictor.outputs([])

    async def scenario() -> None:
        service = Service(predictor, Serve(str(made)))
        images = [path.read_bytes() for path in paths]
        # Requests with and without outputs share a batch.
        replies = await asyncio.gather(
            *(request(service, "/v1/classify", image, b"outputs=logits") for image in images),
            request(service, "/v1/classify", images[0]),
        )
        for reply, logits in zip(replies, expected["logits"], strict=False):
            (result,) = reply.json["results"]
            assert result["outputs"] == {"logits": pytest.approx(logits.tolist(), abs=1e-4)}
        assert "outputs" not in replies[-1].json["results"][0]
        reply = await request(service, "/v1/classify", images[0], b"outputs=x")
        assert reply.status == 400 and "has no output 'x'" in reply.json["error"]
        data = [base64.b64encode(image).decode() for image in images]
        encoded = {"name": "images", "shape": [4], "datatype": "BYTES", "data": data}
        reply = await request(service, "/v2/models/made/infer", json.dumps({"inputs": [encoded]}).encode())
        arrays = {output["name"]: output["data"] for output in reply.json["outputs"]}
        assert list(arrays) == ["probabilities", "theta", "warped", "logits", "labels"]
        assert arrays["logits"] == pytest.approx(expected["logits"].ravel().tolist(), abs=1e-4)
        service.decoders.shutdown()
        service.loaded.batcher.close()

    asyncio.run(scenario())
    answer = upright("infer", made, *paths, "--outputs", "logits", "--format", "jsonl", "--npz", "all.npz")
    lines = [json.loads(line)["outputs"]["logits"] for line in answer.out.splitlines()]
    with np.load("all.npz") as arrays:
        assert arrays["paths"].tolist() == list(map(str, paths)) and arrays["classes"].tolist() == ["a", "b"]
        for actual in (arrays["logits"], lines):
            assert np.array(actual) == pytest.approx(expected["logits"], abs=1e-4)
    for options, message in (
        (["--outputs", "logits"], "--outputs needs --format jsonl or --npz FILE, got --format table."),
        (["--outputs", "votes", "--format", "jsonl"], "The model has no output 'votes'"),
        (["--npz", "x"], "--npz must be a file whose name ends in .npz, got 'x'."),
    ):
        answer = upright("infer", made, paths[0], *options)
        assert answer.code == 2 and message in answer.err


class Deviating(Server):
    """A server whose JSON `change` alters."""

    change: Callable[[dict[str, Any]], object]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        answer = super().ask(method, path, body, **headers)
        if not path.endswith("infer") or answer.status != 200 or answer.header:
            return answer
        content = answer.json
        self.change(content)
        return answer._replace(body=json.dumps(content).encode())


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (lambda answer: answer.pop("id", None), "the id 'an id' became None"),
        (lambda answer: answer.update(model_name="x"), "model_name is 'x', not 'named'"),
        (lambda answer: answer["outputs"][0].pop("data"), "'data' is a required property"),
        (lambda answer: answer["outputs"][0]["shape"].append(1), "not as in the metadata"),
        (lambda answer: answer["outputs"].reverse(), "the outputs are"),
    ],
)
def test_the_suite_finds_deviations(served: Server, change: Callable[[Any], object], violation: str) -> None:
    deviating = Deviating(*served)
    deviating.change = change  # type: ignore[misc]
    violations = []
    try:
        violations += protocol_violations(deviating)
    except KeyError as error:
        pytest.fail(f"the suite stops with {error!r}")
    assert any(violation in text for text in violations), violations


@pytest.mark.slow
def test_generated_requests(served: Server) -> None:
    pytest.importorskip("schemathesis")
    assert list(generated_violations(served, 5000)) == []


def test_tritonclient(served: Server) -> None:
    pytest.importorskip("geventhttpclient")
    assert list(triton_violations(served)) == []
