"""``upright sweep``: run a search, then `select` among its trials."""

import sys
from collections.abc import Sequence
from pathlib import Path

from upright.errors import UprightError
from upright.evidence.selecting.selection import select
from upright.runs.folder import ROOT
from upright.runs.sweeping import sweep as search


def sweep(space: str, trials: int | None = None, name: str | None = None, options: Sequence[str] = ()) -> int:
    """Search, see `upright.runs.sweeping.sweep`, then compare the trials."""
    code = search.sweep(space, trials, name, options)
    if code == 0:
        try:
            select([str(ROOT / (name or Path(space).stem))])
        except UprightError as error:
            # The trials are complete, so a failed comparison is only a note.
            print(f"Note: the trials cannot be compared: {error}", file=sys.stderr)
    return code
