"""`upright serve` in its own process, over sockets."""

import asyncio
import base64
import gzip
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import (
    photograph,
    write_bundle,
    write_multilabel_bundle,
    write_orientation_bundle,
    write_unresized_bundle,
)
from tests.runtime.conformance import Server, protocol_violations, triton_violations
from upright.architectures.lenet import LeNet
from upright.errors import UprightError
from upright.exporting.graph import Form
from upright.images import DECODE_BYTES, ImageSpec, Pixels
from upright.options import Serve, parse
from upright.runtime.bundle import SUMS, checksums
from upright.runtime.predictor import MultiLabelPredictor, Predictor


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    process: "subprocess.Popen[str]"
    port: int
    version: str
    lines: list[dict[str, Any]]
    """The log records so far."""

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = self.connect()
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        reply_headers = {name.lower(): value for name, value in response.getheaders()}
        reply = Reply(response.status, reply_headers, response.read())
        connection.close()
        return reply

    def classify(self, body: bytes, query: str = "", **headers: str) -> Reply:
        return self.ask("POST", f"/v1/classify{query}", body, **headers)

    def infer(self, content: Any, **headers: str) -> Reply:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", "/v2/models/small/infer", body, **headers)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(bundle: Path, *options: object, before: str = "") -> Iterator[Running]:
    """Start a server in its own process, which first runs the code ``before``."""
    program = f"{before}\nimport sys\nfrom upright.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[dict[str, Any]] = []
    try:
        lines.append(json.loads(process.stdout.readline()))
        port = int(lines[0]["address"].rpartition(":")[2])

        def read() -> None:
            assert process.stdout is not None
            lines.extend(json.loads(line) for line in process.stdout)

        reader = threading.Thread(target=read)
        reader.start()
        running = Running(process, port, lines[0]["version"], lines)
        yield running
        if process.poll() is None:
            assert running.stop() == 0
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Running]:
    with serving(trained / "export/small") as running:
        yield running


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(trained / "export/small")


@pytest.fixture(scope="module")
def samples(trained: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((trained / "export/small/samples").glob("*.png"))]


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(height: int, width: int, seed: int) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8))


def multipart(parts: dict[str, bytes]) -> tuple[bytes, str]:
    body = b"".join(
        f'--edge\r\nContent-Disposition: form-data; name="p"; filename="{name}"\r\n\r\n'.encode() + part + b"\r\n"
        for name, part in parts.items()
    )
    return body + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def is_prediction(result: dict[str, Any], image: bytes, predictor: Predictor) -> bool:
    expected = predictor(image)
    return result["label"] == expected.label and abs(result["probability"] - expected.probability) < 1e-5


# Predictions.


def test_one_image_is_classified_as_by_the_predictor(
    server: Running, predictor: Predictor, samples: list[bytes]
) -> None:
    for sample in samples:
        reply = server.classify(sample, "?top=3")
        assert reply.status == 200 and reply.headers["content-type"] == "application/json"
        (result,) = reply.json["results"]
        assert (reply.json["model"], reply.json["version"]) == ("small", server.version)
        assert is_prediction(result, sample, predictor)
        expected = predictor(sample).top(3)
        assert [entry["label"] for entry in result["top"]] == [label for label, _ in expected]
        assert [entry["probability"] for entry in result["top"]] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert "top" not in server.classify(samples[0]).json["results"][0]


def test_each_of_several_images_has_its_own_result(server: Running, predictor: Predictor, samples: list[bytes]) -> None:
    body, kind = multipart(
        {"a.png": samples[0], "text.png": b"hello", "big.png": noise(40, 30, 0), "b.png": samples[1]}
    )
    reply = server.classify(body, Content_Type=kind)
    assert reply.status == 200 and "error" not in reply.json
    first, bad, other, last = reply.json["results"]
    assert [first["name"], bad["name"], last["name"]] == ["a.png", "text.png", "b.png"]
    assert bad == {
        "name": "text.png",
        "error": "The image is in none of the formats that can be read: BMP, GIF, JPEG, PNG, TIFF, WEBP.",
    }
    for result, image in ((first, samples[0]), (other, noise(40, 30, 0)), (last, samples[1])):
        assert is_prediction(result, image, predictor)


def test_a_request_without_readable_images_is_an_error(server: Running) -> None:
    reply = server.classify(b"hello")
    assert (
        reply.status == 422
        and reply.json["error"]
        == "The image is in none of the formats that can be read: BMP, GIF, JPEG, PNG, TIFF, WEBP."
    )
    body, kind = multipart({"a": b"x", "b": b"y"})
    reply = server.classify(body, Content_Type=kind)
    assert reply.status == 422 and len(reply.json["results"]) == 2


def test_concurrent_requests_get_their_own_predictions(server: Running, predictor: Predictor) -> None:
    shapes = [(8, 8), (8, 9), (31, 17)]
    images = [noise(*shapes[seed % 3], seed) for seed in range(96)]
    before = server.metric("upright_batch_images_count"), server.metric("upright_batch_images_sum")
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(server.classify, images))
    for image, reply in zip(images, replies, strict=True):
        assert reply.status == 200 and is_prediction(reply.json["results"][0], image, predictor)
    runs = server.metric("upright_batch_images_count") - before[0]
    assert server.metric("upright_batch_images_sum") - before[1] == 96 and runs < 96


