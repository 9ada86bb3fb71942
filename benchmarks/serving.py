"""What `upright serve` costs beside the model: its throughput under 32 clients against a bare onnxruntime loop.

    python benchmarks/serving.py BUNDLE ... [--threads 1] [--rounds 5] [--seconds 3]

Bare: `session.run` on batches that lie ready, of as many images as 32 clients have under way (64 at most), in a
process of its own. Served: a process of its own as well, and the clients in a third, on the same machine: 32
connections that are kept, each sends its next request when it has its answer, bytes that lie ready, answers that are
only measured for their length; they take processor time from the server, which the table shows. Bare and served take
turns; the ratio is taken round by round, and its median is shown.

What a request holds: one picture as PNG; one picture as a binary tensor (Open Inference Protocol); 16 of either.
Three more figures say where the time goes: requests per second that are only answered (`/v2/health/live`), pictures per
second that one thread decodes, and the processor time of the server per image.
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

from upright.images import Pixels
from upright.runtime.predictor import Predictor

CLIENTS = 32


def requests(bundle: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """Kind -> images per request, and its bytes."""
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
    """A request."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def tensor(path: str, images: Pixels) -> bytes:
    """A request by the binary extension, that wants probabilities in the same way."""
    asked = {
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
    head = json.dumps(asked).encode()
    return post(path, head + images.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n")


class Client(asyncio.Protocol):
    """Sends the same bytes again and again until the time is over."""

    def __init__(self, request: bytes, end: float, statuses: Counter[str], seconds: list[float]) -> None:
        self.request, self.end, self.statuses, self.seconds = request, end, statuses, seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Once more."""
        self.got, self.start = b"", time.perf_counter()
        self.length: int | None = None
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Until the answer is whole."""
        self.got += data
        if self.length is None and (head := self.got.find(b"\r\n\r\n")) >= 0:
            fields = self.got[:head].lower()
            start = fields.index(b"content-length: ") + 16
            self.length = (
                head + 4 + int(fields[start : fields.find(b"\r\n", start) if b"\r\n" in fields[start:] else None])
            )
        if self.length is not None and len(self.got) >= self.length:
            self.statuses[self.got[9:12].decode()] += 1
            self.seconds.append(time.perf_counter() - self.start)
            if time.perf_counter() < self.end:
                self.send()
            else:
                self.transport.close()


async def load(port: int, request: bytes, seconds: float) -> dict[str, object]:
    """What ``CLIENTS`` saw."""
    statuses: Counter[str] = Counter()
    waited: list[float] = []
    loop, cpu, end = asyncio.get_running_loop(), time.process_time(), time.perf_counter() + seconds
    for _ in range(CLIENTS):
        await loop.create_connection(lambda: Client(request, end, statuses, waited), "127.0.0.1", port)
    await asyncio.sleep(seconds)
    done = len(waited)
    return {
        "requests_per_s": done / seconds,
        "p50": 1000 * statistics.median(waited),
        "p99": 1000 * float(np.quantile(waited, 0.99)),
        "statuses": statuses,
        "client_cpu": (time.process_time() - cpu) / seconds,
    }


def bare(bundle: Path, threads: int, batch: int, seconds: float) -> dict[str, float]:
    """Images per second of the session alone, and microseconds of processor time per image."""
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
    """Run this file in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], input=stdin, capture_output=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a table per bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--kinds", nargs="+", default=["1 PNG", "1 tensor", "16 PNG", "16 tensor"])
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    known, options = parser.parse_known_args()
    if known.load:
        print(json.dumps(asyncio.run(load(known.load, sys.stdin.buffer.read(), known.seconds))))
        return
    if known.bare:
        print(json.dumps(bare(known.bundles[0], known.threads, known.bare, known.seconds)))
        return
    if not known.bundles:
        parser.error("give at least one bundle, such as export/digits")
    for bundle in known.bundles:
        compare(bundle, known, options)


def compare(bundle: Path, known: argparse.Namespace, options: list[str]) -> None:
    """A row per kind of request."""
    command = [sys.executable, "-m", "upright", "serve", str(bundle), "--port", "0", "--threads", str(known.threads)]
    command += ["--max-queue", "1024"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE)
    assert server.stdout
    address = json.loads(server.stdout.readline())["address"]
    port = address.rpartition(":")[2]
    # It logs as it does for everybody; somebody must read it.
    reader = subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL)

    def spent() -> float:
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
        health = alone("--load", port, "--seconds", known.seconds, stdin=kinds["health"][1])
        print(
            f"\n{bundle.name}, {known.threads} thread(s); only answered: {health['requests_per_s']:,.0f} requests/s, "
            f"client {health['client_cpu']:.2f} cores; one thread decodes {decoded:,.0f} pictures/s\n"
        )
        print(
            "| request | bare images/s | served images/s | ratio | batch | p50 ms | p99 ms | bare CPU us/image | "
            "server CPU us/image | clients' cores |"
        )
        print("|---" * 10 + "|")
        for kind in known.kinds:
            count, request = kinds[kind]
            batch = min(64, CLIENTS * count)
            bares, seen = [], []
            cpu, (images, runs) = spent(), batches()
            for _ in range(known.rounds):
                limits = ("--threads", known.threads, "--seconds", known.seconds)
                bares.append(alone(bundle, "--bare", batch, *limits))
                seen.append(alone("--load", port, "--seconds", known.seconds, stdin=request))
                assert set(seen[-1]["statuses"]) == {"200"}, seen[-1]
            alike = [one["images_per_s"] for one in bares]
            served = [one["requests_per_s"] * count for one in seen]
            ratio = statistics.median(one / other for one, other in zip(served, alike, strict=True))
            more, again = batches()
            each, alone_each = 1e6 * (spent() - cpu) / (more - images), statistics.median(one["cpu"] for one in bares)
            middle = {key: statistics.median(one[key] for one in seen) for key in ("p50", "p99", "client_cpu")}
            print(
                f"| {kind} | {statistics.median(alike):,.0f} | {statistics.median(served):,.0f} | {ratio:.2f} | "
                f"{(more - images) / (again - runs):.1f} | {middle['p50']:.1f} | {middle['p99']:.1f} | "
                f"{alone_each:.0f} | {each:.0f} | {middle['client_cpu']:.2f} |",
                flush=True,
            )
    finally:
        server.terminate()
        server.wait()
        reader.wait()


if __name__ == "__main__":
    main()
