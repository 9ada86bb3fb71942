"""Dynamic batching: waiting images of one size are classified in one batch."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from upright.errors import UserError
from upright.images import MAX_BATCH_PIXELS

Images = npt.NDArray[np.uint8]
"""Decoded images of one size, ``(B, H, W, C)``."""
Rows = npt.NDArray[np.float32]
"""Probabilities, ``(B, K)``."""

log = logging.getLogger("upright.serve")


class Job(NamedTuple):
    """Images that wait for the model, the future of their `Rows`, and the time of their arrival."""

    images: Images
    result: "asyncio.Future[Rows]"
    since: float


class Queue:
    """Jobs of one image size, oldest first."""

    def __init__(self, height: int, width: int, max_batch: int) -> None:
        self.max_batch = max(1, min(max_batch, MAX_BATCH_PIXELS // (height * width)))
        self.jobs: deque[Job] = deque()
        self.images = 0

    @property
    def full(self) -> bool:
        return self.images >= self.max_batch

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.images += len(job.images)

    def take(self) -> list[Job]:
        """Remove and return a batch: as many of the oldest jobs as fit, at least one."""
        batch = [self.jobs.popleft()]
        count = len(batch[0].images)
        while self.jobs and count + len(self.jobs[0].images) <= self.max_batch:
            batch.append(self.jobs.popleft())
            count += len(batch[-1].images)
        self.images -= count
        return batch


class Batcher(threading.Thread):
    """A thread that runs the model on the jobs that arrived during its last run.

    Args:
        model: ``(B, H, W, C)`` -> `Rows`.
        max_batch: images per run; batches of large images are also limited by `MAX_BATCH_PIXELS`.
        max_delay: seconds that a job may wait for announced jobs while the model is idle.
        observe: function that gets the number of images and the seconds of every run.
    """

    def __init__(
        self,
        model: Callable[[Images], Rows],
        max_batch: int,
        max_delay: float,
        observe: Callable[[int, float], None],
    ) -> None:
        super().__init__(name="model", daemon=True)
        self.model, self.max_batch, self.max_delay, self.observe = model, max_batch, max_delay, observe
        self._queues: dict[tuple[int, ...], Queue] = {}
        self._pixels, self._announced, self._closed = 0, 0, False
        lock = threading.Lock()
        self._changed, self._room = threading.Condition(lock), threading.Condition(lock)

    def announce(self) -> None:
        """Announce calls of `submit`. The caller must call `arrived` after them."""
        with self._changed:
            self._announced += 1

    def arrived(self) -> None:
        """End an announcement, even if nothing was submitted."""
        with self._changed:
            self._announced -= 1
            if not self._announced:
                self._changed.notify()

    def submit(self, images: Images, result: "asyncio.Future[Rows]") -> None:
        """Queue ``(B, H, W, C)`` with at most ``max_batch`` images, without waiting."""
        with self._changed:
            shape = images.shape[1:]
            if shape not in self._queues:
                self._queues[shape] = Queue(shape[0], shape[1], self.max_batch)
            queue = self._queues[shape]
            queue.add(Job(images, result, time.monotonic()))
            self._pixels += images.size
            if not self._announced or len(queue.jobs) == 1 or queue.full:
                self._changed.notify()

    def wait_for_room(self) -> None:
        """Wait while too many decoded images are queued, so that a slow model does not fill the memory."""
        with self._room:
            self._room.wait_for(lambda: self._pixels < 4 * MAX_BATCH_PIXELS)

    def close(self) -> None:
        """Run the queued jobs, then stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        while jobs := self._next():
            # Skip jobs whose clients stopped waiting.
            if jobs := [job for job in jobs if not job.result.cancelled()]:
                outcome: Rows | Exception
                start, count = time.perf_counter(), sum(len(job.images) for job in jobs)
                try:
                    outcome = self.model(
                        jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
                    )
                except UserError as error:
                    outcome = error
                except Exception as error:  # the thread must not end; it reports any failure to every client
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
                for shape, queue in sorted(self._queues.items(), key=lambda item: item[1].jobs[0].since):
                    delay = queue.jobs[0].since + self.max_delay - now
                    if delay <= 0 or queue.full or not self._announced or self._closed:
                        jobs = queue.take()
                        if not queue.jobs:
                            del self._queues[shape]
                        self._pixels -= sum(job.images.size for job in jobs)
                        self._room.notify_all()
                        return jobs
                    timeout = delay if timeout is None else timeout
                if self._closed:
                    return []
                self._changed.wait(timeout)


def _deliver(jobs: list[Job], outcome: Rows | Exception) -> None:
    start = 0
    for job in jobs:
        if not job.result.done():
            if isinstance(outcome, Exception):
                job.result.set_exception(outcome)
            else:
                job.result.set_result(outcome[start : start + len(job.images)])
        start += len(job.images)