def test_a_bundle_with_several_classes_per_image(tmp_path: Path) -> None:
    tags = write_multilabel_bundle(tmp_path / "tags")
    predictor = MultiLabelPredictor(tags)
    images = [path.read_bytes() for path in predictor.bundle.sample_files if isinstance(path, Path)]
    results = predictor.predict(images)
    with serving(tags, "--quiet") as running:
        body, kind = multipart({str(number): image for number, image in enumerate(images)})
        reply = running.ask("POST", "/v1/labels", body, Content_Type=kind)
        for answer, result in zip(reply.json["results"], results, strict=True):
            labels = {each["label"]: each["probability"] for each in answer["labels"]}
            assert list(labels) == list(result.labels) and labels == pytest.approx(result.labels, abs=1e-6)
        message = "The task of this model is multilabel: send images to /v1/labels."
        assert running.classify(images[0]).json == {"error": message}
        message = "top is for models with one class per image, and this one finds several classes per image; omit top."
        assert running.ask("POST", "/v1/labels?top=1", images[0]).json == {"error": message}
        counts = Counter(label for result in results for label in result.labels)
        for label, count in counts.items():
            assert running.metric(f'upright_predictions_total{{label="{label}"}}') == count
        # The protocol has the probabilities, and no most probable class.
        assert [output["name"] for output in running.ask("GET", "/v2/models/tags").json["outputs"]] == ["probabilities"]
        data = [base64.b64encode(image).decode() for image in images]
        encoded = {"inputs": [{"name": "images", "shape": [len(data)], "datatype": "BYTES", "data": data}]}
        (output,) = running.ask("POST", "/v2/models/tags/infer", json.dumps(encoded).encode()).json["outputs"]
        assert output["data"] == pytest.approx(
            [p for result in results for p in result.probabilities.values()], abs=1e-6
        )
        description = running.ask("GET", "/openapi.json").json
        assert next(iter(description["paths"])) == "/v1/labels" and "several classes" in description["info"]["title"]


def test_an_orientation_bundle(bundle: Path, tmp_path: Path, samples: list[bytes]) -> None:
    sky = write_orientation_bundle(tmp_path / "sky")
    angles = [20.0, -170.0, 100.0, 30.0]
    images = [png(photograph(angle)[..., 0]) for angle in angles]

    with serving(sky, "--quiet") as running:
        send = lambda body, query="", **headers: running.ask("POST", f"/v1/orientation{query}", body, **headers)  # noqa: E731
        reply = send(images[0], "?outputs=theta")
        (result,) = reply.json["results"]
        assert reply.status == 200 and list(result) == ["angle", "confidence", "outputs"]
        assert result["angle"] == pytest.approx(20, abs=0.05) and 0.2 < result["confidence"] < 0.3
        assert np.hypot(*result["outputs"]["theta"]) == pytest.approx(result["confidence"])
        body, kind = multipart({"a.png": images[1], "text.png": b"hello", "b.png": images[2]})
        first, bad, last = send(body, Content_Type=kind).json["results"]
        assert [first["name"], bad["name"], last["name"]] == ["a.png", "text.png", "b.png"] and "error" in bad
        assert [first["angle"], last["angle"]] == pytest.approx(angles[1:3], abs=0.05)
        assert send(b"hello").status == 422
        # The wrong route names the right one.
        reply = running.classify(images[0])
        message = "The task of this model is orientation: send images to /v1/orientation."
        assert (reply.status, reply.json) == (404, {"error": message})
        reply = send(images[0], "?top=1")
        message = "top is for models with one class per image, and this one estimates the orientation; omit top."
        assert (reply.status, reply.json) == (400, {"error": message})

        data = [base64.b64encode(image).decode() for image in images]
        encoded = {"inputs": [{"name": "images", "shape": [4], "datatype": "BYTES", "data": data}]}
        reply = running.ask("POST", "/v2/models/sky/infer", json.dumps(encoded).encode())
        outputs = {output["name"]: output["data"] for output in reply.json["outputs"]}
        assert list(outputs) == ["orientation", "theta"]
        assert outputs["orientation"][::2] == pytest.approx(angles, abs=0.05)
        assert running.ask("GET", "/v2/models/sky").json["outputs"] == [
            {"name": name, "datatype": "FP32", "shape": [-1, 2]} for name in ("orientation", "theta")
        ]
        # Each image was sent twice, except the last one.
        assert {angle: running.metric(f'upright_angles_total{{degrees="{angle}"}}') for angle in (0, 45, 90, 180)} == {
            0: 2,
            45: 1,
            90: 2,
            180: 2,
        }
        assert running.metric("upright_angles_total") == running.metric("upright_confidence_count") == 7
        assert running.metric('upright_confidence_bucket{le="0.2"}') == running.metric("upright_predictions_total") == 0

        conforming = Server(f"http://127.0.0.1:{running.port}", "sky")
        assert list(protocol_violations(conforming)) == []
        if find_spec("geventhttpclient"):
            assert list(triton_violations(conforming)) == []
        check_description(running)
        # A new bundle may have another task.
        shutil.rmtree(sky)
        shutil.copytree(bundle, sky)
        running.process.send_signal(signal.SIGHUP)
        while running.classify(samples[0]).status == 404:
            time.sleep(0.05)
        message = "The task of this model is classification: send images to /v1/classify."
        assert send(images[0]).json == {"error": message}


# The Open Inference Protocol. The expected keys come from its specification.


