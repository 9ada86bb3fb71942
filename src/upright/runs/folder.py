"""The folder of a run: one process at a time writes to it, and what a new run replaces comes back if that fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from upright.errors import UserError

ROOT = Path("checkpoints")
"""Where runs are, unless the trainer is told otherwise."""
SWEEP = "sweep.yaml"
"""In a sweep's folder: what is searched."""


def is_first_process() -> bool:
    """Whether this is the one of several processes that writes; known before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def is_sweep(folder: Path) -> bool:
    """Whether `upright sweep` made it."""
    return (folder / SWEEP).is_file()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Held by one process at a time; the system gives it free when the process ends, however that comes.

    Args:
        path: of the lock, which goes with it.
        wait: for another one to end; else that raises `filelock.Timeout`.
    """
    with FileLock(path, blocking=wait):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The system lets go of it when this process ends, however that comes.

    Raises:
        UserError: if another run is in it.
    """
    if folder.parent.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder.parent))
    path, new = folder.with_name(f".{folder.name}.running"), not folder.parent.exists()
    if new:
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Run '{folder}' is going on in another process: wait for it, stop it, or give this one another --name."
        ) from None
    try:
        _give_back(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):
                folder.parent.rmdir()


@contextmanager
def begun(folder: Path) -> Iterator[None]:
    """Put aside the run that stands there; one that gets no checkpoint leaves nothing, and it stands there again."""
    try:
        if folder.exists():
            folder.rename(_aside(folder))
        yield
    finally:
        if not _has_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)
        _give_back(folder)


def _give_back(folder: Path) -> None:
    if not _aside(folder).exists():
        return
    if _has_checkpoint(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("*.ckpt"))
