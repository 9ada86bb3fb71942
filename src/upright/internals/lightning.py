"""Private names of Lightning (tested with 2.6)."""

import lightning as L


def accumulates(trainer: L.Trainer) -> bool:
    """Return whether the last batch was accumulated without a step of the optimizer.

    Lightning itself calls this method. Its public counters are not enough: `accumulate_grad_batches` may change with
    the epoch, and the optimizer always steps after the last batch of an epoch.
    """
    return trainer.fit_loop._should_accumulate()  # noqa: SLF001
