"""How fast several precisions of one network are on this machine, side by side."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from upright.runtime.predictor import open_session

BATCHES = (1, 64)
ROUNDS = 9
SECONDS = 0.1
"""One precision's turn in a round, at least one run."""


def side_by_side(models: Mapping[str, Path], image: npt.NDArray[np.uint8], batches: Sequence[int]) -> dict[str, Any]:
    """Time the models in turns, on one thread, so that what disturbs one disturbs all.

    Args:
        models: the first one is what the others are measured by.
        image: ``(H, W, C)``.
        batches: how many copies of it go through at once.

    Returns:
        Milliseconds per batch, the median of all rounds, and how many times as fast as the first one, the median of the
        rounds' ratios with their quartiles.
    """
    sessions = {name: open_session(path, threads=1) for name, path in models.items()}
    found: dict[str, Any] = {name: {} for name in sessions}
    for batch in batches:
        images = np.repeat(image[None], batch, axis=0)
        rounds = np.array(
            [[_milliseconds(session, images) for session in sessions.values()] for _ in range(1 + ROUNDS)]
        )[1:]
        low, ratios, high = np.quantile(rounds[:, :1] / rounds, [0.25, 0.5, 0.75], axis=0)
        for i, name in enumerate(sessions):
            found[name][str(batch)] = {
                "milliseconds": float(np.median(rounds[:, i])),
                "times_fp32": float(ratios[i]),
                "quartiles": [float(low[i]), float(high[i])],
            }
    return found


def _milliseconds(session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8]) -> float:
    start, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - start < SECONDS:
        session.run(["probabilities"], {"images": images})
        runs += 1
    return 1000 * (time.perf_counter() - start) / runs


def machine() -> dict[str, Any]:
    """What the speeds were measured on."""
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
    return {"processor": model, "instructions": told, "threads": 1}