def test_health_and_metadata_follow_the_protocol(server: Running) -> None:
    assert server.ask("GET", "/v2/health/live").json["live"] is True
    assert server.ask("GET", "/v2/health/ready").status == 200
    for path in ("/v2", "/v2/"):
        metadata = server.ask("GET", path).json
        assert set(metadata) == {"name", "version", "extensions"} and metadata["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/small", f"/v2/models/small/versions/{server.version}"):
        assert server.ask("GET", f"{path}/ready").json == {"name": "small", "ready": True}
        assert server.ask("GET", path).json == {
            "name": "small",
            "versions": [server.version],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}],
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
                {"name": "labels", "datatype": "BYTES", "shape": [-1]},
            ],
        }
    for path in ("/v2/models/other", "/v2/models/small/versions/1", "/v2/models/other/ready", "/nothing"):
        reply = server.ask("GET", path)
        assert reply.status == 404 and set(reply.json) == {"error"}


def packed(elements: list[bytes]) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def test_infer_accepts_pixels_and_files_in_json_and_in_binary(
    server: Running, predictor: Predictor, samples: list[bytes]
) -> None:
    pixels = np.stack([predictor.decode(sample) for sample in samples])
    expected = np.stack(list(predictor.rows(pixels)))
    labels = [predictor.task.result(row).label for row in expected]
    shape = list(pixels.shape)
    encoded = {"name": "images", "shape": [len(samples)], "datatype": "BYTES"}
    inputs = [
        {"name": "images", "shape": shape, "datatype": "UINT8", "data": pixels.ravel().tolist()},
        {"name": "images", "shape": shape, "datatype": "UINT8", "data": pixels.tolist()},
        encoded | {"data": [base64.b64encode(sample).decode() for sample in samples]},
    ]
    for tensor in inputs:
        reply = server.infer({"id": "42", "inputs": [tensor]})
        response = reply.json
        assert reply.status == 200 and (response["id"], response["model_name"]) == ("42", "small")
        assert response["model_version"] == server.version
        first, second = response["outputs"]
        assert (first["name"], first["datatype"], first["shape"]) == ("probabilities", "FP32", [len(samples), 10])
        assert np.array(first["data"]) == pytest.approx(expected.ravel(), abs=1e-5)
        assert second == {"name": "labels", "datatype": "BYTES", "shape": [len(samples)], "data": labels}
    for tensor, data in ((inputs[0] | {"data": None}, pixels.tobytes()), (encoded, packed(samples))):
        tensor = {key: value for key, value in tensor.items() if value is not None}
        tensor["parameters"] = {"binary_data_size": len(data)}
        outputs = [{"name": "labels"}, {"name": "probabilities", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
        reply = server.infer(head + data, Inference_Header_Content_Length=str(len(head)))
        end = int(reply.headers["inference-header-content-length"])
        first, second = json.loads(reply.body[:end])["outputs"]
        assert first["data"] == labels and second["parameters"] == {"binary_data_size": expected.nbytes}
        assert np.frombuffer(reply.body[end:], np.float32) == pytest.approx(expected.ravel(), abs=1e-5)
    reply = server.infer({"inputs": [inputs[0]], "parameters": {"binary_data_output": True}})
    end = int(reply.headers["inference-header-content-length"])
    assert reply.body[end + expected.nbytes :] == packed([label.encode() for label in labels])


def tensor(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "images", "shape": [1, 2, 2, 1], "datatype": "UINT8", "data": [0] * 4} | changes]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "The body is not an inference request: "),
        ({"inputs": []}, "The request must have one input, 'images'; got none."),
        (tensor(name="x"), "The request must have one input, 'images'; got 'x'."),
        (tensor() | {"outputs": [{"name": "theta"}]}, "no output 'theta'; outputs: probabilities, labels."),
        (tensor(datatype="FP32"), "must be UINT8 (pixels, [B, H, W, 1]) or BYTES (encoded images, [B]); got 'FP32'."),
        (tensor(shape=[1, 2, 2, 3]), "must have the shape [B, H, W, 1], got [1, 2, 2, 3]."),
        (tensor(shape=[0, 2, 2, 1]), "must have the shape [B, H, W, 1]"),
        (tensor(shape=[1, 2, 3, 1]), "The shape [1, 2, 3, 1] needs 6 elements, got 4."),
        (tensor(data=[0, 0, 0, 256]), "must be integers from 0 to 255: "),
        (tensor(data=[0, 0, 0, 0.5]), "must be integers from 0 to 255: "),
        (tensor(data=[[0, 0], [0]]), "do not form a tensor"),
        (tensor(data=None, parameters={"binary_data_size": 9}), "binary_data_size 9, and 0 bytes after the JSON."),
        (tensor(datatype="BYTES", shape=[1], data=["?"]), "must be images in base64"),
        (tensor(datatype="BYTES", shape=[1], data=[7]), "must be images in base64: Expected `str`, got `int`"),
        (tensor(datatype="BYTES", shape=[2], data=["aGVsbG8="]), "The shape [2] needs 2 elements, got 1."),
        (tensor(datatype="BYTES", shape=[1], data=["aGVsbG8="]), "Image 0 of 1: The image is in none of the formats"),
    ],
)
def test_invalid_inference_requests_are_one_line(server: Running, content: Any, message: str) -> None:
    reply = server.infer(content)
    assert reply.status == 400 and set(reply.json) == {"error"}
    assert message in reply.json["error"] and "\n" not in reply.json["error"]


