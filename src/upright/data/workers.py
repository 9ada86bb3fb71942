"""Worker processes that decode images. Their errors have one line, and Ctrl-C does not stop them."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from upright.errors import UprightError, UserError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def fetch(read: Callable[[Argument], Result], arguments: Sequence[Argument], workers: int) -> Iterator[Result]:
    """Yield ``read(argument)`` for every argument, in order, by this number of processes; 0 is this process.

    Raises:
        UprightError: the error that ``read``, which can be pickled, raised.
        UserError: if a worker process dies.
    """
    if not workers:
        yield from map(read, arguments)
        return
    loader: DataLoader[Any] = DataLoader(
        _Results(read),
        batch_size=None,
        sampler=arguments,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_parent,
        # Without a generator of its own, the loader draws the seed of its workers from the global one.
        generator=torch.Generator(),
    )
    try:
        for result in loader:
            if isinstance(result, UprightError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A process that decodes images died ({str(error).splitlines()[0]}), perhaps because memory ran out. "
            "Use fewer processes with --data.num_workers; 0 decodes in the main process."
        ) from error


class _Results(Dataset[Any]):
    """Results of ``read``. An error is returned, because torch adds a traceback to the text of a raised error."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, argument: Any) -> Any:
        try:
            return self.read(argument)
        except UprightError as error:
            return error


def _leave_signals_to_parent(_: int) -> None:
    # A terminal sends Ctrl-C to all processes, but a run that stops after the current step still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(result: Any) -> Any:
    return result
