"""Errors by kind. Each message is one line: what was given, what is allowed, what to do.

`UprightError` is the base. `UserError` is a mistake of the user; `ImageError`, `BundleError` and `CheckpointError` are
kinds of it. `GateError` is a failed check, and `EngineError` a failure of the inference engine.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UprightError(Exception):
    """Base of all errors that the command line prints without a traceback. It exits with `exit_code`."""

    exit_code = 1


class UserError(UprightError):
    """A mistake of the user. The server answers with a status from 400 to 499."""

    exit_code = 2


class ImageError(UserError):
    """An image that cannot be decoded, or that is larger than allowed."""


class BundleError(UserError):
    """A bundle that is incomplete or damaged, or that does not fit the request."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete or damaged, or that does not fit the data or the network."""


class GateError(UprightError):
    """A failed check: parity, a bundle's samples, or a run that diverged."""


class EngineError(UprightError):
    """A failure of the inference engine, such as a lack of memory.

    The server answers with status 500 and logs the traceback.
    """


def one_line(error: object, limit: int | None = None) -> str:
    """Return the message of an error, or else its type, on one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the most similar allowed name, or an empty string."""
    matches = get_close_matches(name, list(allowed), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
