"""``upright benchmark``: how fast a bundle is on this machine, beside what else could run it, in one table."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from upright.errors import UserError
from upright.files import replacing_file, write_text
from upright.runtime.bundle import Bundle
from upright.runtime.speed import machine, side_by_side
from upright.runtime.worker import Worker
from upright.tables import markdown

BATCHES = (1, 8, 64)
STARTS = 3
"""Fresh processes, of whose cold starts the median is told."""


@dataclass(frozen=True)
class Runtime:
    """What can run the network of a bundle.

    Args:
        name: for the table.
        package: that brings it.
        load: see `Worker`.
        arguments: of ``load``, beside ``threads``.
        file: what it loads.
    """

    name: str
    package: str
    load: str
    arguments: dict[str, Any]
    file: Path


@dataclass(frozen=True)
class Row:
    """One runtime at one batch, on so many threads."""

    runtime: str
    threads: int
    batch: int
    p50_milliseconds: float
    p95_milliseconds: float
    images_per_second: float
    times_fp32: float
    quartiles: tuple[float, float]
    bytes: int
    agreement: str
    largest_difference: float
    peak_memory: int | None
    cold_seconds: float
    cold_memory: int | None


LEGEND = """
- Every runtime in a process of its own; they have their turns one after the other, round by round.
- p50, p95: of one run with the whole batch, from decoded uint8 images to probabilities. x fp32: times as fast as ONNX
  Runtime in fp32, the median of the rounds' ratios and their quartiles.
- agree: samples of the bundle whose first class is that of ONNX Runtime in fp32, and the largest difference of a
  probability.
