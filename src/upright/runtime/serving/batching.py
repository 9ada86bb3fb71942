"""Dynamic batching: images of one size that wait at the same time go through the model together."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from upright.images import MAX_BATCH_PIXELS, Pixels

Rows = npt.NDArray[np.float32]
"""Probabilities, ``(B, K)``."""


class Job(NamedTuple):
    """Images of one size, ``(B, H, W, C)``, and who waits for their `Rows`."""

    images: Pixels
    answer: "asyncio.Future[Rows]"
    since: float


class Waiting:
    """Jobs of one size, oldest first."""

    def __init__(self, height: int, width: int, max_batch: int) -> None:
        self.most = max(1, min(max_batch, MAX_BATCH_PIXELS // (height * width)))
        self.jobs: deque[Job] = deque()
        self.count = 0

    def add(self, job: Job) -> None:
        """At the end."""
        self.jobs.append(job)
        self.count += len(job.images)

    def take(self) -> list[Job]:
        """A batch: as many of the oldest as fit into it, at least one."""
        taken = [self.jobs.popleft()]
        count = len(taken[0].images)
        while self.jobs and count + len(self.jobs[0].images) <= self.most:
            taken.append(self.jobs.popleft())
            count += len(taken[-1].images)
        self.count -= count
        return taken


class Batcher(threading.Thread):
    """One thread that runs the model, on what came while it ran.

    Args:
        model: ``(B, H, W, C)`` -> `Rows`.
        max_batch: images per run; large ones are cut at `MAX_BATCH_PIXELS` as well.
        max_delay: seconds that a job may wait for others that are announced, while the model has nothing else to do.
        observe: is told the images and the seconds of every run.
    """

    def __init__(
        self,
        model: Callable[[Pixels], Rows],
        max_batch: int,
        max_delay: float,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        super().__init__(name="model", daemon=True)
        self.model, self.max_batch, self.max_delay, self.observe = model, max_batch, max_delay, observe
        self._waiting: dict[tuple[int, ...], Waiting] = {}
        self._pixels, self._coming, self._closed = 0, 0, False
        lock = threading.Lock()
        self._came, self._went = threading.Condition(lock), threading.Condition(lock)

    def announce(self) -> None:
        """Something will be submitted soon, and `arrived` called then."""
        with self._came:
            self._coming += 1

    def arrived(self) -> None:
        """What was announced was submitted, or never will be."""
        with self._came:
            self._coming -= 1
            if not self._coming:
                self._came.notify()

    def submit(self, images: Pixels, answer: "asyncio.Future[Rows]") -> None:
        """Take ``(B, H, W, C)`` with at most ``max_batch`` images; never waits."""
        with self._came:
            shape = images.shape[1:]
            waiting = self._waiting.get(shape) or self._waiting.setdefault(
                shape, Waiting(shape[0], shape[1], self.max_batch)
            )
            waiting.add(Job(images, answer, time.monotonic()))
            self._pixels += images.size
            if not self._coming or len(waiting.jobs) == 1 or waiting.count >= waiting.most:
                self._came.notify()

    def wait_for_room(self) -> None:
        """Let who decodes wait, so that decoded pictures do not pile up before a slow model."""
        with self._went:
            self._went.wait_for(lambda: self._pixels < 4 * MAX_BATCH_PIXELS)

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._came:
            self._closed = True
            self._came.notify()
        self.join()

    def run(self) -> None:
        """Until it is closed; see ``Thread``."""
        while jobs := self._next():
            # Who stopped waiting costs nothing more.
            if jobs := [job for job in jobs if not job.answer.cancelled()]:
                rows: Rows | Exception
                start, count = time.perf_counter(), sum(len(job.images) for job in jobs)
                try:
                    rows = self.model(
                        jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
                    )
                except Exception as error:  # whatever it is, this thread goes on, and who waits is told
                    rows = error
                self.observe(count, time.perf_counter() - start)
                jobs[0].answer.get_loop().call_soon_threadsafe(_deliver, jobs, rows)

    def _next(self) -> list[Job]:
        with self._came:
            while True:
                now, soonest = time.monotonic(), None
                # The oldest first, so that no size starves behind another.
                for shape, waiting in sorted(self._waiting.items(), key=lambda item: item[1].jobs[0].since):
                    left = waiting.jobs[0].since + self.max_delay - now
                    if left <= 0 or waiting.count >= waiting.most or not self._coming or self._closed:
                        jobs = waiting.take()
                        if not waiting.jobs:
                            del self._waiting[shape]
                        self._pixels -= sum(job.images.size for job in jobs)
                        self._went.notify_all()
                        return jobs
                    soonest = left if soonest is None else soonest
                if self._closed:
                    return []
                self._came.wait(soonest)


def _deliver(jobs: list[Job], rows: Rows | Exception) -> None:
    start = 0
    for job in jobs:
        if not job.answer.done():
            if isinstance(rows, Exception):
                job.answer.set_exception(rows)
            else:
                job.answer.set_result(rows[start : start + len(job.images)])
        start += len(job.images)
