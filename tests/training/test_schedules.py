import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from upright.errors import UprightError
from upright.training.schedules import Constant, Cosine, OneCycle, Step

ALL = (Constant, Step, Cosine, OneCycle)


def optimizer() -> torch.optim.Optimizer:
    """Two groups, the second ten times slower."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (2.0, 0.2)]
    return torch.optim.SGD(groups)


def rates(schedule: Callable[[torch.optim.Optimizer], LRScheduler], steps: int = 100) -> list[float]:
    """The multiplier at every step, and after the last."""
    over = optimizer()
    made, found = schedule(over), []
    for _ in range(steps + 1):
        fast, slow = (group["lr"] for group in over.param_groups)
        assert slow == pytest.approx(0.1 * fast)
        found.append(fast / 2)
        over.step()
        made.step()
    return found


def torchs(after: Callable[[torch.optim.Optimizer], LRScheduler], rise: int) -> list[float]:
    def schedule(over: torch.optim.Optimizer) -> LRScheduler:
        if not rise:
            return after(over)
        warmup = LinearLR(over, start_factor=1 / (rise + 1), total_iters=rise)
        return SequentialLR(over, [warmup, after(over)], milestones=[rise])

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
    found = rates(partial(Cosine, total_steps=100, warmup=0.2, end=0.1))
    assert found[0] == pytest.approx(1 / 21) and found[19] == pytest.approx(20 / 21) and found[20] == pytest.approx(1)
    assert found[60] == pytest.approx(0.55) and found[100] == pytest.approx(0.1)
    assert found[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    found = rates(partial(Step, total_steps=100))
    assert [found[step] for step in (0, 49, 50, 74, 75, 100)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_rises_to_the_optimisers_rate_and_falls_to_nothing() -> None:
    found = rates(partial(OneCycle, total_steps=100, warmup=0.3, start=0.1))
    assert found[0] == pytest.approx(0.1) and found[30] == pytest.approx(1) and found[100] == pytest.approx(0)
    assert found[:31] == sorted(found[:31]) and found[30:] == sorted(found[30:], reverse=True)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_a_step_or_two_learns(schedule: type[LRScheduler], steps: int) -> None:
    assert rates(partial(schedule, total_steps=steps, warmup=0.1), steps)[0] > 0


@pytest.mark.parametrize("schedule", ALL)
def test_a_schedule_goes_on_where_its_checkpoint_stood(schedule: type[LRScheduler]) -> None:
    whole = rates(partial(schedule, total_steps=10, warmup=0.2), 10)
    first, second = optimizer(), optimizer()
    one, two = (schedule(over, 10, warmup=0.2) for over in (first, second))
    for _ in range(4):
        first.step()
        one.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] / 2 == pytest.approx(whole[4])
    second.step()
    two.step()
    assert second.param_groups[0]["lr"] / 2 == pytest.approx(whole[5])


@pytest.mark.parametrize("schedule", ALL)
def test_a_warmup_is_a_fraction(schedule: type[LRScheduler]) -> None:
    for warmup in (1.0, 5, -0.1):
        with pytest.raises(UprightError, match=rf"warmup is a fraction .* below 1; got {warmup}\."):
            schedule(optimizer(), 100, warmup=warmup)


def test_milestones_are_fractions() -> None:
    with pytest.raises(UprightError, match=r"milestones are fractions of the run.*got \[30, 60\]"):
        Step(optimizer(), 100, milestones=(30, 60))