def test_random_bytes_are_a_request_or_an_upright_error(predictor: Predictor) -> None:
    from upright.runtime.serving.protocol import Model

    model = Model("small", "1", predictor.session, predictor.spec.classes)
    body = json.dumps(tensor() | {"id": "1", "outputs": [{"name": "labels"}]}).encode()
    draw = random.Random(0)
    outcomes = Counter[str]()
    for _ in range(20_000):
        changed = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed))
            changed[at : at + draw.randint(0, 3)] = bytes(
                draw.choices(b'[]{}",:-09eE.\\u\x00\xff', k=draw.randint(0, 3))
            )
        header = draw.choice([None, None, str(draw.randint(0, 300)), "-1", "x"])
        try:
            model.read(bytes(changed), header)
            outcomes["read"] += 1
        except UprightError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100 and len(outcomes) == 2


def test_compressed_bodies(server: Running, samples: list[bytes]) -> None:
    expected = server.classify(samples[0]).json
    for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)):
        assert server.classify(compress(samples[0]), Content_Encoding=encoding).json == expected
    for encoding, body, status, message in (
        ("br", samples[0], 415, "Content-Encoding must be gzip or deflate, or absent; got 'br'."),
        ("gzip", samples[0], 400, "The body cannot be decompressed: "),
        ("gzip", gzip.compress(samples[0])[:-9], 400, "it is truncated, or bytes follow its end."),
        ("gzip", gzip.compress(bytes(20_000_000)), 413, "The decompressed body has more than 16000000 bytes"),
    ):
        reply = server.classify(body, Content_Encoding=encoding)
        assert reply.status == status and message in reply.json["error"]


def test_text_fields_of_multipart_are_ignored(server: Running, samples: list[bytes]) -> None:
    body, kind = multipart({"a.png": samples[0]})
    text = b'--edge\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
    assert server.classify(text + body, Content_Type=kind).json == server.classify(body, Content_Type=kind).json


# Operation.


def test_ids_of_requests_and_traces(trained: Path, samples: list[bytes]) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving(trained / "export/small", "--cors", "https://a.org", "--root-path", "/digits") as running:
        reply = running.classify(samples[0], X_Request_Id="mine", traceparent=f"00-{trace}-b7ad6b7169203331-01")
        assert reply.headers["x-request-id"] == "mine"
        made = running.classify(samples[0], X_Request_Id="with space", traceparent="00-0-0-0")
        assert len(made.headers["x-request-id"]) == 32 and "access-control-allow-origin" not in made.headers
        reply = running.classify(samples[0], Origin="https://a.org")
        assert reply.headers["access-control-allow-origin"] == "https://a.org"
        assert running.ask("GET", "/openapi.json").json["servers"] == [{"url": "/digits"}]
        text = running.ask("GET", "/metrics").body.decode()
        assert f'upright_model_info{{name="small",precision="fp32",version="{running.version}"}} 1.0' in text
        assert running.metric("upright_predictions_total") == running.metric("upright_confidence_count") == 3
    lines = [line for line in running.lines if line.get("path") == "/digits/v1/classify"]
    assert [line.get("trace_id") for line in lines] == [trace, None, None]
    assert [line["request_id"] for line in lines][:2] == ["mine", made.headers["x-request-id"]]


def test_a_reload_is_complete_or_keeps_the_old_bundle(bundle: Path, samples: list[bytes]) -> None:
    with serving(bundle, "--quiet") as running:

        def reload(message: str) -> dict[str, Any]:
            running.process.send_signal(signal.SIGHUP)
            while not (lines := [line for line in running.lines if line["message"] == message]):
                assert running.classify(samples[0]).status == 200
            return lines[-1]

        (bundle / "README.md").write_text("changed")
        line = reload("reload failed")
        assert "is damaged or was changed: README.md" in line["error"] and line["version"] == running.version
        assert running.classify(samples[0]).json["version"] == running.version
        (bundle / SUMS).write_text(checksums(bundle))
        version = reload("reloaded")["version"]
        assert version != running.version and running.classify(samples[0]).json["version"] == version


