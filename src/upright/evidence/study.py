"""``upright study NAME``."""

import importlib
import pkgutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from upright.errors import UprightError, nearest
from upright.evidence import studies


def study(study: str, seeds: int = 5) -> int:
    """Run a study in ``checkpoints/study-NAME``.

    Args:
        study: the name of a module of `upright.evidence.studies`.
        seeds: runs per variant.

    Raises:
        UprightError: if there is no such study, or too few seeds to say anything of their spread.
    """
    names = [module.name for module in pkgutil.iter_modules(studies.__path__)]
    if study not in names:
        raise UprightError(f"There is no study '{study}'.{nearest(study, names)} Studies: {', '.join(names)}.")
    if seeds < 2:
        raise UprightError(f"--seeds must be at least 2 to show a spread, got {seeds}.")
    module = importlib.import_module(f"{studies.__name__}.{study}")
    module.run(Path("checkpoints") / f"study-{study}", seeds)
    return 0


def mean_and_spread(runs: Sequence[Mapping[str, float]], name: str, digits: int = 4) -> str:
    """Metric ``name`` over runs of different seeds: mean ± standard deviation, or a dash where it was not measured."""
    values = [run[name] for run in runs if name in run]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" if values else "-"
