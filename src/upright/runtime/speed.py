"""Speed of several implementations on this machine, measured side by side."""

import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upright.images import Pixels

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ROUNDS = 9
TURN_SECONDS = 0.1
BATCHES = (1, 64)  # batch sizes of `speeds_by_batch`
INSTRUCTIONS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"),
    *("avx512_bf16", "amx_bf16", "bf16"),
)
"""Instructions for wide vectors, for products of 8 bits, and for bfloat16."""

Turn = Callable[[], list[float]]
"""A function that runs one implementation for one turn, and returns the seconds of each call."""


class Speed(NamedTuple):
    """Speed of one implementation."""

    p50: float  # median of all calls, in milliseconds
    p95: float  # 95th percentile of all calls, in milliseconds
    per_second: float  # calls per second
    times: float  # speed relative to the first implementation: the median of the ratios of all rounds
    quartiles: tuple[float, float]  # lower and upper quartile of these ratios


def turn(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Call ``run`` for `TURN_SECONDS`, at least once. Return the seconds of each call.

    Use the clock `time.process_time` if the function has one thread: it excludes the time of other processes. On a busy
    machine these interrupt long calls more than short ones (12 processes on 2 cores: LeNet in batches of 64 seemed 21
    times as fast as PyTorch).
    """
    start = before = clock()
    seconds: list[float] = []
    while not seconds or before - start < TURN_SECONDS:
        run()
        now = clock()
        seconds.append(now - before)
        before = now
    return seconds


def side_by_side(turns: Mapping[str, Turn]) -> dict[str, Speed]:
    """Time implementations by turns, and compare them with the first one.

    Every round has one turn of each, so a disturbance affects all of them.
    """
    # The first round is a warm-up.
    rounds = [[one() for one in turns.values()] for _ in range(1 + ROUNDS)][1:]
    medians = np.array([[np.median(seconds) for seconds in row] for row in rounds])
    low, times, high = np.quantile(medians[:, :1] / medians, [0.25, 0.5, 0.75], axis=0).tolist()
    speeds = {}
    for i, name in enumerate(turns):
        seconds = np.concatenate([row[i] for row in rounds])
        p50, p95 = (1000 * np.quantile(seconds, [0.5, 0.95])).tolist()
        speeds[name] = Speed(p50, p95, len(seconds) / float(seconds.sum()), times[i], (low[i], high[i]))
    return speeds


def speeds_by_batch(sessions: "Mapping[str, InferenceSession]", image: Pixels) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the speed of each session by batch size, in processor time, relative to the first session.

    The sessions have one thread. Batches are copies of ``image`` ``(H, W, C)``.
    """
    from upright.runtime.predictor import fixed_batch, run_batch  # other runtimes do not need onnxruntime

    speeds: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in sessions}
    only = fixed_batch(next(iter(sessions.values())))
    for batch in [only] if only else BATCHES:
        images = np.repeat(image[None], batch, axis=0)
        turns = {
            name: partial(turn, partial(run_batch, session, images), time.process_time)
            for name, session in sessions.items()
        }
        for name, speed in side_by_side(turns).items():
            values = {"milliseconds": speed.p50, "times_fp32": speed.times, "quartiles": list(speed.quartiles)}
            speeds[name][str(batch)] = values
    return speeds


def machine() -> dict[str, Any]:
    """Return the name of the processor, and those of its instructions that affect speed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    processor = facts.get("model name") or platform.processor() or platform.machine()
    return {"processor": processor, "instructions": [name for name in INSTRUCTIONS if name in flags]}
