"""The routes of `upright serve`, and their limits."""

import asyncio
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn
from uuid import uuid4

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upright.errors import ImageError, UprightError, UserError
from upright.images import TaskName
from upright.options import Serve
from upright.runtime.predictor import AnyPredictor
from upright.runtime.serving import protocol
from upright.runtime.serving.batching import Budget, log
from upright.runtime.serving.description import ANSWERS, Results, openapi, page
from upright.runtime.serving.loaded import Loaded, decoder_count, open_predictor
from upright.runtime.serving.metrics import Metrics

MAX_BODIES = 16
"""Limit on the bodies in memory, as a number of bodies of the largest size. Further requests are refused."""
ENCODINGS = ("gzip", "deflate")
SMALL_BODY = 64 * 1024  # largest request in bytes that the event loop parses itself

SERVER = {"name": "upright", "version": version("upright"), "extensions": ["binary_tensor_data"]}
REQUEST_ID = re.compile(r"[!-~]{1,128}")
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""W3C Trace Context. The group is the trace id."""

request_log = logging.getLogger("upright.serve.requests")


class Service:
    """The routes and their shared state."""

    def __init__(self, predictor: AnyPredictor, options: Serve) -> None:
        self.options = options
        self.max_body = int(options.max_body_mb * 1e6)
        self.waiting, self.held_bytes, self.draining, self.started = 0, 0, False, False
        self.metrics = Metrics()
        self.budget = Budget(options.pixel_budget)
        self.decoders = ThreadPoolExecutor(decoder_count(options), "decode")
        self.loaded = self._load(predictor)

    def _load(self, predictor: AnyPredictor) -> Loaded:
        return Loaded(predictor, self.options, self.metrics, self.budget, self.decoders)

    async def reload(self) -> None:
        """Read the bundle again. New requests are answered by it, or by the old one if it cannot be used."""
        loop, old = asyncio.get_running_loop(), self.loaded
        try:
            predictor = await loop.run_in_executor(None, open_predictor, self.options)
        except (UprightError, OSError) as error:
            log.error("reload failed", extra={"fields": {"error": str(error), "version": old.version}})
            return
        self.loaded = self._load(predictor)
        log.info("reloaded", extra={"fields": {"model": self.loaded.name, "version": self.loaded.version}})
        await asyncio.sleep(self.options.timeout_s)  # all requests of the old bundle have ended after this time
        await loop.run_in_executor(None, old.batcher.close)

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            *(Route(each.route, partial(self._answer, task), methods=["POST"]) for task, each in ANSWERS.items()),
            _get("/v2/health/live", lambda _: _json({"live": True})),
            _get("/v2/health/ready", lambda _: self._readiness({"live": True})),
            _get("/v2", lambda _: _json(SERVER)),
            _get("/v2/", lambda _: _json(SERVER)),
            _get("/metrics", lambda _: Response(self.metrics.text(), media_type="text/plain; version=0.0.4")),
            _get("/openapi.json", lambda _: _json(self._description())),
            _get("/docs", lambda _: HTMLResponse(page(self._description()))),
        ]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(f"{model}/infer", self._infer, methods=["POST"]),
                _get(f"{model}/ready", lambda request: self._readiness({"name": self._requested(request).name})),
                _get(model, lambda request: _json(self._requested(request).protocol.metadata)),
            ]
        handlers: dict[Any, Any] = dict.fromkeys((HTTPException, UprightError, ClientDisconnect, Exception), _failed)
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self.options.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[protocol.HEADER, "Retry-After", "X-Request-Id"],
        )
        middleware = [cors] if self.options.cors else []
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan, middleware=middleware)
        # Starlette's redirect to a path without the slash fails on a query that is not UTF-8.
        app.router.redirect_slashes = False
        return self._observed(app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[dict[str, Any]]:
        self.started = True
        yield {"metrics": self.metrics}  # for connections
        self.decoders.shutdown()
        self.loaded.batcher.close()

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
            self._hold(request, len(chunk))
            chunks.append(chunk)
        body = b"".join(chunks)
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding == "identity":
            return body
        if encoding not in ENCODINGS:
            _refuse(415, f"Content-Encoding must be {' or '.join(ENCODINGS)}, or absent; got {encoding!r}.")
        body = await asyncio.get_running_loop().run_in_executor(self.decoders, self._decompress, body)
        self._hold(request, len(body))
        return body

    def _hold(self, request: Request, size: int) -> None:
        """Count bytes of bodies in memory."""
        request.state.held_bytes += size
        self.held_bytes += size
        if self.held_bytes > MAX_BODIES * self.max_body:
            total = MAX_BODIES * self.max_body
            _refuse(429, f"The bodies of all requests together have more than {total} bytes; try again later.")

    def _decompress(self, body: bytes) -> bytes:
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
        try:
            content = decompressor.decompress(body, self.max_body + 1)
        except zlib.error as error:
            raise UserError(f"The body cannot be decompressed: {error}.") from None
        if len(content) > self.max_body:
            _refuse(413, f"The decompressed body has more than {self.max_body} bytes, which is the limit.")
        if not decompressor.eof or decompressor.unused_data:
            raise UserError("The body cannot be decompressed: it is truncated, or bytes follow its end.")
        return content

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
        self._wait(images)
        try:
            yield
        except Exception as error:
            if _status(error) >= 500:
                self.metrics.images.labels("failed").inc(images)
            raise
        finally:
            self._wait(-images)

    def _wait(self, images: int) -> None:
        self.waiting += images
        self.metrics.waiting.set(self.waiting)

    # Routes.

    async def _answer(self, task: TaskName, request: Request) -> Response:
        loaded = self.loaded
        if task != loaded.task.name:
            _refuse(
                404, f"The task of this model is {loaded.task.name}: send images to {ANSWERS[loaded.task.name].route}."
            )
        top = self._top(request, len(loaded.protocol.classes))
        names = list(filter(None, request.query_params.get("outputs", "").split(",")))
        loaded.predictor.check_outputs(names)
        async with self._accepted(request) as body:
            files = await self._files(request, body)
            with self._places(len(files)):
                outcomes = await loaded.run_files([loaded.task.output, *names], [content for _, content in files])
        results = [loaded.result(name, outcome, top, names) for (name, _), outcome in zip(files, outcomes, strict=True)]
        response = Results(loaded.name, loaded.version, results)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ImageError)]
        if len(errors) < len(outcomes):
            return _json(response)
        response.error = str(errors[0])
        return _json(response, _status(errors[0]))

    def _top(self, request: Request, classes: int) -> int:
        """Return the number of classes to return."""
        text = request.query_params.get("top")
        if text is None:
            return 1
        if not classes:
            other = "finds several classes per image" if self.loaded.classes else "estimates the orientation"
            raise UserError(f"top is for models with one class per image, and this one {other}; omit top.")
        top = protocol.number(text)
        if not 1 <= top <= classes:
            raise UserError(f"top must be from 1 to {classes} (the number of classes), got {text!r}.")
        return top

    async def _files(self, request: Request, body: bytes) -> list[tuple[str | None, bytes]]:
        """Return names and contents of the encoded images in a request."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return [(None, body)]

        async def stream() -> AsyncIterator[bytes]:
            yield body

        limit = self.options.max_queue
        parser = MultiPartParser(request.headers, stream(), max_files=limit, max_fields=limit)  # type: ignore[arg-type]
        # The body is already in memory, and within its limit.
        parser.spool_max_size = self.max_body
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise UserError(f"The multipart body cannot be read: {error.message}") from None
        files = [(file.filename, await file.read()) for _, file in form.multi_items() if not isinstance(file, str)]
        if not files:
            raise UserError("The multipart body has no files; send each image as a part with a filename.")
        return files

    async def _infer(self, request: Request) -> Response:
        loaded = self._requested(request)
        async with self._accepted(request) as body:
            parsed, images = await self._parsed(loaded.protocol, request, body)
            names = loaded.protocol.needed(parsed)
            with self._places(len(images)):
                try:
                    if isinstance(images, list):
                        parts = await loaded.run_all_files(names, images)
                    else:
                        parts = await loaded.run_pixels(names, images)
                except ImageError as error:
                    # One bad image fails the whole request: the protocol has no errors for single images.
                    raise UserError(str(error)) from None
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in names} if parts[1:] else parts[0]
        for row in outputs[loaded.task.output].tolist() if loaded.task.output in outputs else ():
            self.metrics.observe(loaded.task, row)
        content, end = loaded.protocol.write(parsed, outputs)
        if end is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={protocol.HEADER: str(end)}, media_type="application/octet-stream")

    async def _parsed(self, model: protocol.Model, request: Request, body: bytes) -> protocol.Parsed:
        """Parse a large request in a thread. A small one would take longer there."""
        header = request.headers.get(protocol.HEADER)
        if len(body) <= SMALL_BODY:
            return model.read(body, header)
        # The lists of JSON take up to 27 times the size of their text, about as much as a pixel takes to decode.
        pixels = len(body) if header is None else min(len(body), max(0, protocol.number(header)))

        def read() -> protocol.Parsed:
            self.budget.acquire(pixels)
            try:
                return model.read(body, header)
            finally:
                self.budget.release(pixels)

        return await asyncio.get_running_loop().run_in_executor(self.decoders, read)

    def _requested(self, request: Request) -> Loaded:
        """Return the bundle if the request is for its name and version."""
        loaded, name = self.loaded, request.path_params["name"]
        number = request.path_params.get("version", loaded.version)
        if (name, number) != (loaded.name, loaded.version):
            _refuse(404, f"There is no model {name!r}, version {number!r}, only '{loaded.name}', {loaded.version}.")
        return loaded

    def _readiness(self, fields: dict[str, Any]) -> Response:
        ready = self.started and not self.draining
        return _json(fields | {"ready": ready}, 200 if ready else 503)

    def _description(self) -> dict[str, Any]:
        return openapi(self.loaded.protocol, self.loaded.task.name, self.options.max_queue, self.options.root_path)

    def _observed(self, app: ASGIApp) -> ASGIApp:
        """Count and log every request of ``app``."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status, headers = time.perf_counter(), _status(ClientDisconnect()), Headers(scope=scope)
            request_id = headers.get("x-request-id", "")
            if not REQUEST_ID.fullmatch(request_id):
                request_id = uuid4().hex

            async def send_and_record(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    more = [(b"x-request-id", request_id.encode())]
                    if self.draining:
                        more.append((b"connection", b"close"))
                    message["headers"] = [*message.get("headers", ()), *more]
                await send(message)

            try:
                await app(scope, receive, send_and_record)
            finally:
                seconds = time.perf_counter() - start
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.requests.labels(route, status).inc()
                self.metrics.seconds.labels(route).observe(seconds)
                if request_log.isEnabledFor(logging.INFO):
                    client = (scope.get("client") or [None])[0]
                    fields = {"method": scope["method"], "path": scope["path"], "status": status}
                    fields |= {"ms": round(1000 * seconds, 2), "client": client, "request_id": request_id}
                    if trace := TRACE_PARENT.fullmatch(headers.get("traceparent", "")):
                        fields["trace_id"] = trace[1]
                    request_log.info("request", extra={"fields": fields})

        return observed


def _get(path: str, answer: Callable[[Request], Response]) -> Route:
    async def endpoint(request: Request) -> Response:
        return answer(request)

    return Route(path, endpoint)


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
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))
    text = str(error) if isinstance(error, UserError) else "The server failed; see its log."
    return _json({"error": text}, _status(error))


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")
