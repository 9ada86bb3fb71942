"""The bundle that a server has loaded: it decodes images, and answers them in batches."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import cast

import numpy as np

from upright.cores import count_cores
from upright.errors import ImageError
from upright.options import Serve
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import AnyPredictor, fixed_batch
from upright.runtime.predictor import open_predictor as open_bundle
from upright.runtime.serving import protocol
from upright.runtime.serving.batching import Batcher, Budget, Images, Outputs, set_exception
from upright.runtime.serving.description import RankedClass, Result
from upright.runtime.serving.metrics import Metrics
from upright.runtime.task import MultiLabel


def open_predictor(options: Serve) -> AnyPredictor:
    """Open the bundle and run it on its first sample."""
    predictor = open_bundle(
        Bundle.open(options.bundle, options.key, options.expect),
        options.precision,
        threads=options.threads or None,
        providers=options.providers,
        engine=options.engine,
        max_pixels=options.max_pixels,
    )
    # Load Pillow's plugins and allocate the model's memory before the first request.
    predictor(predictor.bundle.sample_files[0])
    return predictor


def decoder_count(options: Serve) -> int:
    """Return the number of threads that decode images."""
    return options.decoders or count_cores()


class Loaded:
    """A bundle that answers requests, with the limits, metrics, pixel budget and decoder threads of its server."""

    def __init__(
        self,
        predictor: AnyPredictor,
        options: Serve,
        metrics: Metrics,
        budget: Budget,
        decoders: ThreadPoolExecutor,
    ) -> None:
        self.predictor, self.classes, self.task = predictor, predictor.spec.classes, predictor.task
        self.options, self.metrics, self.budget, self.decoders = options, metrics, budget, decoders
        # The version is a hash, so the same files have the same version on every server.
        self.version = options.model_version or predictor.bundle.digest[:12]
        self.name = options.name or predictor.bundle.name
        one_class = self.classes if self.task.name == "classification" else ()
        self.protocol = protocol.Model(self.name, self.version, predictor.session, one_class)
        self.max_batch = min(options.max_batch, fixed_batch(predictor.session) or options.max_batch)
        delay = options.max_delay_ms / 1000
        self.batcher = Batcher(predictor.run_outputs, self.max_batch, delay, metrics.observe_run, budget)
        self.batcher.start()
        metrics.set_model(self.name, self.version, options.precision, self.classes)

    def _decode(self, names: Sequence[str], files: "list[tuple[bytes, asyncio.Future[Outputs]]]") -> None:
        """Decode files and submit them, in a thread of `decoders`. Set errors on the futures."""
        for content, result in files:
            if not result.cancelled():
                self._decode_one(names, content, result)
        self.batcher.arrived()

    def _decode_one(self, names: Sequence[str], content: bytes, result: "asyncio.Future[Outputs]") -> None:
        reserved = 0

        def reserve(pixels: int) -> None:
            nonlocal reserved
            self.budget.acquire(pixels)
            reserved = pixels
            if result.cancelled():
                raise TimeoutError

        try:
            image = self.predictor.decode(content, reserve)
            self.batcher.submit(image[np.newaxis], names, result, reserved)
        except Exception as error:
            self.budget.release(reserved)
            result.get_loop().call_soon_threadsafe(set_exception, result, error)

    async def run_files(self, names: Sequence[str], files: list[bytes]) -> list[Outputs | ImageError]:
        """Return outputs ``(1, ...)`` or an error for each encoded image."""
        loop = asyncio.get_running_loop()
        jobs = [(content, loop.create_future()) for content in files]
        # Give each thread one share of the files: passing one to a thread costs as much as decoding a small image.
        size = -(-len(jobs) // decoder_count(self.options))
        for start in range(0, len(jobs), size):
            self.batcher.announce()
            self.decoders.submit(self._decode, names, jobs[start : start + size])
        outcomes = await asyncio.gather(*(result for _, result in jobs), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, ImageError):
                raise outcome
        bad = sum(isinstance(outcome, ImageError) for outcome in outcomes)
        self.metrics.images.labels("answered").inc(len(outcomes) - bad)
        self.metrics.images.labels("bad").inc(bad)
        return cast(list[Outputs | ImageError], outcomes)

    async def run_all_files(self, names: Sequence[str], files: list[bytes]) -> list[Outputs]:
        """Return outputs ``(1, ...)`` for each encoded image, or raise the first `ImageError`."""
        answers = []
        for index, outcome in enumerate(await self.run_files(names, files)):
            if isinstance(outcome, ImageError):
                raise ImageError(f"Image {index} of {len(files)}: {outcome}")
            answers.append(outcome)
        return answers

    async def run_pixels(self, names: Sequence[str], images: Images) -> list[Outputs]:
        """Return outputs of the parts of ``(B, H, W, C)``."""
        height, width = images.shape[1:3]
        if height * width > self.predictor.max_pixels:
            raise ImageError(f"Images of {width}x{height} pixels are over the limit of {self.predictor.max_pixels}.")
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Outputs]] = []
        for start in range(0, len(images), self.max_batch):
            results.append(loop.create_future())
            self.batcher.submit(images[start : start + self.max_batch], names, results[-1])
        parts = await asyncio.gather(*results)
        self.metrics.images.labels("answered").inc(len(images))
        return parts

    def result(self, name: str | None, outcome: Outputs | ImageError, top: int, names: Sequence[str]) -> Result:
        """Return the answer for one image, with the ``top`` classes and the outputs in ``names``, and count it."""
        if isinstance(outcome, ImageError):
            return Result(name, error=str(outcome))
        # Use plain floats: NumPy would release the interpreter lock and then wait for it.
        (row,) = outcome[self.task.output].tolist()
        self.metrics.observe(self.task, row)
        outputs = {output: outcome[output][0].tolist() for output in names} or None
        if isinstance(self.task, MultiLabel):
            labels = [RankedClass(*item) for item in self.task.result(row).labels.items()]
            return Result(name, labels=labels, outputs=outputs)
        if not self.classes:
            return Result(name, angle=row[0], confidence=row[1], outputs=outputs)
        pairs = sorted(zip(row, self.classes, strict=True), key=itemgetter(0), reverse=True)[:top]
        ranked = [RankedClass(label, probability) for probability, label in pairs]
        return Result(name, ranked[0].label, ranked[0].probability, ranked if top > 1 else None, outputs=outputs)
