"""Dynamic batching: waiting images of one size are classified in one batch."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.errors import UserError
from upright.images import MAX_BATCH_PIXELS

Images = npt.NDArray[np.uint8]  # decoded images of one size, `(B, H, W, C)`
Outputs = dict[str, npt.NDArray[Any]]  # outputs of the graph by name, each `(B, ...)`

log = logging.getLogger("upright.serve")


class Budget:
    """A number of pixels that may be in memory at the same time. Threads wait for their share, the first one first."""

    def __init__(self, pixels: int) -> None:
        self.free = self.pixels = pixels
        self._turn, self._changed = threading.Lock(), threading.Condition()

    def acquire(self, pixels: int) -> None:
        """Wait for a share. A share of more than the whole budget waits until no other share is taken."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self.free >= min(pixels, self.pixels))
            self.free -= pixels

    def release(self, pixels: int) -> None:
        with self._changed:
            self.free += pixels
            self._changed.notify_all()


class Job(NamedTuple):
    """Images of one size that wait for the model."""

    images: Images
    names: Sequence[str]  # outputs that the client wants
    result: "asyncio.Future[Outputs]"  # future of the outputs
    reserved: int  # pixels of the budget, which are released after the run
    since: float  # time of arrival


class Batcher(threading.Thread):
    """A thread that runs the model on the jobs that arrived during its last run.

    Args:
        model: function from ``(B, H, W, C)`` and names of outputs to `Outputs`.
        max_batch: images per run; batches of large images are also limited by `MAX_BATCH_PIXELS`.
        max_delay: seconds that a job may wait for announced jobs while the model is idle.
        observe: function that gets the number of images and the seconds of every run.
        budget: budget of the pixels of images in memory.
    """

    def __init__(
        self,
        model: Callable[[Images, Sequence[str]], Outputs],
        max_batch: int,
        max_delay: float,
        observe: Callable[[int, float], None],
        budget: Budget,
    ) -> None:
        super().__init__(name="model", daemon=True)
        self.model, self.max_batch, self.max_delay, self.observe = model, max_batch, max_delay, observe
        self.budget = budget
        self._queues: dict[tuple[int, ...], deque[Job]] = {}
        self._announced, self._closed = 0, False
        self._changed = threading.Condition()

    def announce(self) -> None:
        """Announce calls of `submit`. The caller must call `arrived` after them, even if nothing was submitted."""
        with self._changed:
            self._announced += 1

    def arrived(self) -> None:
        """End an announcement."""
        with self._changed:
            self._announced -= 1
            if not self._announced:
                self._changed.notify()

    def submit(
        self, images: Images, names: Sequence[str], result: "asyncio.Future[Outputs]", reserved: int = 0
    ) -> None:
        """Queue ``(B, H, W, C)`` with at most ``max_batch`` images, without waiting. `Job` explains the arguments."""
        with self._changed:
            queue = self._queues.setdefault(images.shape[1:], deque())
            queue.append(Job(images, names, result, reserved, time.monotonic()))
            if not self._announced or len(queue) == 1 or self._fills_a_batch(queue):
                self._changed.notify()

    def close(self) -> None:
        """Run the queued jobs, then stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Wait for a batch and run it. Return False if there is none, see `_next`."""
        jobs = self._next()
        # Skip jobs whose clients stopped waiting.
        if waiting := [job for job in jobs if not job.result.cancelled()]:
            self._run_batch(waiting)
        self.budget.release(sum(job.reserved for job in jobs))
        return bool(jobs)

    def _run_batch(self, jobs: list[Job]) -> None:
        outcome: Outputs | Exception
        start, count = time.perf_counter(), _count(jobs)
        names = sorted({name for job in jobs for name in job.names})
        try:
            images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
            outcome = self.model(images, names)
        except Exception as error:  # the thread must not end; it reports any failure to every client
            if not isinstance(error, UserError):
                log.exception("the model failed", extra={"fields": {"images": count}})
            outcome = error
        self.observe(count, time.perf_counter() - start)
        jobs[0].result.get_loop().call_soon_threadsafe(_deliver, jobs, outcome)

    def _next(self) -> list[Job]:
        """Wait for a batch and return it, or an empty list once the thread is closed and all queues are empty."""
        with self._changed:
            while True:
                now, timeout = time.monotonic(), None
                # Start with the oldest job, so that no size waits forever behind another size.
                for shape, queue in sorted(self._queues.items(), key=lambda item: item[1][0].since):
                    delay = queue[0].since + self.max_delay - now
                    if delay <= 0 or not self._announced or self._closed or self._fills_a_batch(queue):
                        jobs = self._take(queue)
                        if not queue:
                            del self._queues[shape]
                        return jobs
                    timeout = delay if timeout is None else timeout
                if self._closed:
                    return []
                self._changed.wait(timeout)

    def _batch_size(self, queue: deque[Job]) -> int:
        pixels: int = math.prod(queue[0].images.shape[1:3])
        return max(1, min(self.max_batch, MAX_BATCH_PIXELS // pixels))

    def _fills_a_batch(self, queue: deque[Job]) -> bool:
        size = self._batch_size(queue)
        return len(queue) >= size or _count(queue) >= size

    def _take(self, queue: deque[Job]) -> list[Job]:
        """Remove and return as many of the oldest jobs as fit into a batch, at least one."""
        room, jobs = self._batch_size(queue), list[Job]()
        while queue and (not jobs or len(queue[0].images) <= room):
            jobs.append(queue.popleft())
            room -= len(jobs[-1].images)
        return jobs


def _count(jobs: Iterable[Job]) -> int:
    return sum(len(job.images) for job in jobs)


def _deliver(jobs: list[Job], outcome: Outputs | Exception) -> None:
    start = 0
    for job in jobs:
        end = start + len(job.images)
        if isinstance(outcome, Exception):
            set_exception(job.result, outcome)
        elif not job.result.done():
            job.result.set_result({name: outcome[name][start:end] for name in job.names})
        start = end


def set_exception(result: "asyncio.Future[Outputs]", error: Exception) -> None:
    """Set the error of a future, unless its client stopped waiting."""
    if not result.done():
        result.set_exception(error)
