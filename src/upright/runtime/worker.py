"""A process that holds one runtime alone: its cold start, its answers, its speed and its memory.

Only what that runtime needs is imported there, so that no other one's time and memory are counted with it.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from upright.errors import UprightError, UserError
from upright.images import ImageSpec, decode
from upright.runtime.speed import turn

Run = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""A loaded model: images ``(B, H, W, C)`` to probabilities ``(B, K)``."""


class Worker:
    """Start the process, load the runtime, and let it answer the first picture.

    Args:
        load: ``module:function`` of what gives a `Run`.
        arguments: of that function, plain data.
        spec: what a picture is.
        pictures: files that can be asked for.
        batch: how many images the model takes at least.

    Raises:
        UserError: what the function raises.
        RuntimeError: if anything else goes wrong there.
    """

    seconds: float
    """From the start of the process to the first answer."""
    memory: int | None
    """Bytes that the process had taken at most by then; None where the system does not say."""

    def __init__(
        self, load: str, arguments: Mapping[str, Any], spec: ImageSpec, pictures: Sequence[Path], batch: int = 1
    ) -> None:
        order = {"load": load, "arguments": dict(arguments), "spec": spec.to_dict(), "batch": batch}
        order["pictures"] = [str(path) for path in pictures]
        start = perf_counter()
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "upright.runtime.worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        try:
            ready = self._answer()
        except Exception:
            self.__exit__()
            raise
        self.seconds, self.memory = perf_counter() - start, ready["memory"]

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.communicate()
        self._said.close()

    def probabilities(self) -> npt.NDArray[np.float32]:
        """What it says of each picture, ``(N, K)``."""
        return np.array(self._ask({"what": "probabilities"})["probabilities"], dtype=np.float32)

    def turn(self, batch: int) -> list[float]:
        """Seconds of each run with so many copies of the first picture, see `speed.turn`."""
        answer = self._ask({"what": "turn", "batch": batch})
        self.memory = answer["memory"]
        seconds: list[float] = answer["seconds"]
        return seconds

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["without a word"])[-1]
            raise RuntimeError(f"its process ended with {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def onnx_runtime(bundle: str, precision: str, threads: int) -> Run:
    """A bundle as `upright infer` opens it, hashes and all."""
    from upright.runtime.predictor import Predictor, run_batch

    session = Predictor(bundle, precision, threads=threads).session
    return lambda images: run_batch(session, images)[0]


def openvino(model: str, threads: int) -> Run:
    """An ONNX file on the processor, as OpenVINO runs it if it is not told otherwise."""
    from openvino import Core

    compiled = Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    output = compiled.output("probabilities")

    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        probabilities: npt.NDArray[np.float32] = compiled({"images": images})[output]
        return probabilities

    return run


def peak_memory() -> int | None:
    """Bytes that this process has taken at most; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: what that says of a child begins with what its parent had taken.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def main() -> None:
    """In the process: told on its command line, asked on standard input, answers on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        _work(json.loads(sys.argv[1]), say)
    except UprightError as error:
        say(mistake=str(error))
    except Exception as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _work(order: dict[str, Any], say: Callable[..., None]) -> None:
    module, _, name = order["load"].partition(":")
    run: Run = getattr(importlib.import_module(module), name)(**order["arguments"])
    spec = ImageSpec.from_dict(order["spec"])

    def copies(picture: str, count: int) -> npt.NDArray[np.uint8]:
        return np.repeat(decode(picture, spec)[None], count, axis=0)

    first, *_ = pictures = order["pictures"]
    run(copies(first, order["batch"]))
    say(memory=peak_memory())
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "probabilities":
            rows = [run(copies(picture, order["batch"]))[0].tolist() for picture in pictures]
            say(probabilities=rows)
        else:
            images = copies(first, asked["batch"])
            say(seconds=turn(partial(run, images)), memory=peak_memory())


if __name__ == "__main__":
    main()
