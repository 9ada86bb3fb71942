"""The routes of `upright serve`, what they refuse, and what is counted."""

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

from upright.errors import UprightError, UserError
from upright.images import Pixels
from upright.runtime.bundle import SUMS
from upright.runtime.predictor import Predictor, run_batch
from upright.runtime.serving import protocol
from upright.runtime.serving.batching import Batcher, Rows
from upright.runtime.serving.description import describe, page

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BODIES = 16
"""As many of the largest bodies are held at once; who sends more is refused until there is room."""
SMALL = 64 * 1024
"""A request of so many bytes is parsed at once; to hand it to a thread would cost more."""

request_log = logging.getLogger("upright.serve.requests")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What is taken.

    Args:
        max_batch: images per run of the model.
        max_delay: seconds, see `Batcher`.
        max_queue: images that are taken and not yet answered.
        max_body: bytes of a request.
        timeout: seconds from the headers of a request to its answer.
    """

    max_batch: int = 64
    max_delay: float = 0.005
    max_queue: int = 256
    max_body: int = 16_000_000
    timeout: float = 30.0


class Metrics:
    """What ``/metrics`` shows, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        make: dict[str, Any] = {"namespace": "upright", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ["route", "status"], **make)
        self.seconds = Histogram("request_seconds", "From the headers to the answer.", ["route"], **make)
        self.images = Counter("images", "Images by what became of them.", ["outcome"], **make)
        self.batch = Histogram(
            "batch_images", "Images per run of the model.", buckets=[2**n for n in range(11)], **make
        )
        self.model = Histogram("model_seconds", "One run of the model.", **make)
        Gauge("waiting_images", "Taken and not yet answered.", **make).set_function(waiting)

    def ran(self, images: int, seconds: float) -> None:
        """One run of the model."""
        self.batch.observe(images)
        self.model.observe(seconds)


