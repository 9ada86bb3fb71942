"""Learning rate schedules as multipliers, one per step, so that groups of different rates keep their ratio.

Each is called with the optimiser, whose own rates are the peak, and with the number ``n`` of steps of the run.
The first ``w = round(warmup * n)`` steps are the warm-up. At step ``s < w`` the multiplier is
``(s + 1) / (w + 1)``: linear (Goyal et al. 2017, arXiv:1706.02677), and above 0 at the first step. After the warm-up,
each schedule has its own formula. `OneCycle` rises along a cosine instead.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from upright.errors import UserError
from upright.recipes import load_class, recipe

MakeScheduler = Callable[[Optimizer, int], LRScheduler]
"""A factory of schedules: it is called with ``(optimizer, total_steps)``."""


def check_schedule(make: MakeScheduler) -> None:
    """Refuse a schedule of torch whose second argument is not the number of steps, such as ``StepLR``."""
    kind = load_class(recipe(make)["class_path"])
    if kind.__module__ != LRScheduler.__module__:
        return
    second = list(inspect.signature(kind).parameters)[1]
    if second not in ("total_steps", "T_max"):
        raise UserError(
            f"A schedule gets the optimiser and the number of steps, but the second argument of {kind.__name__} is "
            f"{second}: give it to TorchScheduler of {__name__} as its scheduler, or use Constant, Step, Cosine, "
            "OneCycle or Plateau."
        )


class Constant(LambdaLR):
    """Keep the optimiser's own rate after the warm-up: the multiplier is 1.

    Args:
        warmup: fraction of the steps for the warm-up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0) -> None:
        super().__init__(optimizer, _with_warmup(lambda step, start: 1.0, total_steps, warmup))


class Step(LambdaLR):
    """Lower the rate at milestones (He et al. 2016, arXiv:1512.03385, on CIFAR-10).

    The multiplier is ``factor ** (number of milestones m with s >= round(m n))``. Milestones are fractions, so that the
    rate falls at the same relative times in a longer or shorter run.

    Args:
        milestones: fractions of the run.
        factor: factor on the rate at each milestone.
        warmup: fraction of the steps for the warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        milestones: Sequence[float] = (0.5, 0.75),
        factor: float = 0.1,
        warmup: float = 0.0,
    ) -> None:
        if not all(0 < milestone < 1 for milestone in milestones):
            raise UserError(f"milestones are fractions of the run, above 0 and below 1; got {list(milestones)}.")
        steps = [round(milestone * total_steps) for milestone in milestones]

        def multiplier(step: int, start: int) -> float:
            return float(factor ** sum(step >= milestone for milestone in steps))

        super().__init__(optimizer, _with_warmup(multiplier, total_steps, warmup))


class Cosine(LambdaLR):
    """Decay along half a cosine (Loshchilov, Hutter 2017, arXiv:1608.03983), without restarts.

    The multiplier is ``end + (1 - end) (1 + cos(pi (s - w) / (n - w))) / 2``.

    Args:
        end: multiplier after the last step.
        warmup: fraction of the steps for the warm-up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, *, end: float = 0.0, warmup: float = 0.0) -> None:
        def multiplier(step: int, start: int) -> float:
            progress = min(1.0, (step - start) / max(1, total_steps - start))
            return end + (1 - end) * _fall(progress)

        super().__init__(optimizer, _with_warmup(multiplier, total_steps, warmup))


class OneCycle(LambdaLR):
    """Warm up along a cosine to the optimiser's own rate, then decay to zero (Smith, Topin 2017, arXiv:1708.07120).

    torch's ``OneCycleLR`` sets all groups to the same rate, and so ignores the ``lr_factor`` of a localiser.

    Args:
        warmup: fraction of the steps for the warm-up.
        start: multiplier of the first step.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, *, warmup: float = 0.3, start: float = 0.04) -> None:
        _check_warmup(warmup)
        rise = max(1.0, warmup * total_steps)

        def multiplier(step: int) -> float:
            if step < rise:
                return start + (1 - start) * (1 - math.cos(math.pi * step / rise)) / 2
            return _fall(min(1.0, (step - rise) / max(1.0, total_steps - rise)))

        super().__init__(optimizer, multiplier)


class Plateau(ReduceLROnPlateau):
    """Lower the rate when the validation loss has not fallen for some validations.

    The classifier calls `follow` after each validation, before a checkpoint is written. Lightning would do
    so after it, and a resumed run would miss one.

    Args:
        factor: factor on the rate.
        patience: number of validations without a lower loss that change nothing.
        threshold: a loss is lower if it is below the best one by this fraction of it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
    ) -> None:
        if not 0 < factor < 1:
            raise UserError(f"factor must be above 0 and below 1, got {factor}.")
        super().__init__(optimizer, factor=factor, patience=patience, threshold=threshold)

    def step(self, metrics: object = None, epoch: int | None = None) -> None:  # type: ignore[override]
        """Change nothing: Lightning calls this after every batch."""

    def follow(self, metrics: Mapping[str, Tensor]) -> None:
        """Step with the loss of a validation."""
        super().step(float(metrics["loss"]))


class TorchScheduler(LRScheduler):
    """Follow any schedule of torch, with its own keyword arguments.

    Args:
        scheduler: completed with ``(optimizer)``, such as ``CosineAnnealingWarmRestarts`` with ``T_0``.
        interval: the schedule steps after every ``epoch``, or after every ``step`` of the optimiser; see `monitor`.
        monitor: the metric of validation that ``ReduceLROnPlateau`` gets after every validation, its only step. Other
            schedules do not use it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        scheduler: Callable[[Optimizer], LRScheduler],
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
    ) -> None:
        # No super().__init__(): it would step. The inner schedule has all state.
        if interval not in ("epoch", "step"):
            raise UserError(f"interval must be epoch or step, got '{interval}'.")
        try:
            self.schedule = scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.scheduler: {error}") from error
        self.optimizer, self.interval, self.monitor = optimizer, interval, monitor

    def step(self, epoch: int | None = None) -> None:
        if not isinstance(self.schedule, ReduceLROnPlateau):
            try:
                self.schedule.step()
            except (ValueError, ArithmeticError) as error:  # such as a period of 0, or more steps than total_steps
                name = type(self.schedule).__name__
                raise UserError(f"model.scheduler: {name} cannot step with these init_args: {error}") from error

    def follow(self, metrics: Mapping[str, Tensor]) -> None:
        """Pass the metric of a validation to ``ReduceLROnPlateau``."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            value = metrics.get(self.monitor.removeprefix("val/"))
            if value is None or value.isnan():
                names = ", ".join(f"val/{name}" for name in metrics)
                raise UserError(f"model.scheduler: monitor '{self.monitor}' has no value; there are {names}.")
            self.schedule.step(float(value))

    def get_last_lr(self) -> Any:
        return self.schedule.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)


def _fall(progress: float) -> float:
    """Return half a cosine that falls from 1 to 0 while ``progress`` grows from 0 to 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def _with_warmup(multiplier: Callable[[int, int], float], total_steps: int, warmup: float) -> Callable[[int], float]:
    """Return a linear warm-up, followed by ``multiplier(step, warm-up steps)``, as a function of the step."""
    _check_warmup(warmup)
    start = round(warmup * total_steps)
    return lambda step: (step + 1) / (start + 1) if step < start else multiplier(step, start)


def _check_warmup(warmup: float) -> None:
    if not 0 <= warmup < 1:
        raise UserError(f"warmup is a fraction of the run, at least 0 and below 1; got {warmup}.")
