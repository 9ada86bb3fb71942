"""The routes of `upright serve`, their limits, and their metrics."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NoReturn

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upright.errors import ImageError, UprightError, UserError
from upright.options import Serve
from upright.runtime.bundle import SUMS
from upright.runtime.predictor import Predictor, fixed_batch
from upright.runtime.serving import protocol
from upright.runtime.serving.batching import Batcher, Images, Rows
from upright.runtime.serving.description import ClassifyResponse, RankedClass, Result, openapi, page

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MAX_BODIES = 16
"""Limit on the bodies in memory, as a number of bodies of the largest size. Further requests are refused."""
SMALL_BODY = 64 * 1024
"""Largest request in bytes that the event loop parses itself, because a thread would take longer in total."""

request_log = logging.getLogger("upright.serve.requests")


class Metrics:
    """Metrics of ``/metrics``, in a separate registry."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common: dict[str, Any] = {"namespace": "upright", "registry": self.registry}
        self.requests = Counter("requests", "Requests with a response.", ["route", "status"], **common)
        self.seconds = Histogram("request_seconds", "Time from the headers to the response.", ["route"], **common)
        self.images = Counter("images", "Images: answered, bad, refused, failed.", ["outcome"], **common)
        sizes = [2**n for n in range(11)]
        self.batch = Histogram("batch_images", "Images per run of the model.", buckets=sizes, **common)
        self.model = Histogram("model_seconds", "Time per run of the model.", **common)
        Gauge("waiting_images", "Accepted images without a response.", **common).set_function(waiting)

    def observe_run(self, images: int, seconds: float) -> None:
        self.batch.observe(images)
        self.model.observe(seconds)


