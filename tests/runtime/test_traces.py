"""Spans of OpenTelemetry, which a collector on this machine receives. It needs the extra `otel`."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

INSTRUMENT = Path(sys.executable).with_name("opentelemetry-instrument")
pytestmark = pytest.mark.skipif(not INSTRUMENT.exists(), reason="needs the extra `otel`")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """A server that parses spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        self.server.spans += [span for scope in scopes for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_span_of_a_request_continues_its_trace(collector: Collector, workers: int) -> None:
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_PYTHON_STARLETTE_EXCLUDED_URLS": "health",
    }
    command = [str(INSTRUMENT), sys.executable, "-m", "upright", "serve", str(ROOT / "export/digits"), "--port", "0"]
    command += ["--quiet", "--workers", str(workers)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b'{"live":true,"ready":true}'
        image = (ROOT / "export/digits/samples/00.png").read_bytes()
        connection.request("POST", "/v1/classify", image, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert json.loads(connection.getresponse().read())["results"][0]["label"] == "4"
        connection.close()
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    (span,) = (span for span in collector.spans if span.parent_span_id.hex() == PARENT)
    assert span.name == "POST /v1/classify" and span.trace_id.hex() == TRACE
    assert not any("health" in span.name for span in collector.spans)