- peak: memory of the process, up to this batch. cold: from the start of a process to the answer for one image, and the
  memory taken by then; the median of {starts} starts."""


def benchmark(
    bundle: str,
    checkpoint: str | None = None,
    batches: Sequence[int] | None = None,
    threads: Sequence[int] = (1,),
    to: str | None = None,
) -> int:
    """Print the table as Markdown, and write it with JSON and a picture if there is a folder for them.

    Args:
        bundle: the folder of a bundle.
        checkpoint: that it was exported from; adds PyTorch, eager and compiled.
        batches: how many images at once; 1, 8 and 64, or what the bundle takes, by default.
        threads: that one run may use, a part of the table for each.
        to: a folder.

    Raises:
        UserError: if the bundle is damaged, the checkpoint is of another run, or a number does not fit.
    """
    opened = Bundle.open(bundle)
    fixed = _fixed_batch(opened)
    batches = sorted(set(batches or ([fixed] if fixed else BATCHES)))
    if min(*batches, *threads) < 1:
        raise UserError(f"--batches and --threads must be at least 1, got {min(*batches, *threads)}.")
    if fixed and batches != [fixed]:
        raise UserError(f"Bundle '{bundle}' takes {fixed} images at once and no other number; leave --batches out.")
    if checkpoint and not find_spec("torch"):
        raise UserError("--checkpoint needs the package 'torch': pip install 'upright[train]'.")
    if checkpoint and not Path(checkpoint).exists():
        raise UserError(f"Checkpoint '{checkpoint}' does not exist.")
    runtimes = find_runtimes(opened, checkpoint)
    rows, missing = list[Row](), dict[str, str]()
    for count in dict.fromkeys(threads):
        found, failed = _measure(opened, runtimes, batches, count)
        rows += found
        missing |= failed
    here = machine() | {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    packages = dict.fromkeys(["upright", *(runtime.package for runtime in runtimes)])
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    report = {
        "bundle": opened.manifest["name"],
        "machine": here,
        "versions": versions,
        "rows": [asdict(row) for row in rows],
        "not_measured": missing,
    }
    text = _markdown(report, rows)
    print(text)
    if to:
        folder = Path(to)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "benchmark.md", text + "\n")
        write_text(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")
        if find_spec("matplotlib"):
            _draw(rows, folder / "benchmark.png")
        else:
            print("No picture: it needs the package 'matplotlib': pip install 'upright[train]'.", file=sys.stderr)
    return 0


def _fixed_batch(bundle: Bundle) -> int | None:
    batch = bundle.manifest["input"]["shape"][0]
    return batch if isinstance(batch, int) else None


def find_runtimes(bundle: Bundle, checkpoint: str | None) -> list[Runtime]:
    """Those that are installed; ONNX Runtime in fp32 first."""
    folder, here = str(bundle.folder), "upright.runtime.worker"
    models = {precision: bundle.model(precision) for precision in bundle.precisions}
    found = [
        Runtime(
            f"ONNX Runtime {name}",
            "onnxruntime",
            f"{here}:onnx_runtime",
            {"bundle": folder, "precision": name},
            path,
        )
        for name, path in models.items()
    ]
    if find_spec("openvino"):
        found += [
            Runtime(f"OpenVINO {name}", "openvino", f"{here}:openvino", {"model": str(path)}, path)
            for name, path in models.items()
        ]
    if checkpoint:
        path = Path(checkpoint) / "best.ckpt" if Path(checkpoint).is_dir() else Path(checkpoint)
        found += [
            Runtime(
                f"PyTorch {'compiled' if compiled else 'eager'}",
                "torch",
                "upright.exporting.eager:pytorch",
                {"bundle": folder, "checkpoint": checkpoint, "compiled": compiled},
                path,
            )
            for compiled in (False, True)
        ]
    return found


def _measure(
    bundle: Bundle, runtimes: Sequence[Runtime], batches: Sequence[int], threads: int
) -> tuple[list[Row], dict[str, str]]:
    """Rows, and why there are none of some runtimes."""
    pictures = [bundle.folder / sample["file"] for sample in bundle.samples]
    rows, missing = list[Row](), dict[str, str]()
    workers: dict[str, Worker] = {}
    cold: dict[str, tuple[float, int | None]] = {}
    with ExitStack() as stack:
        for runtime in runtimes:
            print(f"Starting {runtime.name} ({threads} thread{'s' * (threads > 1)}) ...", file=sys.stderr, flush=True)
            start = partial(
                Worker,
                runtime.load,
                runtime.arguments | {"threads": threads},
                bundle.spec,
                pictures,
                _fixed_batch(bundle) or 1,
            )
            seconds = []
            try:
                for _ in range(STARTS - 1):
                    with start() as worker:
                        seconds.append(worker.seconds)
                worker = stack.enter_context(start())
            except RuntimeError as error:
                missing[runtime.name] = str(error)
                continue
            workers[runtime.name] = worker
            cold[runtime.name] = (median([*seconds, worker.seconds]), worker.memory)
        said = {name: worker.probabilities() for name, worker in workers.items()}
        reference = said[runtimes[0].name]
        for batch in batches:
            print(f"Timing batches of {batch} ...", file=sys.stderr, flush=True)
            speeds = side_by_side({name: partial(worker.turn, batch) for name, worker in workers.items()})
            for runtime in runtimes:
                if not (speed := speeds.get(runtime.name)):
                    continue
                found = said[runtime.name]
                same = int((found.argmax(axis=1) == reference.argmax(axis=1)).sum())
                row = Row(
                    runtime=runtime.name,
                    threads=threads,
                    batch=batch,
                    p50_milliseconds=speed.p50,
                    p95_milliseconds=speed.p95,
                    images_per_second=batch * speed.per_second,
                    times_fp32=speed.times,
                    quartiles=speed.quartiles,
                    bytes=runtime.file.stat().st_size,
                    agreement=f"{same}/{len(found)}",
                    largest_difference=float(np.abs(found - reference).max()),
                    peak_memory=workers[runtime.name].memory,
                    cold_seconds=cold[runtime.name][0],
                    cold_memory=cold[runtime.name][1],
                )
                rows.append(row)
    return rows, missing


HEAD = (
    "runtime",
    "threads",
    "batch",
    "p50, ms",
    "p95, ms",
    "images/s",
    "x fp32",
    "file, kB",
    "agree",
    "peak, MB",
    "cold, s",
    "cold, MB",
)


def _markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    def megabytes(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.0f}"

    table: list[Sequence[str]] = [HEAD]
    for row in rows:
        low, high = row.quartiles
        cells = [
            row.runtime,
            str(row.threads),
            str(row.batch),
            f"{row.p50_milliseconds:.3f}",
            f"{row.p95_milliseconds:.3f}",
            f"{row.images_per_second:,.0f}",
            f"{row.times_fp32:.2f} ({low:.2f} to {high:.2f})",
            f"{row.bytes / 1000:.0f}",
            f"{row.agreement}, {row.largest_difference:.0e}",
            megabytes(row.peak_memory),
            f"{row.cold_seconds:.2f}",
            megabytes(row.cold_memory),
        ]
        table.append(cells)
    here = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"# {report['bundle']}", "", markdown(table, numbers=len(HEAD) - 1)]
    lines += [f"{here['processor']} ({', '.join(here['instructions'])}), {here['cores']} cores, {here['system']};"]
    lines += [f"{versions}."]
    lines += [f"- {name} was not measured: {reason}" for name, reason in report["not_measured"].items()]
    return "\n".join(lines) + "\n" + LEGEND.format(starts=STARTS)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Images per second by batch, a panel for each number of threads."""
    from matplotlib.figure import Figure

    threads = list(dict.fromkeys(row.threads for row in rows))
    figure = Figure(figsize=(1 + 5 * len(threads), 4.5), layout="constrained")
    panels = figure.subplots(1, len(threads), sharey=True, squeeze=False)[0]
    for panel, count in zip(panels, threads, strict=True):
        for name in dict.fromkeys(row.runtime for row in rows):
            mine = [row for row in rows if (row.runtime, row.threads) == (name, count)]
            panel.plot([row.batch for row in mine], [row.images_per_second for row in mine], "o-", label=name)
        panel.set(xscale="log", xlabel="batch", title=f"{count} thread{'s' * (count > 1)}")
        batches = sorted({row.batch for row in rows})
        panel.set_xticks(batches, labels=[str(batch) for batch in batches])
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("images per second")
    panels[0].legend(fontsize=8)
    with replacing_file(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
