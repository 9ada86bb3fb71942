"""A trial as a process: how a sweep starts one, and what that runs, ``python -m upright.runs.sweeping.trial fit``.

The latter is `upright` that ends with the sweep that started it. A sweep that is killed outright can stop nobody. Its
end of this process's standard input closes with it, on every system and without anybody's help, and that is the signal.
"""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMMAND = (sys.executable, "-m", "upright.runs.sweeping.trial", "fit")
GRACE = 20  # seconds that a trial has to end by itself


@contextmanager
def started(command: list[str], log: Path, group: str) -> Iterator[subprocess.Popen[bytes]]:
    """A trial's process and all that it starts, which have ended afterwards.

    Args:
        command: what it runs.
        log: where to write what it says.
        group: of W&B's runs, the sweep's name.
    """
    # W&B shows the trials of a sweep together.
    environment = {"WANDB_RUN_GROUP": group, **os.environ}
    with open(log, "wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            # Never written to: see `end_with_parent`.
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C is for the sweep, which stops the trial; and a group can be ended as one.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin
        process.stdin.close()


def log_of(folder: Path) -> Path:
    """Where a trial's log lies until it has ended: beside its folder, which `upright fit` makes itself."""
    return folder.with_name(f"{folder.name}.log")


def keep_log(folder: Path) -> None:
    """Put the log of a trial that has ended into its folder."""
    if log_of(folder).exists():
        folder.mkdir(exist_ok=True)
        os.replace(log_of(folder), folder / "log.txt")


def last_words(code: int, log: Path) -> str:
    """Why a trial failed, in one line."""
    if code < 0:
        hint = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    last = next((line for line in reversed(lines) if line), f"exit code {code}, without a word")
    return last.removeprefix("upright: error: ")


def end_with_parent() -> None:
    """End this process and all that it started, at once, as soon as its standard input is closed."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    # Found by its name: nothing here may import the verbs.
    runpy.run_module("upright", run_name="__main__")
    sys.exit()
