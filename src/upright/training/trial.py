"""``python -m upright.training.trial fit ...``: `upright`, which ends with the sweep that started it.

A sweep that is killed outright can stop nobody. Its end of this process's standard input closes with it, on every
system and without anybody's help, and that is the signal.
"""

import os
import runpy
import signal
import sys
import threading


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
