"""Command line, tables and timing for all benchmarks."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UPRIGHT = [sys.executable, "-m", "upright"]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--quick``, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size: it shows that the benchmark runs")
    return parser


def row(*cells: object) -> str:
    """Print a row of a table in Markdown, and return it."""
    line = f"| {' | '.join(map(str, cells))} |"
    print(line, flush=True)
    return line


def heading(*columns: object) -> None:
    """Print the heading of a table."""
    row(*columns)
    row(*["---"] * len(columns))


def ratio(middle: float, low: float, high: float) -> str:
    """Return a median ratio with its range."""
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def quartiles(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Return the median and the quartiles of the ratios in each round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(numerators, denominators, strict=True)], n=4)
    return ratio(middle, low, high)


def milliseconds(work: Callable[[], object], seconds: float) -> float:
    """Return the median milliseconds of a call, over at least one call and at least ``seconds`` in total."""
    work()
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
