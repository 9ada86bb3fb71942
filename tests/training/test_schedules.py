import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from upright.errors import UprightError, UserError
from upright.training.schedules import Constant, Cosine, OneCycle, Step, TorchScheduler, check_schedule

ALL = (Constant, Step, Cosine, OneCycle)


def optimizer() -> torch.optim.Optimizer:
    """Return an optimiser with two groups, the second ten times slower."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (2.0, 0.2)]
    return torch.optim.SGD(groups)


def rates(schedule: Callable[[torch.optim.Optimizer], LRScheduler], steps: int = 100) -> list[float]:
    """Return the multiplier at every step, and after the last."""
    stepped = optimizer()
    running, curve = schedule(stepped), []
    for _ in range(steps + 1):
        fast, slow = (group["lr"] for group in stepped.param_groups)
        assert slow == pytest.approx(0.1 * fast)
        curve.append(fast / 2)
        stepped.step()
        running.step()
    return curve


def torchs(after: Callable[[torch.optim.Optimizer], LRScheduler], rise: int) -> list[float]:
    def schedule(stepped: torch.optim.Optimizer) -> LRScheduler:
        if not rise:
            return after(stepped)
        warmup = LinearLR(stepped, start_factor=1 / (rise + 1), total_iters=rise)
        return SequentialLR(stepped, [warmup, after(stepped)], milestones=[rise])

    return rates(schedule)


@pytest.mark.parametrize("warmup", [0.0, 0.07])
def test_schedules_equal_torchs_own(warmup: float) -> None:
    rise = round(100 * warmup)
    cosine = torchs(partial(CosineAnnealingLR, T_max=100 - rise), rise)
    assert rates(partial(Cosine, total_steps=100, warmup=warmup)) == pytest.approx(cosine, abs=1e-6)
    # SequentialLR counts from the end of the warm-up, we from the start of the run.
    milestones = [29 - rise, 75 - rise]
    step = torchs(partial(MultiStepLR, milestones=milestones, gamma=0.2), rise)
    ours = rates(partial(Step, total_steps=100, milestones=(0.29, 0.75), factor=0.2, warmup=warmup))
    assert ours == pytest.approx(step)
    assert rates(partial(Constant, total_steps=100, warmup=warmup))[rise:] == [1] * (101 - rise)


def test_the_formulas() -> None:
    curve = rates(partial(Cosine, total_steps=100, warmup=0.2, end=0.1))
    assert curve[0] == pytest.approx(1 / 21) and curve[19] == pytest.approx(20 / 21) and curve[20] == pytest.approx(1)
    assert curve[60] == pytest.approx(0.55) and curve[100] == pytest.approx(0.1)
    assert curve[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    curve = rates(partial(Step, total_steps=100))
    assert [curve[step] for step in (0, 49, 50, 74, 75, 100)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_rises_to_the_optimisers_rate_and_falls_to_zero() -> None:
    curve = rates(partial(OneCycle, total_steps=100, warmup=0.3, start=0.1))
    assert curve[0] == pytest.approx(0.1) and curve[30] == pytest.approx(1) and curve[100] == pytest.approx(0)
    assert curve[:31] == sorted(curve[:31]) and curve[30:] == sorted(curve[30:], reverse=True)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_step_of_a_short_run_has_a_rate(schedule: type[LRScheduler], steps: int) -> None:
    assert rates(partial(schedule, total_steps=steps, warmup=0.1), steps)[0] > 0


@pytest.mark.parametrize("schedule", ALL)
def test_a_schedule_resumes_from_its_state(schedule: type[LRScheduler]) -> None:
    complete = rates(partial(schedule, total_steps=10, warmup=0.2), 10)
    first, second = optimizer(), optimizer()
    one, two = (schedule(stepped, 10, warmup=0.2) for stepped in (first, second))
    for _ in range(4):
        first.step()
        one.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] / 2 == pytest.approx(complete[4])
    second.step()
    two.step()
    assert second.param_groups[0]["lr"] / 2 == pytest.approx(complete[5])


@pytest.mark.parametrize("schedule", ALL)
def test_a_warmup_that_is_no_fraction_is_refused(schedule: type[LRScheduler]) -> None:
    for warmup in (1.0, 5, -0.1):
        with pytest.raises(UprightError, match=rf"warmup is a fraction .* below 1; got {warmup}\."):
            schedule(optimizer(), 100, warmup=warmup)


def test_milestones_that_are_no_fractions_are_refused() -> None:
    with pytest.raises(UprightError, match=r"milestones are fractions of the run.*got \[30, 60\]"):
        Step(optimizer(), 100, milestones=(30, 60))


@pytest.mark.parametrize("kind", [StepLR, OneCycleLR, ReduceLROnPlateau])
def test_a_schedule_of_torch_that_does_not_take_the_number_of_steps_is_refused(kind: type) -> None:
    with pytest.raises(
        UserError, match=f"the second argument of {kind.__name__} is .*: give it to TorchScheduler of .* as its"
    ):
        check_schedule(kind)  # type: ignore[arg-type]
    check_schedule(partial(CosineAnnealingLR, eta_min=0.1))


class OfOneParameter(LambdaLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, lambda step: 1.0)


def test_only_schedules_of_torch_are_checked() -> None:
    check_schedule(OfOneParameter)  # type: ignore[arg-type]


OF_TORCH = [
    partial(StepLR, step_size=3),
    partial(MultiStepLR, milestones=[2, 5]),
    partial(ExponentialLR, gamma=0.9),
    partial(LinearLR, total_iters=5),
    partial(PolynomialLR, total_iters=5),
    partial(CosineAnnealingLR, T_max=7),
    partial(CosineAnnealingWarmRestarts, T_0=3),
    partial(CyclicLR, base_lr=[0.2, 0.02], max_lr=[2.0, 0.2], step_size_up=3, cycle_momentum=False),
    partial(OneCycleLR, max_lr=[2.0, 0.2], total_steps=20, cycle_momentum=False),
]


@pytest.mark.parametrize("schedule", OF_TORCH, ids=lambda schedule: schedule.func.__name__)
def test_any_schedule_of_torch_runs_and_resumes(schedule: Callable[[torch.optim.Optimizer], LRScheduler]) -> None:
    expected = rates(schedule, 10)
    wrapped = partial(TorchScheduler, total_steps=99, scheduler=schedule, interval="step")
    check_schedule(wrapped)
    assert rates(wrapped, 10) == expected and len(set(expected)) > 2
    first, second = optimizer(), optimizer()
    one, two = wrapped(first), wrapped(second)
    for _ in range(4):
        first.step()
        one.step()
    # As in a checkpoint: without code.
    buffer = io.BytesIO()
    torch.save([first.state_dict(), one.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    second.load_state_dict(states[0])
    two.load_state_dict(states[1])
    assert second.param_groups[0]["lr"] / 2 == expected[4] and two.get_last_lr() == one.get_last_lr()
    second.step()
    two.step()
    assert second.param_groups[0]["lr"] / 2 == expected[5]


def test_a_plateau_of_torch_follows_its_metric() -> None:
    stepped = optimizer()
    plateau = partial(ReduceLROnPlateau, mode="max", patience=0)
    schedule = TorchScheduler(stepped, 99, scheduler=plateau, monitor="val/accuracy")
    curve = []
    for accuracy in (0.5, 0.6, 0.6, 0.7):
        schedule.step()  # Lightning does so after every batch
        schedule.follow({"loss": torch.tensor(1.0), "accuracy": torch.tensor(accuracy)})
        curve.append(stepped.param_groups[0]["lr"])
    assert curve == pytest.approx([2, 2, 0.2, 0.2])
    with pytest.raises(UserError, match=r"monitor 'val/accuracy' has no value; there are val/loss, val/f1\.$"):
        schedule.follow({"loss": torch.tensor(1.0), "f1": torch.tensor(1.0)})


def test_arguments_that_torch_refuses_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^model.scheduler: Expected positive integer T_0, but got -5$"):
        TorchScheduler(optimizer(), 99, scheduler=partial(CosineAnnealingWarmRestarts, T_0=-5))
    with pytest.raises(UserError, match=r"^model.scheduler: .*missing 1 required .* 'step_size'$"):
        TorchScheduler(optimizer(), 99, scheduler=StepLR)  # type: ignore[arg-type]
    one_cycle = partial(OneCycleLR, max_lr=1, total_steps=4, cycle_momentum=False)
    for kind, reason in ((partial(StepLR, step_size=0), "modulo by zero"), (one_cycle, "Tried to step 5 times")):
        schedule = TorchScheduler(optimizer(), 99, scheduler=kind)
        with pytest.raises(UserError, match=f"^model.scheduler: {kind.func.__name__} cannot step with .*: .*{reason}"):
            for _ in range(5):
                schedule.optimizer.step()
                schedule.step()
    with pytest.raises(UserError, match="interval must be epoch or step, got 'batch'"):
        TorchScheduler(optimizer(), 99, scheduler=partial(StepLR, step_size=3), interval="batch")  # type: ignore[arg-type]