def test_several_workers(
    bundle: Path, samples: list[bytes], predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(bundle, "--quiet", "--workers", 2) as running:
        assert len(list(tmp_path.glob("upright-metrics-*"))) == 1

        def wait_for(message: str, count: int) -> list[dict[str, Any]]:
            while len(lines := [line for line in running.lines if line["message"] == message]) < count:
                time.sleep(0.02)
            return lines

        pids = [line["pid"] for line in wait_for("serving", 2)]
        for index, stopped in enumerate(pids):  # while one process stands still, the other one answers
            os.kill(stopped, signal.SIGSTOP)
            for image in samples[:3]:
                assert is_prediction(running.classify(image).json["results"][0], image, predictor)
                assert running.metric("upright_images_total") == running.metric("upright_batch_images_sum")
            assert running.metric("upright_images_total") == 3 * (index + 1)
            os.kill(stopped, signal.SIGCONT)
        assert running.metric("upright_model_info") == 1 and running.metric("upright_waiting_images") == 0

        (bundle / "README.md").write_text("changed")
        (bundle / SUMS).write_text(checksums(bundle))
        running.process.send_signal(signal.SIGHUP)
        (version,) = {line["version"] for line in wait_for("reloaded", 2)}
        assert version != running.version

        os.kill(pids[0], signal.SIGKILL)
        (ended,) = wait_for("worker ended", 1)
        assert (ended["pid"], ended["exit_code"]) == (pids[0], -signal.SIGKILL)
        assert wait_for("serving", 3)[-1]["version"] == version
        running.classify(samples[0])
        assert running.metric("upright_images_total") == 7  # those of the process that ended, too
        running.process.kill()  # then the workers stop by themselves, which closes standard output
        wait_for("stopped", 2)
    assert list(tmp_path.glob("upright-metrics-*")) == []


def test_a_worker_that_fails_is_one_line() -> None:
    command = [sys.executable, "-m", "upright", "serve", "nope", "--port", "0", "--workers", "2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith("upright: error: 'nope' is not a bundle: it has no SHA256SUMS.")


def test_the_deployments_of_the_docs_fit_the_server(server: Running) -> None:
    page = (ROOT / "docs/how-to/serve.md").read_text(encoding="utf-8")

    def files(name: str) -> list[Any]:
        return list(yaml.safe_load_all(page.partition(f'title="{name}"\n')[2].partition("```")[0]))

    (deployment, service), (kserve,), (compose,) = map(files, ("k8s.yaml", "kserve.yaml", "compose.yaml"))
    template = deployment["spec"]["template"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == Serve("x").port
    for (container,) in (template["spec"]["containers"], kserve["spec"]["predictor"]["containers"]):
        assert parse("serve", Serve, container["args"]).port == container["ports"][0]["containerPort"]
        for probe in {"readinessProbe", "livenessProbe"} & set(container):
            assert server.ask("GET", container[probe]["httpGet"]["path"]).status == 200
    (local,) = compose["services"].values()
    assert local["ports"] == [f"{parse('serve', Serve, local['command']).port}:{Serve('x').port}"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_stays_within_the_formula_of_the_docs(trained: Path) -> None:
    with serving(trained / "export/small", "--quiet", "--timeout-s", 2000, "--decoders", 4) as running:

        def memory(key: str) -> float:
            lines = Path(f"/proc/{running.process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

        running.classify(noise(2000, 2000, 0))
        idle = memory("VmRSS")
        for kind, mode, color in (("PNG", "RGBA", (1, 2, 3, 4)), ("WEBP", "RGBA", (1, 2, 3, 4)), ("PNG", "L", 1)):
            file = io.BytesIO()
            Image.new(mode, (4000, 4000), color).save(file, kind)
            with ThreadPoolExecutor(32) as pool:
                replies = list(pool.map(running.classify, [file.getvalue()] * 24))
            assert {reply.status for reply in replies} == {200}
            bodies = 3 * 32 * len(file.getvalue())
            assert memory("VmHWM") - idle < bodies + DECODE_BYTES * 32e6 + 6 * 16e6
            time.sleep(2)
            assert memory("VmRSS") - idle < 150e6


# Metrics, logs and the description.


def test_metrics_and_logs_count_every_request(trained: Path, samples: list[bytes]) -> None:
    with serving(trained / "export/small") as running:
        running.classify(samples[0])
        running.classify(b"hello")
        text = running.ask("GET", "/metrics").body.decode()
        assert 'upright_requests_total{route="/v1/classify",status="200"} 1.0' in text
        assert 'upright_requests_total{route="/v1/classify",status="422"} 1.0' in text
        assert 'upright_images_total{outcome="bad"} 1.0' in text and "upright_waiting_images 0.0" in text
        assert "process_resident_memory_bytes" in text
    requests = [line for line in running.lines if line.get("path") == "/v1/classify"]
    assert [line["status"] for line in requests] == [200, 422]
    assert set(requests[0]) == {"time", "level", "message", "method", "path", "status", "ms", "client", "request_id"}
    assert [running.lines[0]["message"], running.lines[-1]["message"]] == ["serving", "stopped"]


def test_quiet_logs_no_requests(trained: Path, samples: list[bytes]) -> None:
    with serving(trained / "export/small", "--quiet") as running:
        running.classify(samples[0])
    assert [line["message"] for line in running.lines] == ["serving", "stopping", "stopped"]


def test_the_openapi_description_is_complete(server: Running) -> None:
    check_description(server)


def check_description(server: Running) -> None:
    """Check that the description has the schema of each reference, and only routes of the server."""
    description = server.ask("GET", "/openapi.json").json
    schemas = description["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from references(inner)

    assert {reference.rpartition("/")[2] for reference in references(description)} <= set(schemas)
    for path, operations in description["paths"].items():
        for method in operations:
            assert server.ask(method.upper(), path, b"" if method == "post" else None).status != 404, path
    page = server.ask("GET", "/docs").body.decode()
    assert all(path in page for path in description["paths"]) and "//" not in page.replace("<!doctype", "")


# Limits.


@pytest.fixture(scope="module")
def narrow(trained: Path) -> Iterator[Running]:
    limits = ["--max-queue", 4, "--max-body-mb", 0.5, "--max-pixels", 400_000, "--timeout-s", 2, "--max-batch", 2]
    before = "from upright.runtime.serving import connection; connection.HEAD_SECONDS = 1"
    with serving(trained / "export/small", *limits, before=before) as running:
        yield running


def test_limits_are_named(narrow: Running, samples: list[bytes]) -> None:
    reply = narrow.classify(bytes(600_000))
    assert reply.status == 413 and reply.json["error"] == "The body has 600000 bytes, but the limit is 500000."
    connection = narrow.connect()
    connection.request("POST", "/v1/classify", iter([bytes(300_000)] * 2), encode_chunked=True)
    reply = connection.getresponse()
    assert reply.status == 413 and "more than 500000 bytes" in json.loads(reply.read())["error"]
    connection.close()
    reply = narrow.classify(png(np.zeros((600, 700), np.uint8)))
    assert reply.status == 422 and "700x600 pixels are more than the limit of 400000" in reply.json["error"]
    body, kind = multipart({str(number): samples[0] for number in range(5)})
    reply = narrow.classify(body, Content_Type=kind)
    assert reply.status == 400 and "Maximum number of files is 4" in reply.json["error"]
    reply = narrow.infer(tensor(shape=[5, 1, 1, 1], data=[0] * 5))
    assert reply.status == 413 and reply.json["error"] == "A request may have up to 4 images, got 5."
    assert narrow.classify(samples[0], f"?top={'9' * 5000}").status == 400
    reply = narrow.classify(samples[0], "?top=11")
    assert reply.status == 400 and reply.json["error"] == "top must be from 1 to 10 (the number of classes), got '11'."
    assert narrow.infer(tensor(shape=[3, 2, 2, 1], data=[0] * 12)).status == 200  # more than a batch


def test_a_full_queue_is_a_429(narrow: Running, predictor: Predictor) -> None:
    images = [noise(500, 700, seed) for seed in range(4)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda n: narrow.classify(images[n % 4]), range(96)))
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) == {200, 429}
    for number, reply in enumerate(replies):
        if reply.status == 200:
            assert is_prediction(reply.json["results"][0], images[number % 4], predictor)
        else:
            assert reply.headers["retry-after"] == "1" and "try again later" in reply.json["error"]
    assert narrow.metric("upright_waiting_images") == 0


def test_slow_and_broken_clients_do_not_disturb_others(narrow: Running, samples: list[bytes]) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(head + b"\x89PNG")
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", narrow.port)) as closing:
            closing.sendall(head + b"\x89")
        with socket.create_connection(("127.0.0.1", narrow.port)) as closing:
            closing.sendall(head.replace(b"400", str(len(samples[0])).encode()) + samples[0])
        with socket.create_connection(("127.0.0.1", narrow.port)) as closing:
            closing.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert narrow.classify(samples[0]).status == 200
    for connection in slow:
        connection.settimeout(30)
        reply = connection.makefile("rb").read()
        assert reply.startswith(b"HTTP/1.1 408") and b'{"error":"The body did not arrive within 2 s."}' in reply
        connection.close()
    assert narrow.metric("upright_waiting_images") == 0


HEADS = {
    "a long value": (b"x: ", b"y" * 2**16),
    "a long name": (b"", b"y" * 2**16),
    "a long URL": (b"", b""),
    "many headers": (b"", b"a: b\r\n" * 10_000),
    "long trailers": (b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: ", b"y" * 2**16),
}


@pytest.mark.parametrize("kind", HEADS)
def test_large_heads_are_refused_and_do_not_block_others(narrow: Running, kind: str) -> None:
    start, piece = HEADS[kind]
    line = b"POST /v1/classify" + b"y" * 2**24 if kind == "a long URL" else b"POST /v1/classify HTTP/1.1\r\n" + start
    seconds: list[float] = []

    def send() -> None:
        with socket.create_connection(("127.0.0.1", narrow.port)) as connection, suppress(OSError):
            connection.sendall(line)
            for _ in range(2_000):  # 120 MB, if the server does not close the connection
                connection.sendall(piece)
            pytest.fail("the server has read 120 MB")  # pragma: no cover

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send) for _ in range(4)]
        while not seconds or not all(sender.done() for sender in senders):
            begin = time.monotonic()
            assert narrow.ask("GET", "/v2/health/ready").status == 200
            seconds.append(time.monotonic() - begin)
        for sender in senders:
            sender.result()
    assert max(seconds) < 1


def exchange(running: Running, content: bytes, later: bytes = b"") -> bytes:
    """Send bytes, and return all that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(content)
        if later:
            time.sleep(0.2)
            connection.sendall(later)
        return connection.makefile("rb").read()


def test_limits_of_heads_are_exact(narrow: Running) -> None:
    get = b"GET /v2/health/live HTTP/1.1\r\n"
    end = b"Connection: close\r\n\r\n"
    long = b"x: " + b"y" * (65_536 - 200) + b"\r\n"
    # Pipelined requests have limits of their own.
    for head in (long, b"a: b\r\n" * 99):
        reply = exchange(narrow, get + head + b"\r\n" + get + head + end)
        assert reply.count(b"HTTP/1.1 200") == 2
    message = b'{"error": "Request line and headers may have up to 65536 bytes and 100 headers; send fewer."}'
    refused = narrow.metric('upright_requests_total{route="none",status="431"}')
    for head in (b"x: " + b"y" * 65_536 + b"\r\n", b"a: b\r\n" * 100):
        reply = exchange(narrow, get + head + end)
        assert reply.startswith(b"HTTP/1.1 431 ") and reply.endswith(message)
    assert narrow.metric('upright_requests_total{route="none",status="431"}') == refused + 2
    reply = exchange(narrow, b"\x16\x03\x01 no HTTP\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 400 ") and reply.endswith(b'{"error": "The request is not valid HTTP."}')


def test_slow_heads_are_a_408(narrow: Running) -> None:
    head = b"GET /v2/health/live HTTP/1.1\r\nx: y"
    live = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
    starts = [head, live + head, head[:5]]
    with ThreadPoolExecutor(8) as pool:
        begin = time.monotonic()
        silent, trickle = pool.submit(exchange, narrow, b""), pool.submit(exchange, narrow, live, b"\r\n")
        for start, reply in zip(starts, pool.map(lambda start: exchange(narrow, start), starts), strict=True):
            assert b"HTTP/1.1 408 " in reply and reply.count(b"HTTP/1.1 200") == start.count(live)
            assert reply.endswith(b'{"error": "The headers did not arrive within 1 s."}')
        assert silent.result() == b"" and trickle.result().count(b"HTTP/1.1 200") == 1
        assert 0.9 < time.monotonic() - begin < 4


async def request(service: Any, path: str, body: bytes, query: bytes = b"") -> Reply:
    """Send a request without a socket, for tests that need exact timing."""
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": query, "headers": [], "server": ("x", 80), "client": None, "scheme": "http"}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    with suppress(MemoryError):  # uvicorn would log it
        await service.app()(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], headers, sent[1]["body"])


def test_a_slow_or_failing_model_is_an_error(trained: Path, predictor: Predictor, samples: list[bytes]) -> None:
    from upright.runtime.serving.service import Service

    async def scenario() -> None:
        service = Service(predictor, Serve("small", timeout_s=0.5, max_queue=2, max_batch=1))
        model, slow = service.loaded.batcher.model, threading.Event()

        def waits(images: Pixels, names: Any) -> Any:
            slow.wait(20)
            return model(images, names)

        service.loaded.batcher.model = waits
        replies = await asyncio.gather(*(request(service, "/v1/classify", samples[0]) for _ in range(3)))
        assert [reply.status for reply in replies] == [503, 503, 429]
        assert replies[0].json["error"] == "The model did not finish within 0.5 s; try again later."
        assert replies[2].json["error"] == "The queue holds 2 of at most 2 images; try again later."
        slow.set()

        def fails(images: Pixels, names: Any) -> Any:
            raise MemoryError

        service.loaded.batcher.model = fails
        reply = await request(service, "/v1/classify", samples[0])
        assert reply.status == 500 and reply.json["error"] == "The server failed; see its log."
        service.loaded.batcher.model = model
        reply = await request(service, "/v1/classify", samples[0])
        assert reply.status == 200 and is_prediction(reply.json["results"][0], samples[0], predictor)
        assert service.waiting == service.held_bytes == 0
        service.decoders.shutdown()
        service.loaded.batcher.close()

    asyncio.run(scenario())


OUT_OF_MEMORY = """
import os, onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
real = onnxruntime.InferenceSession.run
def run(*args):
    if os.path.exists({trigger!r}):
        raise Fail("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer")
    return real(*args)
onnxruntime.InferenceSession.run = run
"""


def test_a_failure_of_the_engine_is_a_500_on_every_route(
    trained: Path, tmp_path: Path, predictor: Predictor, samples: list[bytes]
) -> None:
    trigger = tmp_path / "out-of-memory"
    body, kind = multipart({"a.png": samples[0], "text.png": b"hello", "b.png": noise(40, 30, 0)})
    encoded = {"shape": [2], "datatype": "BYTES", "data": [base64.b64encode(sample).decode() for sample in samples[:2]]}
    requests: list[Callable[[Running], Reply]] = [
        lambda running: running.classify(samples[0]),
        lambda running: running.classify(body, Content_Type=kind),
        lambda running: running.infer(tensor()),
        lambda running: running.infer(tensor(**encoded)),
    ]
    with serving(trained / "export/small", before=OUT_OF_MEMORY.format(trigger=str(trigger))) as running:
        assert [send(running).status for send in requests] == [200] * 4
        trigger.touch()
        replies = [send(running) for send in requests]
        # These requests share batches.
        with ThreadPoolExecutor(16) as pool:
            replies += pool.map(running.classify, samples[:1] * 16)
        assert {reply.status for reply in replies} == {500}
        assert {reply.json["error"] for reply in replies} == {"The server failed; see its log."}
        assert running.classify(b"hello").status == 422 and running.infer(tensor(name="x")).status == 400
        trigger.unlink()
        assert is_prediction(running.classify(samples[0]).json["results"][0], samples[0], predictor)
        text = running.ask("GET", "/metrics").body.decode()
        assert f'upright_images_total{{outcome="failed"}} {1 + 3 + 1 + 2 + 16}.0' in text
        assert 'upright_requests_total{route="/v1/classify",status="500"} 18.0' in text
        assert 'upright_requests_total{route="/v2/models/{name}/infer",status="500"} 2.0' in text
        assert "upright_waiting_images 0.0" in text
    failures = [line for line in running.lines if line["message"] == "the model failed"]
    assert failures and {line["level"] for line in failures} == {"error"}
    for line in failures:
        assert "Traceback" in line["exception"] and "Failed to allocate memory" in line["exception"]
    assert sum(line["images"] for line in failures) == 1 + 2 + 1 + 2 + 16


@pytest.mark.parametrize("fixed", [True, False])
def test_an_image_of_a_wrong_size_is_a_mistake_of_the_client(tmp_path: Path, fixed: bool) -> None:
    from upright.runtime.serving.service import Service

    if fixed:
        spec = ImageSpec(1, 20, 20, ("a", "b"), (0.5,), (0.5,))
        bundle, allowed = write_bundle(tmp_path / "made", spec, LeNet, Form(size=(20, 20))), 20
    else:
        bundle, allowed = write_unresized_bundle(tmp_path / "made"), 24

    def pixels(size: int) -> bytes:
        return json.dumps(tensor(shape=[1, size, size, 1], data=[0] * size**2)).encode()

    async def scenario() -> None:
        service = Service(Predictor(bundle), Serve(str(bundle)))
        infer = "/v2/models/made/infer"
        for size, statuses in ((allowed, (200, 200)), (2, (422, 400)), (allowed, (200, 200))):
            image = await request(service, "/v1/classify", noise(size, size, 0))
            raw = await request(service, infer, pixels(size))
            assert (image.status, raw.status) == statuses
            for reply in (image, raw):
                assert reply.status == 200 or "2x2" in reply.json["error"]
        service.decoders.shutdown()
        service.loaded.batcher.close()

    asyncio.run(scenario())


# Stopping.


def test_a_deleted_bundle_is_still_served(bundle: Path, predictor: Predictor, samples: list[bytes]) -> None:
    with serving(bundle) as running:
        shutil.rmtree(bundle)
        assert is_prediction(running.classify(samples[0]).json["results"][0], samples[0], predictor)
        assert running.ask("GET", "/v2/models/small/ready").status == 200


def clients(
    running: Running, images: list[bytes], count: int, more: Callable[[], bool]
) -> tuple[list[tuple[int, Reply, float]], list[str]]:
    """Send requests over ``count`` connections while ``more()`` is true and the server does not close them.

    Returns:
        Index of the image, reply and seconds of each request; and the errors of requests without a reply.
    """
    answers: list[tuple[int, Reply, float]] = []
    lost: list[str] = []

    def work(number: int) -> None:
        connection = running.connect()
        while more():
            number = (number + 7) % len(images)
            start = time.monotonic()
            try:
                connection.request("POST", "/v1/classify", images[number])
                reply = connection.getresponse()
                body = reply.read()
            except OSError as error:
                lost.append(repr(error))
                return
            headers = {name.lower(): value for name, value in reply.getheaders()}
            answers.append((number, Reply(reply.status, headers, body), time.monotonic() - start))
            if headers.get("connection") == "close":
                break
        connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, lost


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)],
)
def test_a_stop_under_load_loses_no_request(
    trained: Path, predictor: Predictor, number: signal.Signals, workers: int
) -> None:
    images = [noise(100 + seed % 3, 100, seed) for seed in range(12)]
    expected = [predictor(image) for image in images]
    with serving(trained / "export/small", "--workers", workers) as running:
        ready: list[Reply] = []

        def stop() -> None:
            time.sleep(1)
            running.process.send_signal(number)
            while not ready or ready[-1].status == 200:
                ready.append(running.ask("GET", "/v2/health/ready"))

        stopper = threading.Thread(target=stop)
        stopper.start()
        answers, lost = clients(running, images, 16, lambda: True)
        stopper.join()
        assert running.process.wait(60) == 0
    assert ready[-1].status == 503 and ready[-1].json == {"live": True, "ready": False}
    assert lost == [] and {reply.status for _, reply, _ in answers} <= {200, 503}
    accepted = [(index, reply.json["results"][0]) for index, reply, _ in answers if reply.status == 200]
    assert len(accepted) > 16
    for index, result in accepted:
        assert result["label"] == expected[index].label
        assert result["probability"] == pytest.approx(expected[index].probability, abs=1e-5)


@pytest.mark.slow
def test_a_minute_of_overload(trained: Path, predictor: Predictor, tmp_path: Path) -> None:
    images = [noise(200 + seed % 3, 300, seed) for seed in range(30)]
    expected = [predictor(image) for image in images]

    def accepted_seconds(answers: list[tuple[int, Reply, float]]) -> list[float]:
        """Check the predictions of the accepted requests, and return their durations."""
        accepted = [(number, reply, seconds) for number, reply, seconds in answers if reply.status == 200]
        for number, reply, _ in accepted:
            (result,) = reply.json["results"]
            assert result["label"] == expected[number].label
            assert result["probability"] == pytest.approx(expected[number].probability, abs=1e-5)
        return [seconds for _, _, seconds in accepted]

    def during(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() < end

    with serving(trained / "export/small", "--max-queue", 16, "--quiet") as running:
        before = len(accepted_seconds(clients(running, images, 8, during(10))[0])) / 10
        memory = []
        clients(running, images, 160, during(5))
        memory.append(running.metric("process_resident_memory_bytes"))
        answers, lost = clients(running, images, 160, during(60))
        memory.append(running.metric("process_resident_memory_bytes"))
        statuses = Counter(reply.status for _, reply, _ in answers)
        seconds = accepted_seconds(answers)
        after = len(accepted_seconds(clients(running, images, 8, during(10))[0])) / 10
    print(f"{before:.0f}/s before, {after:.0f}/s after; {statuses}; slowest {max(seconds):.2f} s; memory {memory}")
    assert lost == [] and set(statuses) <= {200, 429, 503} and statuses[429] > 0 and statuses[200] > 0
    assert memory[1] < 1.2 * memory[0]
    assert after > 0.5 * before


# The command line.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "0"], "--max-batch must be at least 1, got 0."),
        (["--timeout-s", "0"], "--timeout-s must be above 0"),
        (["--host", "nowhere.invalid"], "Cannot listen on nowhere.invalid, port 8000: "),
        (["--pixel-budget", "100"], "--pixel-budget must be at least --max-pixels (16000000), got 100."),
        (["--name", "a/b"], "--name must consist of letters, digits, '_', '-' and '.', got 'a/b'."),
        (["--root-path", "x/"], "--root-path must be like /digits, without a slash at its end, got 'x/'."),
        (["--providers", "nix"], "has no provider 'nix'"),
        (["--port", "70000"], "Cannot listen on 127.0.0.1, port 70000: "),
        (["--precision", "int8"], "not int8"),
    ],
)
def test_bad_options_are_one_line(upright: Upright, bundle: Path, options: list[str], message: str) -> None:
    answer = upright("serve", bundle, *options)
    assert answer.code == 2 and message in answer.err and len(answer.err.splitlines()) == 1
