"""``upright serve``: classify pictures over HTTP.

Starlette routes, uvicorn speaks HTTP (httptools, on uvloop), `Batcher` runs the model in one thread, and a pool of
threads decodes; the event loop does neither. Keys, TLS, routing, and clients that are slow with their headers are the
business of the proxy in front.
"""

import asyncio
import json
import logging
import math
import socket
import sys
import time
import warnings
from types import FrameType
from typing import Any

import msgspec
import uvicorn

from upright.errors import UserError
from upright.runtime.predictor import Predictor
from upright.runtime.serving.service import Limits, Service, request_log

GRACE = 1.0
"""Seconds from a signal to the closing of what is idle, in which every connection in use learns that it shall close."""

log = logging.getLogger("upright.serve")


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, message, and what the record brings with it."""
        milliseconds = math.floor(record.msecs)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Server(uvicorn.Server):
    """Uvicorn, that refuses what is new while it finishes what was taken, and ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: Any = None) -> None:
        """Say where we listen once we do."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        fields = {"address": f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"}
        fields |= {"model": self.service.name, "version": self.service.version}
        log.info("serving", extra={"fields": fields | msgspec.structs.asdict(self.service.limits)})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First of all, say that we are not ready."""
        self.service.draining = True
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer what was taken with the doors still open: who knocks is told to go elsewhere."""
        log.info("stopping", extra={"fields": {"waiting": self.service.waiting}})
        grace = time.monotonic() + GRACE
        while (self.service.waiting or time.monotonic() < grace) and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: str = "fp32",
    threads: int = 0,
    max_batch: int = 64,
    max_delay_ms: float = 5,
    max_queue: int = 256,
    max_body_mb: float = 16,
    max_pixels: int = 16_000_000,
    timeout_s: float = 30,
    quiet: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT, then answer what was taken and end.

    Args:
        bundle: the folder of a bundle; it is read once.
        host: address to listen at.
        port: likewise; 0 for one that is free, which the log names.
        precision: which of the bundle's models.
        threads: that one run of the model may use; 0 for as many as there are cores.
        max_batch: see `Limits`, like the rest.
        max_delay_ms: milliseconds.
        max_queue: images.
        max_body_mb: millions of bytes.
        max_pixels: of one picture.
        timeout_s: seconds.
        quiet: log no requests.

    Raises:
        UserError: for a bundle that cannot be read, an option out of range, and an address that is taken.
    """
    numbers = {"--max-batch": max_batch, "--max-queue": max_queue, "--max-pixels": max_pixels}
    for option, number in numbers.items():
        if number < 1:
            raise UserError(f"{option} must be at least 1, got {number}.")
    if max_body_mb <= 0 or timeout_s <= 0 or max_delay_ms < 0 or threads < 0:
        raise UserError(
            "--max-body-mb and --timeout-s must be above 0, --max-delay-ms and --threads at least 0; "
            f"got {max_body_mb:g}, {timeout_s:g}, {max_delay_ms:g}, {threads}."
        )
    limits = Limits(
        max_batch=max_batch,
        max_delay=max_delay_ms / 1000,
        max_queue=max_queue,
        max_body=int(max_body_mb * 1e6),
        timeout=timeout_s,
    )
    predictor = Predictor(bundle, precision, threads=threads or None, max_pixels=max_pixels)
    service = Service(predictor, limits)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    config = uvicorn.Config(
        service.app(), log_config=None, access_log=False, proxy_headers=False, backlog=2048, server_header=False
    )
    # What is wrong with a picture is told to whom it is from.
    warnings.filterwarnings("ignore", module="PIL")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"Cannot listen at {host}, port {port}: {error}.") from None
        logging.basicConfig(handlers=[handler], level=logging.INFO)
        request_log.setLevel(logging.WARNING if quiet else logging.INFO)
        # Its lines for people would say again what ours say.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        Server(config, service).run(sockets=[listener])
        log.info("stopped")
    return 0
