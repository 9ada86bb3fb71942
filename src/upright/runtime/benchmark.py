"""``upright benchmark``: measure the speed of a bundle on this machine, in all installed runtimes."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from upright.errors import UserError
from upright.files import replacing_file, write_text
from upright.options import Benchmark
from upright.runtime.bundle import Bundle
from upright.runtime.openvino import check_installed
from upright.runtime.speed import machine, side_by_side
from upright.runtime.task import OrientationEstimation, Rows, Task
from upright.runtime.worker import Worker
from upright.tables import markdown

BATCHES = (1, 8, 64)
STARTS = 3  # processes per runtime; the table shows the median of their cold starts
LEGEND = """
- Each runtime has its own process. The runtimes take turns, round by round.
- p50, p95: duration of one run of a batch, from decoded uint8 images to the answers.
- x fp32: speed relative to ONNX Runtime in fp32, the median of the ratios of all rounds, and their quartiles.
- agree: samples of the bundle with {agree}.
- peak: largest memory of the process, up to this batch.
- cold: time from the start of a process to its first prediction, the median of {starts} starts, and memory at that
  time."""

AGREE = {
    "classification": "the same first class as ONNX Runtime in fp32, and the largest difference of a\n  probability",
    "multilabel": "the same classes as ONNX Runtime in fp32, and the largest difference of a\n  probability",
    "orientation": "an angle within 1 degree of that of ONNX Runtime in fp32, and the largest\n  difference in degrees",
}
"""Meaning of the column ``agree`` by task."""


class Runtime(NamedTuple):
    """A runtime that can run the network of a bundle."""

    name: str  # name in the table
    package: str  # the Python package
    load: str  # see `Worker`, and its `arguments` besides `threads`
    arguments: dict[str, Any]
    bytes: int  # size of the model's file
    tolerance: float  # largest difference from ONNX Runtime in fp32, see `Bundle.tolerance`


Row = dict[str, Any]  # measurements of one runtime at one batch size and one number of threads


def benchmark(options: Benchmark) -> int:
    """Print a Markdown table. With ``--to``, also write it to a folder, with JSON and a plot."""
    bundle, checkpoint = Bundle.open(options.bundle, options.key, options.expect), options.checkpoint
    fixed = bundle.fixed_batch
    batches = sorted(set(options.batches or ([fixed] if fixed else BATCHES)))
    if fixed and batches != [fixed]:
        raise UserError(f"Bundle '{bundle.folder}' only accepts batches of {fixed} images; omit --batches.")
    if checkpoint and not find_spec("torch"):
        raise UserError("--checkpoint needs the package 'torch': pip install 'upright[train]'.")
    if checkpoint and not Path(checkpoint).exists():
        raise UserError(f"Checkpoint '{checkpoint}' does not exist.")
    if options.engine == "openvino":
        check_installed()
    runtimes = find_runtimes(bundle, checkpoint)
    if options.engine:
        runtimes = [each for each in runtimes if each is runtimes[0] or each.package in ("torch", options.engine)]
    rows, failures = list[Row](), dict[str, str]()
    for threads in dict.fromkeys(options.threads):
        rows += _measure(bundle, runtimes, batches, threads, failures)
    packages = dict.fromkeys(["upright", *(runtime.package for runtime in runtimes)])
    report = {
        "bundle": bundle.manifest["name"],
        "task": bundle.task.name,
        "machine": machine() | {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "rows": rows,
        "not_measured": failures,
    }
    text = _markdown(report)
    print(text)
    if options.to:
        folder = Path(options.to)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "benchmark.md", text + "\n")
        write_text(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")
        if find_spec("matplotlib"):
            _draw(rows, folder / "benchmark.png")
        else:
            print("No plot: this needs the package 'matplotlib': pip install 'upright[train]'.", file=sys.stderr)
    return 0


def find_runtimes(bundle: Bundle, checkpoint: str | None) -> list[Runtime]:
    """Return the installed runtimes, ONNX Runtime in fp32 first."""
    folder, runtimes = str(bundle.folder), list[Runtime]()
    for name, package in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        for precision in bundle.precisions if find_spec(package) else ():
            load, size = "upright.runtime.worker:predictor", len(bundle.model(precision).read_bytes())
            settings: dict[str, Any] = {"bundle": folder, "precision": precision, "engine": package}
            runtimes.append(Runtime(f"{name} {precision}", package, load, settings, size, bundle.tolerance(precision)))
    if checkpoint:
        file = Path(checkpoint) / "best.ckpt" if Path(checkpoint).is_dir() else Path(checkpoint)
        load, size = "upright.exporting.eager:pytorch", file.stat().st_size
        for name, compiled in (("eager", False), ("compiled", True)):
            settings = {"bundle": folder, "checkpoint": checkpoint, "compiled": compiled}
            runtimes.append(Runtime(f"PyTorch {name}", "torch", load, settings, size, bundle.tolerance("fp32")))
    return runtimes


def _measure(
    bundle: Bundle, runtimes: Sequence[Runtime], batches: Sequence[int], threads: int, failures: dict[str, str]
) -> list[Row]:
    """Return the rows for one number of threads, and add the runtimes that cannot run to ``failures``."""
    workers: dict[str, Worker] = {}
    outputs: dict[str, Rows] = {}
    cold: dict[str, Row] = {}
    rows = []
    with ExitStack() as stack:
        for runtime in runtimes:
            print(f"Starting {runtime.name} ({_threads(threads)}) ...", file=sys.stderr, flush=True)
            start = partial(Worker, runtime.load, runtime.arguments | {"threads": threads}, bundle)
            seconds = []
            try:
                for _ in range(STARTS - 1):
                    with start() as worker:
                        seconds.append(worker.seconds)
                worker = stack.enter_context(start())
                outputs[runtime.name] = worker.rows()
            except RuntimeError as error:
                failures[runtime.name] = str(error)
                continue
            workers[runtime.name] = worker
            cold[runtime.name] = {"cold_seconds": median([*seconds, worker.seconds]), "cold_memory": worker.memory}
        reference = outputs[runtimes[0].name]
        for batch in batches:
            print(f"Timing batches of {batch} ...", file=sys.stderr, flush=True)
            speeds = side_by_side({name: partial(worker.turn, batch) for name, worker in workers.items()})
            for runtime in (each for each in runtimes if each.name in workers):
                name, speed = runtime.name, speeds[runtime.name]
                row = {
                    "runtime": name,
                    "threads": threads,
                    "batch": batch,
                    "p50_milliseconds": speed.p50,
                    "p95_milliseconds": speed.p95,
                    "images_per_second": batch * speed.per_second,
                    "times_fp32": speed.times,
                    "quartiles": speed.quartiles,
                    "bytes": runtime.bytes,
                    "peak_memory": workers[name].memory,
                }
                rows.append(row | _agreement(bundle.task, reference, outputs[name], runtime.tolerance) | cold[name])
    return rows


def _agreement(task: Task, reference: Rows, actual: Rows, tolerance: float) -> Row:
    """Compare two main outputs for the samples."""
    difference = float(task.differences(reference, actual).max())
    row = {
        "agreement": f"{(~task.changed(reference, actual)).sum()}/{len(actual)}",
        "largest_difference": difference,
        "agrees": difference <= tolerance,
    }
    if isinstance(task, OrientationEstimation):
        row["largest_degrees"] = float(task.degrees(reference, actual).max())
    return row


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _fastest(rows: Sequence[Row]) -> str:
    """Return the fastest runtime within its tolerance, for each batch size and number of threads."""
    fastest: dict[tuple[int, int], Row] = {}
    for row in sorted((row for row in rows if row["agrees"]), key=lambda row: -row["times_fp32"]):
        fastest.setdefault((row["threads"], row["batch"]), row)
    several = len({threads for threads, _ in fastest}) > 1
    return "Fastest within the tolerance of the bundle: " + "; ".join(
        f"{row['runtime']} for batches of {batch}" + (f" on {_threads(threads)}" if several else "")
        for (threads, batch), row in sorted(fastest.items())
    )


def _cells(row: Row) -> dict[str, str]:
    """Return the text of each cell by heading."""

    def megabytes(name: str) -> str:
        return "-" if row[name] is None else f"{row[name] / 1e6:.0f}"

    low, high = row["quartiles"]
    difference = f"{row['largest_difference']:.0e}"
    if "largest_degrees" in row:
        difference = f"{row['largest_degrees']:.2f}\N{DEGREE SIGN}"
    return {
        "runtime": row["runtime"],
        "threads": str(row["threads"]),
        "batch": str(row["batch"]),
        "p50, ms": f"{row['p50_milliseconds']:.3f}",
        "p95, ms": f"{row['p95_milliseconds']:.3f}",
        "images/s": f"{row['images_per_second']:,.0f}",
        "x fp32": f"{row['times_fp32']:.2f} ({low:.2f} to {high:.2f})",
        "file, kB": f"{row['bytes'] / 1000:.0f}",
        "agree": f"{row['agreement']}, {difference}",
        "peak, MB": megabytes("peak_memory"),
        "cold, s": f"{row['cold_seconds']:.2f}",
        "cold, MB": megabytes("cold_memory"),
    }


def _markdown(report: dict[str, Any]) -> str:
    cells = [_cells(row) for row in report["rows"]]
    table = markdown([list(cells[0]), *(list(row.values()) for row in cells)], numbers=len(cells[0]) - 1)
    computer = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    instructions = ", ".join(computer["instructions"])
    lines = [f"# {report['bundle']}", "", table]
    lines += [f"{computer['processor']} ({instructions}), {computer['cores']} cores, {computer['system']};"]
    lines += [f"{versions}.", "", f"{_fastest(report['rows'])}."]
    lines += [f"- {name} was not measured: {reason}" for name, reason in report["not_measured"].items()]
    return "\n".join(lines) + "\n" + LEGEND.format(starts=STARTS, agree=AGREE[report["task"]])


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Plot images per second by batch size, one panel per number of threads."""
    from matplotlib.figure import Figure

    thread_counts = list(dict.fromkeys(row["threads"] for row in rows))
    figure = Figure(figsize=(1 + 5 * len(thread_counts), 4.5), layout="constrained")
    panels = figure.subplots(1, len(thread_counts), sharey=True, squeeze=False)[0]
    for panel, threads in zip(panels, thread_counts, strict=True):
        for name in dict.fromkeys(row["runtime"] for row in rows):
            line = [row for row in rows if (row["runtime"], row["threads"]) == (name, threads)]
            panel.plot([row["batch"] for row in line], [row["images_per_second"] for row in line], "o-", label=name)
        panel.set(xscale="log", xlabel="batch", title=_threads(threads))
        batches = sorted({row["batch"] for row in rows})
        panel.set_xticks(batches, labels=[str(batch) for batch in batches])
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("images per second")
    panels[0].legend(fontsize=8)
    with replacing_file(path) as new:
        figure.savefig(new, format="png", dpi=120)
