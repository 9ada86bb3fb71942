"""``upright sweep``: run a search, then rank its trials."""

import sys
from collections.abc import Sequence
from pathlib import Path

from upright.errors import UprightError
from upright.evidence.selecting.selection import select
from upright.runs.folder import ROOT
from upright.runs.sweeping import sweep as search


def sweep_and_select(
    space: str, trials: int | None = None, name: str | None = None, options: Sequence[str] = ()
) -> int:
    """Run `upright.runs.sweeping.sweep`, then `select` among the trials."""
    code = search.sweep(space, trials, name, options)
    if code == 0:
        try:
            select([str(ROOT / (name or Path(space).stem))])
        except UprightError as error:
            # The trials are complete, so the command does not fail.
            print(f"Note: the trials cannot be compared: {error}", file=sys.stderr)
    return code
