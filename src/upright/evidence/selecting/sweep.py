"""``upright sweep``: the search, followed by `select` among its trials."""

import sys
from pathlib import Path
from typing import Any

from upright.errors import UprightError
from upright.evidence.selecting.selection import select
from upright.runs.folder import ROOT
from upright.runs.sweeping import sweep as search


def sweep(space: str, name: str | None = None, **options: Any) -> int:
    """Search, then select. Trials that cannot be compared are only reported, because the search is complete.

    Args:
        space: see `upright.runs.sweeping.sweep.sweep`.
        name: of the sweep.
        **options: the other options of the search.
    """
    code = search.sweep(space, name=name, **options)
    if code == 0:
        try:
            select([str(ROOT / (name or Path(space).stem))])
        except UprightError as error:
            print(f"Note: the trials cannot be compared: {error}", file=sys.stderr)
    return code
