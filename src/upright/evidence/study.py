"""``upright study NAME``: run a study, and write its results."""

import importlib
import inspect
import json
import pkgutil
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib import rc_context

from upright.errors import UserError, nearest
from upright.evidence import studies
from upright.evidence.bench import Bench, Scale
from upright.evidence.finding import STYLE, Finding
from upright.files import write_text
from upright.runs.drawing import save_png
from upright.runs.folder import ROOT
from upright.runs.process import keep_freed_memory, leave_a_core
from upright.tables import markdown

FULL = "--full"
"""The protocol of a study mentions this option if the study has a larger scale."""


def study(study: str | None = None, seeds: int = 3, quick: bool = False, full: bool = False) -> int:
    """Run a study in ``checkpoints/study-NAME`` (``-quick``, ``-full``), or list all studies.

    The same command resumes an interrupted study from the checkpoints of its runs. The arguments are the options of the
    command, see `upright.options.Study`.

    Raises:
        UserError: for an unknown or missing name, fewer than 2 seeds, or a scale that the study does not have.
    """
    modules = {module.name: f"{studies.__name__}.{module.name}" for module in pkgutil.iter_modules(studies.__path__)}
    names = ", ".join(modules)
    if study is None:
        if quick or full:
            raise UserError(f"--{'quick' if quick else 'full'} needs the name of a study, one of {names}.")
        for name, path in modules.items():
            print(f"  {name:<15} {claim_and_protocol(importlib.import_module(path))[0]}")
        return 0
    if study not in modules:
        raise UserError(f"There is no study '{study}'.{nearest(study, modules)} Studies: {names}.")
    if seeds < 2:
        raise UserError(f"--seeds must be at least 2 to show a spread, got {seeds}.")
    if quick and full:
        raise UserError("--quick and --full exclude each other; give at most one of them.")
    module = importlib.import_module(modules[study])
    if full and FULL not in (module.__doc__ or ""):
        raise UserError(f"Study '{study}' has no larger scale; omit --full.")
    keep_freed_memory()
    leave_a_core()
    scale: Scale = "quick" if quick else "full" if full else "standard"
    folder = ROOT / (f"study-{study}" if scale == "standard" else f"study-{study}-{scale}")
    try:
        run(module, folder, seeds, scale)
    except KeyboardInterrupt:
        print(f"\nThe same command resumes from the runs in {folder}.", file=sys.stderr)
        raise
    return 0


def run(module: ModuleType, folder: Path, seeds: int, scale: Scale) -> Finding:
    """Run a study: print its protocol, then write ``study.md``, a figure and ``results.json`` into ``folder``.

    The module has a docstring (claim, then protocol) and a function ``run(bench)`` that returns a `Finding`.
    """
    name = module.__name__.rpartition(".")[2]
    claim, protocol = claim_and_protocol(module)
    print(f"{claim}\n\n{protocol}\n", flush=True)
    bench, start = Bench(folder, seeds, scale), time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        finding: Finding = module.run(bench)
        save_png(finding.figure, folder / f"{name}.png")
    minutes = (time.process_time() - start + bench.seconds) / 60
    command = f"upright study {name} --seeds {seeds}" + ("" if scale == "standard" else f" --{scale}")
    verdict = f"**{'Held' if finding.held else 'Did not hold'}.** {finding.sentence}"
    if scale == "quick":
        verdict += " (A quick study does not follow its protocol. It only checks that the study runs.)"
    duration = f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
    cost = f"{duration} of processor time, {seeds} seeds."
    table = markdown([[*finding.table[0]], *([*row.values()] for row in finding.table)]).rstrip()
    page = [f"## {name}", claim, protocol, table, f"![{name}]({name}.png)", verdict, f"`{command}`: {cost}"]
    results = {"study": name, "claim": claim, "held": finding.held, "sentence": finding.sentence, "scale": scale}
    results |= {"seeds": seeds, "minutes": round(minutes, 2), "numbers": _named(finding.numbers)}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "study.md", "\n\n".join(page) + "\n")
    print(f"\n{table}\n\n{verdict.replace('**', '')}\n{cost}\nWritten: {folder}/study.md, {name}.png, results.json")
    return finding


def _named(numbers: Any) -> Any:
    """Return numbers with strings as keys, as JSON requires."""
    if not isinstance(numbers, dict):
        return numbers
    return {" ".join(map(str, key)) if isinstance(key, tuple) else key: _named(each) for key, each in numbers.items()}


def claim_and_protocol(module: ModuleType) -> tuple[str, str]:
    """Return the claim of a study and its protocol: the first paragraph of its docstring, and the others."""
    claim, *protocol = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    # Join the lines of a paragraph and of a list's item.
    return " ".join(claim.split()), "\n\n".join(re.sub(r"\s*\n(?!- )\s*", " ", paragraph) for paragraph in protocol)
