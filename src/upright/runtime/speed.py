"""How fast several ways to the same answer are on this machine, side by side."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 9
SECONDS = 0.1
"""One turn of one of them in a round, at least one run."""

Turn = Callable[[], list[float]]
"""Has a turn and gives the seconds of each of its runs."""


class Speed(NamedTuple):
    """Of one among several.

    Args:
        p50: milliseconds of a run, the median of all.
        p95: and what 95 of 100 stay within.
        per_second: runs.
        times: how many times as fast as the first of them, the median of the rounds' ratios.
        quartiles: of those ratios, the lower and the upper one.
    """

    p50: float
    p95: float
    per_second: float
    times: float
    quartiles: tuple[float, float]


def turn(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Run it for `SECONDS`, and at least once; the seconds of each run.

    Args:
        run: what is timed.
        clock: of one thread better `time.process_time`, which stands still while others have the core: a busy machine
            makes a run of many milliseconds slower, and a short one not (12 processes on 2 cores: LeNet in batches of
            64 was 21 times as fast as PyTorch).
    """
    start = before = clock()
    seconds: list[float] = []
    while not seconds or before - start < SECONDS:
        run()
        now = clock()
        seconds.append(now - before)
        before = now
    return seconds


def side_by_side(turns: Mapping[str, Turn]) -> dict[str, Speed]:
    """Let them have their turns one after the other, round by round: what disturbs one disturbs all.

    Args:
        turns: by name; the first one is what the others are measured by.
    """
    # The first round warms up.
    rounds = [[one() for one in turns.values()] for _ in range(1 + ROUNDS)][1:]
    typical = np.array([[np.median(seconds) for seconds in row] for row in rounds])
    low, times, high = np.quantile(typical[:, :1] / typical, [0.25, 0.5, 0.75], axis=0)
    found = {}
    for i, name in enumerate(turns):
        seconds = np.concatenate([row[i] for row in rounds])
        p50, p95 = 1000 * np.quantile(seconds, [0.5, 0.95])
        quartiles = (float(low[i]), float(high[i]))
        found[name] = Speed(float(p50), float(p95), len(seconds) / float(seconds.sum()), float(times[i]), quartiles)
    return found


def machine() -> dict[str, Any]:
    """What speeds are measured on."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    told = [
        name for name in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm") if name in flags
    ]
    return {"processor": model, "instructions": told}
