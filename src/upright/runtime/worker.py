"""A process that loads one runtime, to measure its cold start, predictions, speed and memory.

The process imports only the packages of this runtime, so other runtimes do not add to its time and memory. For OpenVINO
it also imports onnxruntime, like `upright infer`.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from upright.errors import UprightError, UserError
from upright.images import decode
from upright.options import Engine
from upright.runtime.bundle import Bundle
from upright.runtime.speed import turn

LoadedModel = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""A function from images ``(B, H, W, C)`` to the main output ``(B, columns)`` of the graph, see `Task`."""


class Worker:
    """Start a process that loads a runtime and runs it on the first image.

    ``load`` is ``module:function``. The function gets ``arguments``, plain data, and returns a `LoadedModel`.

    Raises:
        UserError: if the function raises one.
        RuntimeError: if the process ends for another reason.
    """

    def __init__(self, load: str, arguments: Mapping[str, Any], bundle: Bundle) -> None:
        settings = {"load": load, "arguments": dict(arguments), "bundle": str(bundle.folder)}
        start = perf_counter()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "upright.runtime.worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.memory: int | None = self._reply()
            """Peak memory of the process so far, in bytes; None if the system does not report it."""
        except Exception:
            self.__exit__()
            raise
        self.seconds = perf_counter() - start
        """Time from the start of the process to the first prediction."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._log.close()

    def rows(self) -> npt.NDArray[np.float32]:
        """Return the main output for the samples, ``(N, columns)``. Call this method once, before `turn`."""
        return np.array(self._reply(), dtype=np.float32)

    def turn(self, batch: int) -> list[float]:
        """Run batches of copies of the first sample for one turn, see `speed.turn`."""
        print(batch, file=self._process.stdin, flush=True)
        seconds, self.memory = self._reply()
        return list(seconds)

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last_line = (self._log.read().strip().splitlines() or ["no message"])[-1]
        if code == UserError.exit_code:
            raise UserError(last_line)
        raise RuntimeError(f"its process ended with {code}: {last_line[:300]}")


def predictor(bundle: str, precision: str, engine: Engine, threads: int) -> LoadedModel:
    """Load a bundle in an engine, with all the checks of `upright infer`."""
    from upright.runtime.predictor import open_predictor

    return open_predictor(bundle, precision, threads=threads, engine=engine).run


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes, or None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage is no substitute: in a child process it starts at the parent's peak.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def main() -> None:
    """Read the settings from the argument and batch sizes from standard input. Print the replies."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep messages of libraries out of the replies
    try:
        _work(**json.loads(sys.argv[1]), reply=lambda content: print(json.dumps(content), file=replies, flush=True))
    except UprightError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _work(load: str, arguments: dict[str, Any], bundle: str, reply: Callable[[Any], None]) -> None:
    module, _, name = load.partition(":")
    run: LoadedModel = getattr(importlib.import_module(module), name)(**arguments)
    opened = Bundle(Path(bundle))
    samples, smallest_batch = opened.sample_files, opened.fixed_batch or 1

    def copies(sample: Path | bytes, count: int) -> npt.NDArray[np.uint8]:
        return np.repeat(decode(sample, opened.spec)[None], count, axis=0)

    run(copies(samples[0], smallest_batch))
    reply(peak_memory())
    reply([run(copies(sample, smallest_batch))[0].tolist() for sample in samples])
    for line in sys.stdin:
        images = copies(samples[0], int(line))
        reply((turn(partial(run, images)), peak_memory()))


if __name__ == "__main__":
    main()
