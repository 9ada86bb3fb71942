"""Throughput of `upright serve` with 32 clients, compared with a bare onnxruntime loop.

    python benchmarks/serving.py [BUNDLE ...] [--threads 1] [--rounds 5] [--seconds 3] [--quick]

Bare: `session.run` in a separate process, on prepared batches of as many images as 32 clients have in flight (at most
64). Served: the server and the clients in two separate processes on the same machine. The clients use 32 connections;
each sends its next request, of prepared bytes, when it has received its answer. The clients take processor time from
the server, which the table lists. Bare and served take turns; the ratio is the median over rounds.

A request holds one PNG, one binary tensor (Open Inference Protocol), or 16 of either. Three more figures split the
time: requests per second without inference (`/v2/health/live`), images per second that one thread decodes, and the
processor time of the server per image.
"""

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image
from shared import ROOT, UPRIGHT, command_line, heading, row

from upright.images import Pixels
from upright.runtime.predictor import Predictor

CLIENTS = 32


def requests(bundle: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """Return the images and the bytes of each kind of request."""
    predictor = Predictor(bundle)
    samples = [bundle / sample["file"] for sample in predictor.bundle.samples]
    image = predictor.decode(samples[0])
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    infer = f"/v2/models/{name}/infer"
    part = b'--x\r\nContent-Disposition: form-data; name="p"; filename="p.png"\r\n\r\n%s\r\n'
    kinds = {
        "health": (1, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"),
        "1 PNG": (1, post("/v1/classify", file.getvalue())),
        "1 tensor": (1, tensor(infer, image[None])),
        "16 PNG": (
            16,
            post(
                "/v1/classify",
                part % file.getvalue() * 16 + b"--x--\r\n",
                "Content-Type: multipart/form-data; boundary=x\r\n",
            ),
        ),
        "16 tensor": (16, tensor(infer, np.repeat(image[None], 16, axis=0))),
    }
    return kinds


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """Return the bytes of a request."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def tensor(path: str, images: Pixels) -> bytes:
    """Return a request with binary input and output."""
    content = {
        "inputs": [
            {
                "name": "images",
                "shape": images.shape,
                "datatype": "UINT8",
                "parameters": {"binary_data_size": images.size},
            }
        ],
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(content).encode()
    return post(path, head + images.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n")


class Client(asyncio.Protocol):
    """Client that sends the same request repeatedly until the time is over."""

    def __init__(self, request: bytes, end: float, statuses: Counter[str], seconds: list[float]) -> None:
        self.request, self.end, self.statuses, self.seconds = request, end, statuses, seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.received, self.start = b"", time.perf_counter()
        self.length: int | None = None
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.length is None and (head := self.received.find(b"\r\n\r\n")) >= 0:
            fields = self.received[:head].lower()
            start = fields.index(b"content-length: ") + 16
            self.length = (
                head + 4 + int(fields[start : fields.find(b"\r\n", start) if b"\r\n" in fields[start:] else None])
            )
        if self.length is not None and len(self.received) >= self.length:
            self.statuses[self.received[9:12].decode()] += 1
            self.seconds.append(time.perf_counter() - self.start)
            if time.perf_counter() < self.end:
                self.send()
            else:
                self.transport.close()


async def load(port: int, request: bytes, seconds: float) -> dict[str, object]:
    """Return the speed and the statuses that ``CLIENTS`` clients measure."""
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    loop, cpu, end = asyncio.get_running_loop(), time.process_time(), time.perf_counter() + seconds
    for _ in range(CLIENTS):
        await loop.create_connection(lambda: Client(request, end, statuses, latencies), "127.0.0.1", port)
    await asyncio.sleep(seconds)
    count = len(latencies)
    return {
        "requests_per_s": count / seconds,
        "p50": 1000 * statistics.median(latencies),
        "p99": 1000 * float(np.quantile(latencies, 0.99)),
        "statuses": statuses,
        "client_cpu": (time.process_time() - cpu) / seconds,
    }


def bare(bundle: Path, threads: int, batch: int, seconds: float) -> dict[str, float]:
    """Return images per second of the session alone, and microseconds of processor time per image."""
    predictor = Predictor(bundle, threads=threads)
    image = predictor.decode(bundle / predictor.bundle.samples[0]["file"])
    images, count = np.repeat(image[None], batch, axis=0), 0
    predictor.session.run(["probabilities"], {"images": images})
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        predictor.session.run(["probabilities"], {"images": images})
        count += batch
    return {"images_per_s": count / (time.perf_counter() - start), "cpu": 1e6 * (time.process_time() - cpu) / count}


def alone(*arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    """Run this file in a separate process, and return the JSON that it prints."""
    process = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], input=stdin, capture_output=True, check=True
    )
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def main() -> None:
    """Print a table per bundle."""
    parser = command_line(__doc__)
    parser.add_argument(
        "bundles", nargs="*", type=Path, default=[ROOT / "export/digits"], help="default: export/digits"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    kinds = ["1 PNG", "1 tensor", "16 PNG", "16 tensor"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="kinds of requests; default: all")
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options, server_options = parser.parse_known_args()
    if options.load:
        print(json.dumps(asyncio.run(load(options.load, sys.stdin.buffer.read(), options.seconds))))
        return
    if options.bare:
        print(json.dumps(bare(options.bundles[0], options.threads, options.bare, options.seconds)))
        return
    if options.quick:
        options.rounds, options.seconds, options.kinds = 1, 0.2, options.kinds[:1]
    for bundle in options.bundles:
        compare(bundle, options, server_options)


def compare(bundle: Path, options: argparse.Namespace, server_options: list[str]) -> None:
    """Print a row per kind of request."""
    command = [*UPRIGHT, "serve", str(bundle), "--port", "0", "--threads", str(options.threads)]
    command += ["--max-queue", "1024"]
    server = subprocess.Popen([*command, *server_options], stdout=subprocess.PIPE)
    assert server.stdout
    address = json.loads(server.stdout.readline())["address"]
    port = address.rpartition(":")[2]
    # The server writes its log as usual, and blocks if no process reads it.
    reader = subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL)

    def cpu_seconds() -> float:
        text = urlopen(f"{address}/metrics").read().decode()
        return float(
            next(line for line in text.splitlines() if line.startswith("process_cpu_seconds_total ")).split()[1]
        )

    def batches() -> tuple[float, float]:
        lines = urlopen(f"{address}/metrics").read().decode().splitlines()
        figures = dict(line.rsplit(" ", 1) for line in lines if line.startswith("upright_batch_images_"))
        return float(figures["upright_batch_images_sum"]), float(figures["upright_batch_images_count"])

    try:
        kinds = requests(bundle, bundle.resolve().name)
        predictor = Predictor(bundle)
        png = kinds["1 PNG"][1].partition(b"\r\n\r\n")[2]
        start = time.process_time()
        for _ in range(200):
            predictor.decode(png)
        decoded = 200 / (time.process_time() - start)
        health = alone("--load", port, "--seconds", options.seconds, stdin=kinds["health"][1])
        print(
            f"\n{bundle.name}, {options.threads} thread(s); without inference: "
            f"{health['requests_per_s']:,.0f} requests/s, client {health['client_cpu']:.2f} cores; "
            f"one thread decodes {decoded:,.0f} images/s\n"
        )
        columns = ("bare images/s", "served images/s", "ratio", "batch", "p50 ms", "p99 ms", "bare CPU us/image")
        heading("request", *columns, "server CPU us/image", "clients' cores")
        for kind in options.kinds:
            count, request = kinds[kind]
            batch = min(64, CLIENTS * count)
            bares, loads = [], []
            cpu, (images, runs) = cpu_seconds(), batches()
            for _ in range(options.rounds):
                limits = ("--threads", options.threads, "--seconds", options.seconds)
                bares.append(alone(bundle, "--bare", batch, *limits))
                loads.append(alone("--load", port, "--seconds", options.seconds, stdin=request))
                assert set(loads[-1]["statuses"]) == {"200"}, loads[-1]
            bare_rates = [one["images_per_s"] for one in bares]
            served_rates = [one["requests_per_s"] * count for one in loads]
            ratio = statistics.median(one / other for one, other in zip(served_rates, bare_rates, strict=True))
            images_after, runs_after = batches()
            each, alone_each = (
                1e6 * (cpu_seconds() - cpu) / (images_after - images),
                statistics.median(one["cpu"] for one in bares),
            )
            middle = {key: statistics.median(one[key] for one in loads) for key in ("p50", "p99", "client_cpu")}
            row(
                kind,
                f"{statistics.median(bare_rates):,.0f}",
                f"{statistics.median(served_rates):,.0f}",
                f"{ratio:.2f}",
                f"{(images_after - images) / (runs_after - runs):.1f}",
                f"{middle['p50']:.1f}",
                f"{middle['p99']:.1f}",
                f"{alone_each:.0f}",
                f"{each:.0f}",
                f"{middle['client_cpu']:.2f}",
            )
    finally:
        server.terminate()
        server.wait()
        reader.wait()


if __name__ == "__main__":
    main()
