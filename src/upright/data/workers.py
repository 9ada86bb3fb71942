"""Worker processes: torch's, with a user's mistake left in its one line."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from upright.errors import UprightError, UserError

Key = TypeVar("Key", contravariant=True)
Item = TypeVar("Item", covariant=True)


class Keyed(Protocol[Key, Item]):
    """Gives an item for a key."""

    def __getitem__(self, key: Key, /) -> Item:
        """The item."""


def fetch(items: Keyed[Any, Item], keys: Sequence[Any], workers: int) -> Iterator[Item]:
    """``items[key]`` for every key, in their order.

    Args:
        items: what a worker can be sent.
        keys: whatever it takes.
        workers: processes; 0 does it here.

    Raises:
        UserError: of an item, as it was.
    """
    if not workers:
        yield from map(items.__getitem__, keys)
        return
    loader: DataLoader[Any] = DataLoader(
        _Answers(items),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_parent,
        # Else it draws a seed for its workers from the global one.
        generator=torch.Generator(),
    )
    try:
        for answer in loader:
            if isinstance(answer, UprightError):
                raise answer
            yield answer
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A process that decodes has died ({str(error).splitlines()[0]}), perhaps for want of memory: fewer of "
            "them by --data.num_workers, 0 for none."
        ) from error


class _Answers(Dataset[Any]):
    """Returns a mistake: one that is raised comes out of a worker with its traceback as its text."""

    def __init__(self, items: Keyed[Any, Any]) -> None:
        self.items = items

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.items[key]
        except UprightError as error:
            return error


def _leave_signals_to_parent(_: int) -> None:
    # A terminal sends Ctrl-C to all; a run that stops after this step still wants its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(answer: Any) -> Any:
    return answer
