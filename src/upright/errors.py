"""What a user did wrong, in one line: what was given, what is allowed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UprightError(Exception):
    """A user's mistake. The command line prints its text without a traceback and exits with 2."""

    exit_code = 2


class GateError(UprightError):
    """A result that did not hold (parity, a bundle's samples, a run that diverged). The command line exits with 1."""

    exit_code = 1


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` with the most similar allowed name, or nothing when none is similar."""
    matches = get_close_matches(name, list(allowed), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
