"""``upright study NAME``: run it, and write what came of it."""

import importlib
import inspect
import json
import pkgutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from upright.errors import UserError, nearest
from upright.evidence import studies
from upright.evidence.bench import Bench, Run, Scale
from upright.files import write_text
from upright.runs.drawing import save_picture
from upright.runs.folder import ROOT
from upright.runs.process import keep_freed_memory, leave_a_core
from upright.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FULL = "--full"
"""What a protocol that has more to show says it is for."""


class Finding(NamedTuple):
    """What came of a study.

    Args:
        held: whether the claim did, by the rule that the protocol gives.
        sentence: what was seen, with its numbers.
        table: rows, each from heading to text.
        figure: the picture.
        numbers: all that was measured, for ``results.json``.
    """

    held: bool
    sentence: str
    table: Sequence[Mapping[str, str]]
    figure: "Figure"
    numbers: Any


def study(study: str | None = None, seeds: int = 3, quick: bool = False, full: bool = False) -> int:
    """Run a study in ``checkpoints/study-NAME`` (``-quick``, ``-full``), or list them all.

    One that was stopped goes on in the middle of its runs.

    Args:
        study: the name of a module of `upright.evidence.studies`; none lists them.
        seeds: runs per variant.
        quick: on the embedded digits, in seconds: shows that it runs, and proves nothing.
        full: for longer than half an hour; only where the protocol says what for.

    Raises:
        UserError: if there is no such study, if none is named where one must be, if there are too few seeds to say
            anything of their spread, or if it has no more to show.
    """
    names = [module.name for module in pkgutil.iter_modules(studies.__path__)]
    if study is None and (quick or full):
        raise UserError(f"--{'quick' if quick else 'full'} needs a study's name: one of {', '.join(names)}.")
    if study is None:
        for name in names:
            print(f"  {name:<15} {claim_and_protocol(_module(name))[0]}")
        return 0
    if study not in names:
        raise UserError(f"There is no study '{study}'.{nearest(study, names)} Studies: {', '.join(names)}.")
    if seeds < 2:
        raise UserError(f"--seeds must be at least 2 to show a spread, got {seeds}.")
    if quick and full:
        raise UserError("--quick and --full do not go together: give one, or neither.")
    if full and FULL not in (_module(study).__doc__ or ""):
        longer = ", ".join(name for name in names if FULL in (_module(name).__doc__ or ""))
        raise UserError(f"'{study}' shows all that it has without --full; {longer} has more.")
    keep_freed_memory()
    leave_a_core()
    scale: Scale = "quick" if quick else "full" if full else "standard"
    folder = ROOT / (f"study-{study}" if scale == "standard" else f"study-{study}-{scale}")
    try:
        run(_module(study), folder, seeds, scale)
    except KeyboardInterrupt:
        print(f"\nThe same command goes on with what has been trained in {folder}.", file=sys.stderr)
        raise
    return 0


def run(module: ModuleType, folder: Path, seeds: int, scale: Scale) -> Finding:
    """Run a study: its protocol is printed before, and ``study.md``, a picture and ``results.json`` are written after.

    Args:
        module: with a docstring, the claim and then the protocol, and ``run(bench)``, which gives a `Finding`.
        folder: to write into.
        seeds: runs per variant.
        scale: how much is spent.
    """
    name = module.__name__.rpartition(".")[2]
    claim, protocol = claim_and_protocol(module)
    print(f"{claim}\n\n{protocol}\n", flush=True)
    bench, start = Bench(folder, seeds, scale), time.process_time()
    finding: Finding = module.run(bench)
    minutes = (time.process_time() - start + bench.seconds) / 60
    command = f"upright study {name} --seeds {seeds}" + ("" if scale == "standard" else f" --{scale}")
    verdict = f"**{'Held' if finding.held else 'Did not hold'}.** {finding.sentence}"
    if scale == "quick":
        verdict += " (A quick study does less of everything than its protocol says: that it runs is all it shows.)"
    took = f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
    cost = f"{took} of processor time, {seeds} seeds."
    headings = [*finding.table[0]]
    table = markdown([headings, *([row[name] for name in headings] for row in finding.table)]).rstrip()
    page = [f"## {name}", claim, protocol, table, f"![{name}]({name}.png)", verdict, f"`{command}`: {cost}"]
    folder.mkdir(parents=True, exist_ok=True)
    save_picture(finding.figure, folder / f"{name}.png")
    results = {"study": name, "claim": claim, "held": finding.held, "sentence": finding.sentence, "scale": scale}
    results |= {"seeds": seeds, "minutes": round(minutes, 2), "numbers": finding.numbers}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "study.md", "\n\n".join(page) + "\n")
    print(f"\n{table}\n\n{verdict.replace('**', '')}\n{cost}\nWritten: {folder}/study.md, {name}.png, results.json")
    return finding


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{studies.__name__}.{name}")


def claim_and_protocol(module: ModuleType) -> tuple[str, str]:
    """The claim of a study, and how it is put to the test: the paragraphs of its docstring."""
    claim, *protocol = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    return " ".join(claim.split()), "\n\n".join(" ".join(paragraph.split()) for paragraph in protocol)


def values(runs: Sequence[Run], name: str) -> list[float]:
    """A metric of the test split, of those runs that have it."""
    return [run.metrics[name] for run in runs if name in run.metrics]


def mean_and_spread(found: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation, or a dash where nothing was measured."""
    if not found:
        return "-"
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"
