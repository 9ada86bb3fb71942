"""The process of a trial: ``python -m upright.runs.sweeping.trial fit ...``.

It is ``upright``, except that it ends with the sweep that started it. A killed sweep cannot stop its trial, but the
system then closes the pipe to the trial's standard input, which makes the trial end.
"""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

COMMAND = (sys.executable, "-m", "upright.runs.sweeping.trial", "fit")
GRACE_SECONDS = 20


@contextmanager
def running(command: Sequence[str], log: Path, group: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process of a trial, in a W&B group. At the end of the ``with`` it and all its children have ended."""
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"WANDB_RUN_GROUP": group, **os.environ},
            # Ctrl-C reaches the sweep alone, which then stops the trial. A session can be killed as a whole.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin
        process.stdin.close()


def failure(code: int, log: Path) -> str:
    """Return the reason why a trial failed, in one line."""
    if code < 0:
        hint = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line and not line.startswith("$ ")), f"exit code {code}")
    return last.removeprefix("upright: error: ")


def end_with_parent() -> None:
    """Kill this process and its children as soon as its standard input is closed."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    # Run by name, because this file must not import the commands.
    runpy.run_module("upright", run_name="__main__")
