"""``upright serve``: classify images over HTTP, or estimate their orientation.

Starlette routes requests, and uvicorn handles HTTP (httptools, on uvloop). `Batcher` runs the model in one thread, and
a pool of threads decodes images, so neither blocks the event loop. The proxy in front is responsible for keys, TLS
and routing.
"""

import asyncio
import ctypes
import json
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from upright.cores import count_cores
from upright.errors import UserError
from upright.options import Serve
from upright.runtime.serving.batching import log
from upright.runtime.serving.connection import Connection
from upright.runtime.serving.loaded import open_predictor
from upright.runtime.serving.service import Service, request_log
from upright.runtime.serving.workers import Workers

M_MMAP_THRESHOLD = -3
LARGE_BLOCK = 4 * 2**20


class JsonLines(logging.Formatter):
    """Format a log record as one line of JSON: UTC time, level, message, and the ``fields`` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Server(uvicorn.Server):
    """Uvicorn server that exits with 0 after a signal. It first answers accepted requests, and refuses new ones."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready
        self.reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self.reloads.add(loop.create_task(self.service.reload())))
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        fields = {"address": address, "model": self.service.loaded.name, "version": self.service.loaded.version}
        log.info("serving", extra={"fields": asdict(self.service.options) | fields | {"pid": os.getpid()}})
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals. Uvicorn would raise them again at the end, and the exit code would not be 0."""
        handlers = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer accepted requests. The server still listens meanwhile, so that new requests get a 503."""
        log.info("stopping", extra={"fields": {"waiting": self.service.waiting}})
        # Until idle connections are closed, responses have the header ``Connection: close``.
        end = time.monotonic() + self.service.options.grace_s
        while (self.service.waiting or time.monotonic() < end) and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def return_freed_memory() -> None:
    """Let glibc return blocks of at least `LARGE_BLOCK` bytes to the system as soon as they are free.

    By default it raises this limit to 32 MB when it frees such a block, and then keeps the memory for each thread.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def serve(options: Serve) -> int:
    """Serve until SIGTERM or SIGINT, then answer accepted requests and return."""
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"Cannot listen on {options.host}, port {options.port}: {error}.") from None
        if options.workers == 1:
            _answer(options, listener, lambda: None)
        else:
            share = max(1, count_cores() // options.workers)
            options = replace(options, threads=options.threads or share, decoders=options.decoders or share)
            _configure_log(options)
            Workers(partial(_answer, options, listener), options.workers).run()
    return 0


def _answer(options: Serve, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests in this process until a signal. Call ``ready`` when it accepts connections."""
    return_freed_memory()
    service = Service(open_predictor(options), options)
    config = uvicorn.Config(
        service.app(),
        http=Connection,
        log_config=None,
        access_log=False,
        proxy_headers=bool(options.proxies),
        forwarded_allow_ips=list(options.proxies),
        root_path=options.root_path,
        backlog=2048,
        server_header=False,
    )
    _configure_log(options)
    Server(config, service, ready).run(sockets=[listener])
    log.info("stopped")


def _configure_log(options: Serve) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    request_log.setLevel(logging.WARNING if options.quiet else logging.INFO)
    # Uvicorn's messages repeat those of this module.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
