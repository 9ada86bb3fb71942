"""What Lightning does around every hook, needed or not, and how to leave it out."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)


Class = TypeVar("Class", bound=type[Callback])


def without_empty_hooks(callback: Class) -> Class:
    """Take from a class of callbacks the hooks of a step that it does not write: Lightning leaves out one that is None.

    All others take 4 µs each, some fifty at every step (``benchmarks/overhead.py``).
    """
    for name in STEP_HOOKS:
        if getattr(callback, name) is getattr(Callback, name):
            setattr(callback, name, None)
    return callback


class NoProfiler(PassThroughProfiler):
    """Measures nothing, without a generator for each time that it is asked to."""

    nothing: AbstractContextManager[Any] = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Nothing to enter."""
        return self.nothing
