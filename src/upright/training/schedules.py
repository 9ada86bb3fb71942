"""Learning rate schedules as multipliers, so that groups of different rates keep their ratio."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class OneCycle(LambdaLR):
    """Warm up along a cosine to the optimiser's own rate, then down to nothing (Smith, Topin 2017, arXiv:1708.07120).

    torch's ``OneCycleLR`` sets every group to one rate, and so drops the factor of a localiser.

    Args:
        optimizer: its rates are the peak.
        total_steps: of the run.
        warmup: fraction of the steps that rise.
        start: multiplier of the first step.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, *, warmup: float = 0.3, start: float = 0.04) -> None:
        super().__init__(optimizer, partial(one_cycle, total_steps=total_steps, warmup=warmup, start=start))


def one_cycle(step: int, *, total_steps: int, warmup: float, start: float) -> float:
    """The multiplier at ``step`` of ``total_steps``."""
    rise = max(1.0, warmup * total_steps)
    if step < rise:
        return start + (1 - start) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total_steps - rise)))) / 2
