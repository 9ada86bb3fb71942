"""The number of threads of a run."""

import os
import subprocess
import sys

import pytest

from upright.cores import count_cores

PROGRAM = "import torch; from upright.runs.process import leave_a_core; leave_a_core(); print(torch.get_num_threads())"


def threads(**environment: str) -> int:
    others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PROGRAM]
    return int(subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_one_core_is_not_used() -> None:
    assert threads() == max(1, count_cores() - 1)


@pytest.mark.parametrize("number", [1, 2])
def test_the_number_of_the_environment_is_used(number: int) -> None:
    assert threads(OMP_NUM_THREADS=str(number)) == number
