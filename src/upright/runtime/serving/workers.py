"""Several processes behind one port. Each has the bundle in memory, and accepts connections from the same socket."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory

from prometheus_client.multiprocess import mark_process_dead

from upright.errors import EngineError
from upright.runtime.serving.batching import log
from upright.runtime.serving.metrics import SHARED_FOLDER

POLL_SECONDS = 0.1
RESTART_SECONDS = 1
Work = Callable[[Callable[[], None]], None]
"""A function that serves until a signal. It calls its argument when it is ready."""


@dataclass(eq=False)
class Worker:
    """A process, and the pipe from it. The process sends None when it is ready, or the error that prevents this."""

    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    stale: bool = False  # true if the process must read the bundle again as soon as it is ready

    def reload(self) -> None:
        self.stale = not self.ready  # a signal would end a process that does not handle it yet
        if self.ready and self.process.pid:
            os.kill(self.process.pid, signal.SIGHUP)


class Workers:
    """Processes that do the same work, which must be picklable. A process that ends is replaced."""

    def __init__(self, work: Work, count: int) -> None:
        self.work, self.count = work, count
        self.workers: list[Worker] = []
        self.served, self.stopping = False, False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, and pass SIGHUP on. The first worker must be ready before others start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))
        signal.signal(signal.SIGHUP, self._reload)
        with TemporaryDirectory(prefix="upright-metrics-") as folder:
            os.environ[SHARED_FOLDER] = folder
            try:
                while not self.stopping:
                    while len(self.workers) < (self.count if self.served else 1):
                        self._start()
                    time.sleep(POLL_SECONDS)
                    for worker in list(self.workers):
                        self._check(worker)
            finally:
                for worker in self.workers:
                    worker.process.terminate()
                for worker in self.workers:
                    worker.process.join()
                del os.environ[SHARED_FOLDER]

    def _reload(self, *_: object) -> None:
        for worker in self.workers:
            worker.reload()

    def _start(self) -> None:
        context = get_context("spawn")
        pipe, end = context.Pipe()
        process = context.Process(target=_run, args=(self.work, end))
        # Ctrl-C reaches the new process, too. It would end in a traceback until the server handles it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.start()
        signal.signal(signal.SIGINT, handler)
        end.close()
        self.workers.append(Worker(process, pipe))

    def _check(self, worker: Worker) -> None:
        """Read what a worker sends, and remove it if it has ended."""
        error: Exception | None = None
        with suppress(EOFError, OSError):
            if worker.pipe.poll():
                error = worker.pipe.recv()
                worker.ready = error is None
                if worker.stale:
                    worker.reload()
        self.served = self.served or worker.ready
        if worker.process.exitcode is None and error is None:
            return
        worker.process.join()
        self.workers.remove(worker)
        mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
        if not self.served:
            raise error or EngineError(f"The worker ended with exit code {worker.process.exitcode}; see its log.")
        fields = {"pid": worker.process.pid, "exit_code": worker.process.exitcode, "error": error and str(error)}
        log.error("worker ended", extra={"fields": fields})
        time.sleep(RESTART_SECONDS)


def _run(work: Work, pipe: Connection) -> None:
    """Do the work of one process."""
    threading.Thread(target=_stop_with_parent, args=(pipe,), daemon=True).start()
    try:
        work(lambda: pipe.send(None))
    except Exception as error:
        pipe.send(error)
    if (parent := parent_process()) and not parent.is_alive():
        shutil.rmtree(os.environ[SHARED_FOLDER], ignore_errors=True)


def _stop_with_parent(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()  # the parent sends nothing, so this returns when it ends
    os.kill(os.getpid(), signal.SIGTERM)
