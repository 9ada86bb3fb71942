"""``upright sweep``: the search, and at its end what its winner is worth."""

import sys
from pathlib import Path
from typing import Any

from upright.errors import UprightError
from upright.evidence.selecting.selection import select
from upright.runs.folder import ROOT
from upright.runs.sweeping import sweep as search


def sweep(space: str, name: str | None = None, **options: Any) -> int:
    """Search, then `select` among the trials.

    Args:
        space: see `upright.runs.sweeping.sweep.sweep`.
        name: of the sweep.
        **options: the others.

    Raises:
        UserError: what the search does; trials that cannot be compared are only reported, for they have ended.
    """
    code = search.sweep(space, name=name, **options)
    if code == 0:
        try:
            select([str(ROOT / (name or Path(space).stem))])
        except UprightError as error:
            print(f"Note: what the best is worth is not known: {error}", file=sys.stderr)
    return code
