"""Private names of Lightning (tested with 2.6)."""

import lightning as L


def accumulates(trainer: L.Trainer) -> bool:
    """Return whether the batch just trained on was accumulated without a step of the optimiser.

    Lightning asks itself by this method. Its public counters do not say it: `accumulate_grad_batches` may change by
    epoch, and the last batch of an epoch always steps.
    """
    return trainer.fit_loop._should_accumulate()  # noqa: SLF001
