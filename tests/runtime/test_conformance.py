"""`upright serve` conforms to the Open Inference Protocol, and the suite finds servers that do not."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.runtime.bundles import write_bundle
from tests.runtime.conformance import Answer, Server, generated_violations, protocol_violations, triton_violations
from tests.runtime.test_server import serving
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.exporting.graph import Form
from upright.images import ImageSpec


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a bundle with a fixed size and further outputs."""
    spec = ImageSpec(1, 20, 20, ("a", "b"), (0.5,), (0.5,))
    network = partial(TransformerNetwork, network=LeNet, transformer=partial(SpatialTransformer, transform="rotation"))
    form = Form(size=(20, 20), outputs=("theta", "warped", "logits"))
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "made", spec, network, form)
    with serving(bundle, "--name", "named", "--model-version", "7", "--quiet") as running:
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