class Service:
    """The routes, and what they share.

    Args:
        predictor: answers.
        limits: what is taken.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits, self.spec = predictor, limits, predictor.spec
        folder = predictor.bundle.folder
        self.name = folder.resolve().name
        # A name for these very files.
        self.version = sha256((folder / SUMS).read_bytes()).hexdigest()[:12]
        self.waiting, self.held, self.draining, self.ready = 0, 0, False, False
        self.metrics = Metrics(lambda: self.waiting)
        fixed = predictor.session.get_inputs()[0].shape[0]
        self.max_batch = min(limits.max_batch, fixed) if isinstance(fixed, int) else limits.max_batch
        self.batcher = Batcher(self._model, self.max_batch, limits.max_delay, self.metrics.ran)
        self.decoders = ThreadPoolExecutor(CORES, "decode")

    def app(self) -> ASGIApp:
        """The ASGI application."""
        model = "/v2/models/{name}"
        infer, ready = self._infer, self._model_ready
        routes = [
            Route("/v1/classify", self._classify, methods=["POST"]),
            Route(f"{model}/infer", infer, methods=["POST"]),
            Route(f"{model}/versions/{{version}}/infer", infer, methods=["POST"]),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._is_ready),
            Route(f"{model}/ready", ready),
            Route(f"{model}/versions/{{version}}/ready", ready),
            Route(model, self._metadata),
            Route(f"{model}/versions/{{version}}", self._metadata),
            Route("/v2", self._server),
            Route("/v2/", self._server),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refused, UprightError: _bad, ClientDisconnect: _gone, 500: _broken}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        # Starlette fails over a query that is no UTF-8 when it points to a path without the slash.
        app.router.redirect_slashes = False
        return self._noted(app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        # The first picture would wait for Pillow's plugins, and the model for its memory.
        await self._decoded([(self.predictor.bundle.folder / self.predictor.bundle.samples[0]["file"]).read_bytes()])
        self.ready = True
        yield
        self.decoders.shutdown()
        self.batcher.close()

    def _model(self, images: Pixels) -> Rows:
        (rows,) = run_batch(self.predictor.session, images)
        return rows

    # What is taken.

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.max_body
        # The parser has seen that it is a number.
        if int(request.headers.get("content-length", 0)) > limit:
            _refuse(413, f"The body has {request.headers['content-length']} bytes, at most {limit} are taken.")
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                _refuse(413, f"The body has more than {limit} bytes, which is the most that is taken.")
            request.state.held += len(chunk)
            self.held += len(chunk)
            if self.held > BODIES * limit:
                _refuse(429, f"The bodies of all requests have more than {BODIES * limit} bytes; try again later.")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @asynccontextmanager
    async def _taken(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request that may be answered: refused are those that would wait, and late ones."""
        request.state.held, came = 0, False
        self._room(1)
        try:
            async with asyncio.timeout(self.limits.timeout):
                body = await self._body(request)
                came = True
                yield body
        except TimeoutError:
            seconds = f"within {self.limits.timeout:g} s"
            if not came:
                _refuse(408, f"The body did not come {seconds}.")
            _refuse(503, f"There was no answer {seconds}; try again later.")
        finally:
            self.held -= request.state.held

    def _room(self, images: int) -> None:
        if self.draining:
            _refuse(503, "The server is stopping; ask another one.")
        most = self.limits.max_queue
        if images > most:
            _refuse(413, f"A request may hold up to {most} images, got {images}.")
        if self.waiting + images > most:
            self.metrics.images.labels("refused").inc(images)
            _refuse(429, f"{self.waiting} images are waiting, at most {most} may; try again later.")

    @contextmanager
    def _places(self, images: int) -> Iterator[None]:
        self._room(images)
        self.waiting += images
        try:
            yield
        finally:
            self.waiting -= images

    # What is answered.

    def _decode(self, images: "list[tuple[bytes, asyncio.Future[Rows]]]") -> None:
        """In a thread of `decoders`, whence nothing is raised to anybody."""
        for encoded, answer in images:
            try:
                self.batcher.wait_for_room()
                if not answer.cancelled():
                    self.batcher.submit(self.predictor.decode(encoded)[np.newaxis], answer)
            except Exception as error:
                answer.get_loop().call_soon_threadsafe(_fail, answer, error)
        self.batcher.arrived()

    async def _decoded(self, images: list[bytes]) -> list[Rows | BaseException]:
        """``(1, K)`` for each, or the `UprightError` that it led to."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Rows]] = [loop.create_future() for _ in images]
        todo = list(zip(images, answers, strict=True))
        # As many parts as threads: to hand a picture over costs as much as to decode a small one.
        each = -(-len(todo) // CORES)
        for start in range(0, len(todo), each):
            self.batcher.announce()
            self.decoders.submit(self._decode, todo[start : start + each])
        rows = await asyncio.gather(*answers, return_exceptions=True)
        for row in rows:
            if isinstance(row, BaseException) and not isinstance(row, UprightError):
                raise row
        bad = sum(isinstance(row, BaseException) for row in rows)
        self.metrics.images.labels("answered").inc(len(rows) - bad)
        self.metrics.images.labels("bad").inc(bad)
        return rows

    async def _stacked(self, images: Pixels) -> Rows:
        """``(B, K)`` for ``(B, H, W, C)``."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Rows]] = []
        for start in range(0, len(images), self.max_batch):
            answers.append(loop.create_future())
            self.batcher.submit(images[start : start + self.max_batch], answers[-1])
        rows = await asyncio.gather(*answers)
        self.metrics.images.labels("answered").inc(len(images))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    async def _classify(self, request: Request) -> Response:
        asked, classes = request.query_params.get("top", "1"), len(self.spec.classes)
        top = protocol.number(asked)
        if not 1 <= top <= classes:
            raise UserError(f"top must be from 1 to {classes} (the number of classes), got {asked!r}.")
        async with self._taken(request) as body:
            images = await self._pictures(request, body)
            with self._places(len(images)):
                rows = await self._decoded([data for _, data in images])
            results = [self._result(name, row, top) for (name, _), row in zip(images, rows, strict=True)]
            answer: dict[str, Any] = {"model": self.name, "version": self.version, "results": results}
            if all("error" in result for result in results):
                answer["error"] = results[0]["error"]
            return _json(answer, 422 if "error" in answer else 200)

    async def _pictures(self, request: Request, body: bytes) -> list[tuple[str | None, bytes]]:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return [(None, body)]

        async def once() -> AsyncIterator[bytes]:
            yield body

        parser = MultiPartParser(request.headers, once(), max_files=self.limits.max_queue, max_fields=0)  # type: ignore[arg-type]
        # The body is in memory already, and within its limit.
        parser.spool_max_size = self.limits.max_body
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise UserError(f"The multipart body cannot be read: {error.message}") from None
        files = [file for _, file in form.multi_items() if not isinstance(file, str)]
        if not files:
            raise UserError("The multipart body holds no files; give each picture a part with a filename.")
        return [(file.filename, await file.read()) for file in files]

    def _result(self, name: str | None, row: Rows | BaseException, top: int) -> dict[str, Any]:
        named = {} if name is None else {"name": name}
        if isinstance(row, BaseException):
            return named | {"error": str(row)}
        # Plain floats: what NumPy does here would release the lock to the other threads, and wait to have it again.
        (probabilities,) = row.tolist()
        ranked = sorted(zip(probabilities, self.spec.classes, strict=True), key=itemgetter(0), reverse=True)[:top]
        best, label = ranked[0]
        result: dict[str, Any] = named | {"label": label, "probability": best}
        if top > 1:
            result["top"] = [{"label": label, "probability": probability} for probability, label in ranked]
        return result

    async def _infer(self, request: Request) -> Response:
        self._known(request)
        async with self._taken(request) as body:
            read = partial(protocol.read, body, request.headers.get(protocol.HEADER), self.spec.channels)
            loop = asyncio.get_running_loop()
            asked, images = read() if len(body) <= SMALL else await loop.run_in_executor(self.decoders, read)
            with self._places(len(images)):
                if isinstance(images, list):
                    answers = await self._decoded(images)
                    for index, answer in enumerate(answers):
                        if isinstance(answer, UprightError):
                            raise UserError(f"Image {index} of {len(images)}: {answer}")
                    rows = np.concatenate([answer for answer in answers if not isinstance(answer, BaseException)])
                else:
                    height, width = images.shape[1:3]
                    if height * width > self.predictor.max_pixels:
                        raise UserError(
                            f"Images of {width}x{height} pixels are over the limit of {self.predictor.max_pixels}."
                        )
                    rows = await self._stacked(images)
        content, end = protocol.write(asked, rows, self.spec, self.name, self.version)
        if end is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={protocol.HEADER: str(end)}, media_type="application/octet-stream")

    # What is told.

    def _known(self, request: Request) -> None:
        name, asked = request.path_params["name"], request.path_params.get("version", self.version)
        if (name, asked) != (self.name, self.version):
            _refuse(404, f"There is no model {name!r} of version {asked!r}; there is '{self.name}', {self.version}.")

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    def _readiness(self) -> bool:
        return self.ready and not self.draining

    async def _is_ready(self, request: Request) -> Response:
        ready = self._readiness()
        return _json({"live": True, "ready": ready}, 200 if ready else 503)

    async def _model_ready(self, request: Request) -> Response:
        self._known(request)
        ready = self._readiness()
        return _json({"name": self.name, "ready": ready}, 200 if ready else 503)

    async def _metadata(self, request: Request) -> Response:
        self._known(request)
        return _json(protocol.metadata(self.spec, self.name, self.version))

    async def _server(self, request: Request) -> Response:
        return _json({"name": "upright", "version": version("upright"), "extensions": ["binary_tensor_data"]})

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return _json(describe(self.name, self.spec, self.limits.max_queue))

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(describe(self.name, self.spec, self.limits.max_queue)))

    def _noted(self, app: ASGIApp) -> ASGIApp:
        """Count and log every request."""

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status = time.perf_counter(), 499  # nginx's number for a client that went away

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    if self.draining:
                        message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                seconds = time.perf_counter() - start
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.requests.labels(route, status).inc()
                self.metrics.seconds.labels(route).observe(seconds)
                if request_log.isEnabledFor(logging.INFO):
                    fields = {"method": scope["method"], "path": scope["path"], "status": status}
                    fields |= {"ms": round(1000 * seconds, 2), "client": (scope.get("client") or [None])[0]}
                    request_log.info("request", extra={"fields": fields})

        return noted


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _refuse(status: int, text: str) -> NoReturn:
    # What is left of a late body is not waited for.
    headers = {408: {"Connection": "close"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    raise HTTPException(status, text, headers.get(status))


async def _refused(request: Request, error: HTTPException) -> Response:
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _bad(request: Request, error: UprightError) -> Response:
    return _json({"error": str(error)}, 400)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _broken(request: Request, error: Exception) -> Response:
    return _json({"error": "The server failed; its log says why."}, 500)


def _fail(answer: "asyncio.Future[Rows]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