class Service:
    """The routes and their shared state.

    Args:
        predictor: predictor with the model.
        options: options with the limits.
    """

    def __init__(self, predictor: Predictor, options: Serve) -> None:
        self.predictor, self.options, self.spec = predictor, options, predictor.spec
        self.name = predictor.bundle.name
        # The version is a hash, so the same files have the same version on every server.
        self.version = sha256((predictor.bundle.files / SUMS).read_bytes()).hexdigest()[:12]
        self.max_body = int(options.max_body_mb * 1e6)
        self.max_batch = min(options.max_batch, fixed_batch(predictor.session) or options.max_batch)
        self.waiting, self.held_bytes, self.draining, self.started = 0, 0, False, False
        self.metrics = Metrics(lambda: self.waiting)
        delay = options.max_delay_ms / 1000
        self.batcher = Batcher(predictor.run, self.max_batch, delay, self.metrics.observe_run)
        self.decoders = ThreadPoolExecutor(CORES, "decode")

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/v1/classify", self._classify, methods=["POST"]),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server),
            Route("/v2/", self._server),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
        ]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(f"{model}/infer", self._infer, methods=["POST"]),
                Route(f"{model}/ready", self._model_ready),
                Route(model, self._metadata),
            ]
        handlers: dict[Any, Any] = dict.fromkeys((HTTPException, UprightError, ClientDisconnect, Exception), _failed)
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        # Starlette's redirect to a path without the slash fails on a query that is not UTF-8.
        app.router.redirect_slashes = False
        return self._observed(app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        self.started = True
        yield
        self.decoders.shutdown()
        self.batcher.close()

    # Limits.

    async def _body(self, request: Request) -> bytes:
        # The HTTP parser has checked that the header is a number.
        if int(request.headers.get("content-length", 0)) > self.max_body:
            length = request.headers["content-length"]
            _refuse(413, f"The body has {length} bytes, but the limit is {self.max_body}.")
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.max_body:
                _refuse(413, f"The body has more than {self.max_body} bytes, which is the limit.")
            request.state.held_bytes += len(chunk)
            self.held_bytes += len(chunk)
            if self.held_bytes > MAX_BODIES * self.max_body:
                total = MAX_BODIES * self.max_body
                _refuse(429, f"The bodies of all requests together have more than {total} bytes; try again later.")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @asynccontextmanager
    async def _accepted(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request. Refuse a request that is too slow or does not fit into the queue."""
        request.state.held_bytes, complete = 0, False
        self._check_room(1)
        try:
            async with asyncio.timeout(self.options.timeout_s):
                body = await self._body(request)
                complete = True
                yield body
        except TimeoutError:
            seconds = f"within {self.options.timeout_s:g} s"
            if not complete:
                _refuse(408, f"The body did not arrive {seconds}.")
            _refuse(503, f"The model did not finish {seconds}; try again later.")
        finally:
            self.held_bytes -= request.state.held_bytes

    def _check_room(self, images: int) -> None:
        if self.draining:
            _refuse(503, "The server is stopping; use another one.")
        limit = self.options.max_queue
        if images > limit:
            _refuse(413, f"A request may have up to {limit} images, got {images}.")
        if self.waiting + images > limit:
            self.metrics.images.labels("refused").inc(images)
            _refuse(429, f"The queue holds {self.waiting} of at most {limit} images; try again later.")

    @contextmanager
    def _places(self, images: int) -> Iterator[None]:
        """Reserve places in the queue."""
        self._check_room(images)
        self.waiting += images
        try:
            yield
        except Exception as error:
            if _status(error) >= 500:
                self.metrics.images.labels("failed").inc(images)
            raise
        finally:
            self.waiting -= images

    # The model.

    def _decode(self, files: "list[tuple[bytes, asyncio.Future[Rows]]]") -> None:
        """Decode files and submit them, in a thread of `decoders`. Set errors on the futures."""
        for content, result in files:
            try:
                self.batcher.wait_for_room()
                if not result.cancelled():
                    self.batcher.submit(self.predictor.decode(content)[np.newaxis], result)
            except Exception as error:
                result.get_loop().call_soon_threadsafe(_set_exception, result, error)
        self.batcher.arrived()

    async def _classify_files(self, files: list[bytes]) -> list[Rows | ImageError]:
        """Return ``(1, K)`` or an error for each encoded image."""
        loop = asyncio.get_running_loop()
        jobs = [(content, loop.create_future()) for content in files]
        # Give each thread one share of the files: passing one to a thread costs as much as decoding a small image.
        size = -(-len(jobs) // CORES)
        for start in range(0, len(jobs), size):
            self.batcher.announce()
            self.decoders.submit(self._decode, jobs[start : start + size])
        outcomes = await asyncio.gather(*(result for _, result in jobs), return_exceptions=True)
        rows: list[Rows | ImageError] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, ImageError):
                raise outcome
            rows.append(outcome)
        bad = sum(isinstance(row, ImageError) for row in rows)
        self.metrics.images.labels("answered").inc(len(rows) - bad)
        self.metrics.images.labels("bad").inc(bad)
        return rows

    async def _classify_all_files(self, files: list[bytes]) -> Rows:
        """Return ``(B, K)``, or raise the first `ImageError`."""
        rows = []
        for index, outcome in enumerate(await self._classify_files(files)):
            if isinstance(outcome, ImageError):
                raise ImageError(f"Image {index} of {len(files)}: {outcome}")
            rows.append(outcome)
        return np.concatenate(rows)

    async def _classify_pixels(self, images: Images) -> Rows:
        """Return ``(B, K)`` for ``(B, H, W, C)``."""
        height, width = images.shape[1:3]
        if height * width > self.options.max_pixels:
            raise ImageError(f"Images of {width}x{height} pixels are over the limit of {self.options.max_pixels}.")
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Rows]] = []
        for start in range(0, len(images), self.max_batch):
            results.append(loop.create_future())
            self.batcher.submit(images[start : start + self.max_batch], results[-1])
        rows = await asyncio.gather(*results)
        self.metrics.images.labels("answered").inc(len(images))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    # Routes.

    async def _classify(self, request: Request) -> Response:
        text, classes = request.query_params.get("top", "1"), len(self.spec.classes)
        top = protocol.number(text)
        if not 1 <= top <= classes:
            raise UserError(f"top must be from 1 to {classes} (the number of classes), got {text!r}.")
        async with self._accepted(request) as body:
            files = await self._files(request, body)
            with self._places(len(files)):
                outcomes = await self._classify_files([content for _, content in files])
        results = [self._result(name, outcome, top) for (name, _), outcome in zip(files, outcomes, strict=True)]
        response = ClassifyResponse(self.name, self.version, results)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ImageError)]
        if len(errors) < len(outcomes):
            return _json(response)
        response.error = str(errors[0])
        return _json(response, _status(errors[0]))

    async def _files(self, request: Request, body: bytes) -> list[tuple[str | None, bytes]]:
        """Return names and contents of the encoded images in a request."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return [(None, body)]

        async def stream() -> AsyncIterator[bytes]:
            yield body

        parser = MultiPartParser(
            request.headers,
            stream(),  # type: ignore[arg-type]
            max_files=self.options.max_queue,
            max_fields=0,
        )
        # The body is already in memory, and within its limit.
        parser.spool_max_size = self.max_body
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise UserError(f"The multipart body cannot be read: {error.message}") from None
        files = [file for _, file in form.multi_items() if not isinstance(file, str)]
        if not files:
            raise UserError("The multipart body has no files; send each image as a part with a filename.")
        return [(file.filename, await file.read()) for file in files]

    def _result(self, name: str | None, outcome: Rows | ImageError, top: int) -> Result:
        if isinstance(outcome, ImageError):
            return Result(name, error=str(outcome))
        # Sort plain floats: NumPy would release the interpreter lock and then wait for it.
        (probabilities,) = outcome.tolist()
        pairs = sorted(zip(probabilities, self.spec.classes, strict=True), key=itemgetter(0), reverse=True)[:top]
        ranked = [RankedClass(label, probability) for probability, label in pairs]
        return Result(name, ranked[0].label, ranked[0].probability, ranked if top > 1 else None)

    async def _infer(self, request: Request) -> Response:
        self._check_model(request)
        async with self._accepted(request) as body:
            read = partial(protocol.read, body, request.headers.get(protocol.HEADER), self.spec.channels)
            loop = asyncio.get_running_loop()
            parsed, images = read() if len(body) <= SMALL_BODY else await loop.run_in_executor(self.decoders, read)
            with self._places(len(images)):
                try:
                    if isinstance(images, list):
                        rows = await self._classify_all_files(images)
                    else:
                        rows = await self._classify_pixels(images)
                except ImageError as error:
                    # One bad image fails the whole request, because the protocol has no errors for single images.
                    raise UserError(str(error)) from None
        content, end = protocol.write(parsed, rows, self.spec, self.name, self.version)
        if end is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={protocol.HEADER: str(end)}, media_type="application/octet-stream")

    def _check_model(self, request: Request) -> None:
        name, number = request.path_params["name"], request.path_params.get("version", self.version)
        if (name, number) != (self.name, self.version):
            _refuse(404, f"There is no model {name!r}, version {number!r}, only '{self.name}', {self.version}.")

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        return self._readiness({"live": True})

    async def _model_ready(self, request: Request) -> Response:
        self._check_model(request)
        return self._readiness({"name": self.name})

    def _readiness(self, fields: dict[str, Any]) -> Response:
        ready = self.started and not self.draining
        return _json(fields | {"ready": ready}, 200 if ready else 503)

    async def _metadata(self, request: Request) -> Response:
        self._check_model(request)
        return _json(protocol.metadata(self.spec, self.name, self.version))

    async def _server(self, request: Request) -> Response:
        return _json({"name": "upright", "version": version("upright"), "extensions": ["binary_tensor_data"]})

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi(self.name, self.spec, self.options.max_queue))

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(openapi(self.name, self.spec, self.options.max_queue)))

    def _observed(self, app: ASGIApp) -> ASGIApp:
        """Count and log every request of ``app``."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status = time.perf_counter(), _status(ClientDisconnect())

            async def send_and_record(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    if self.draining:
                        message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            try:
                await app(scope, receive, send_and_record)
            finally:
                seconds = time.perf_counter() - start
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.requests.labels(route, status).inc()
                self.metrics.seconds.labels(route).observe(seconds)
                if request_log.isEnabledFor(logging.INFO):
                    fields = {"method": scope["method"], "path": scope["path"], "status": status}
                    fields |= {"ms": round(1000 * seconds, 2), "client": (scope.get("client") or [None])[0]}
                    request_log.info("request", extra={"fields": fields})

        return observed


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error. Only this function and `_refuse` set statuses."""
    match error:
        case HTTPException():
            return error.status_code
        case ImageError():
            return 422
        case UserError():
            return 400
        case ClientDisconnect():
            return 499  # nginx's status for a client that disconnected
    return 500


def _refuse(status: int, text: str) -> NoReturn:
    # Close the connection instead of waiting for the rest of a late body.
    headers = {408: {"Connection": "close"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    raise HTTPException(status, text, headers.get(status))


async def _failed(request: Request, error: Exception) -> Response:
    """Return the response for an error. Errors of other kinds than `UserError` are logged elsewhere, or by uvicorn."""
    headers = None
    text = str(error) if isinstance(error, UserError) else "The server failed; see its log."
    if isinstance(error, HTTPException):
        text, headers = error.detail, dict(error.headers or {})
    return _json({"error": text}, _status(error), headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _set_exception(result: "asyncio.Future[Rows]", error: Exception) -> None:
    if not result.done():
        result.set_exception(error)
