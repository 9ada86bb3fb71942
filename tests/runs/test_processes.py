"""Several processes train as one: Lightning's own, torchrun's, SLURM's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Upright
from tests.runs.killing import command, differences, environment, finished, fit, last, prepare

TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 8, "--trainer.max_epochs", 2)
"""73 steps of two processes are an epoch of the 1168 digits."""
SHORT = (*TWO, "--trainer.limit_train_batches", 10)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "upright")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def shares(path: Path, epoch: int) -> list[int]:
    """The samples that a process was given in an epoch, in their order."""
    lines = [[int(part) for part in line.split()] for line in path.read_text().splitlines()]
    return [sample for number, *samples in lines if number == epoch for sample in samples]


@pytest.mark.slow
def test_each_sample_once_and_a_death_in_mid_epoch_changes_nothing(folder: Path, upright: Upright) -> None:
    options = (*TWO, "--save_every_n_steps", 20)
    out = finished(folder, "whole", *options, POSITIONS=str(folder / "positions"))
    assert out.count("epoch 1/2") == out.count("Next: upright test") == 1
    for epoch in (0, 1):
        mine, others = (shares(folder / f"positions-{rank}", epoch) for rank in (0, 1))
        assert len(mine) == len(others) and sorted(mine + others) == list(range(1168))
    killed_at = fit(folder, "killed", *options, kill_at="step:100", KILL_RANK="1")
    assert killed_at.returncode != 0 and last(folder / "checkpoints/killed")["global_step"] == 80
    finished(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert {path.name for path in (folder / "checkpoints/killed").iterdir() if path.suffix != ".png"} == {
        "config.yaml",
        "best.ckpt",
        "last.ckpt",
        "metrics.csv",
    }
    # What two found is what one finds.
    told = torch.load(folder / "checkpoints/whole/best.ckpt", weights_only=True)["upright"]["metrics"]
    sys.modules.pop("own", None)
    answer = upright("validate", "--ckpt_path", "checkpoints/whole")
    assert answer.code == 0, answer.err
    for name in ("accuracy", "loss", "f1"):
        assert f"{told[f'val/{name}']:.6f}"[:7] in answer.out


def group(arguments: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Processes that a terminal's Ctrl-C would reach together."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("launcher", ["lightning", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ctrl_c_stops_all_of_them_at_one_step(folder: Path, launcher: str) -> None:
    options = (*TWO[:-1], 200, "--save_every_n_steps", 1)
    arguments = command("a", *options)
    if launcher == "torchrun":
        arguments = [*TORCHRUN, *arguments[3:]]
    with group(arguments, folder) as process:
        while not (folder / "checkpoints/a/last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if launcher == "lightning" else 1), err
    assert err.count("stopped after step") == 1 and err.count("to resume: upright fit") == 1
    assert "Error" not in err or launcher == "torchrun"
    step = last(folder / "checkpoints/a")["global_step"]
    assert f"stopped after step {step};" in err


@pytest.mark.slow
def test_ctrl_c_of_two_processes_goes_on_exactly(folder: Path) -> None:
    finished(folder, "whole", *SHORT)
    # One of them alone is told.
    done = fit(folder, "stopped", *SHORT, kill_at="step:6", kill_with="SIGTERM", KILL_RANK="1")
    assert done.returncode == 143 and "stopped after step 6;" in done.stderr
    finished(folder, "stopped", *SHORT, "--ckpt_path", "auto")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/stopped") == []


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    own = command("a", *SHORT, *arguments)[3:]
    return subprocess.run(
        [*TORCHRUN, *own], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.slow
def test_torchrun_replaces_a_run_and_says_mistakes_once(folder: Path) -> None:
    assert torchrun(folder).returncode == 0
    before = last(folder / "checkpoints/a")["upright"]["run"]["id"]
    done = torchrun(folder)
    assert done.returncode == 1 and done.stderr.count("upright: error: Run 'checkpoints/a' exists") == 1
    done = torchrun(folder, "--force", "--trainer.max_epochz", 1)
    assert done.returncode == 1 and done.stderr.count("upright: error: unknown option") == 1
    done = torchrun(folder, "--force")
    assert done.returncode == 0, done.stderr
    assert last(folder / "checkpoints/a")["upright"]["run"]["id"] != before
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["a"]


def slurm(folder: Path, rank: int = 0, tasks: int = 1) -> dict[str, str]:
    """What SLURM tells a task; ``scontrol`` writes down what it is asked."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    scontrol.chmod(0o755)
    variables = {"JOB_ID": "123", "JOB_NAME": "x", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1}
    variables |= {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NODELIST": "localhost"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {f"SLURM_{name}": str(value) for name, value in variables.items()} | {"PATH": path}


def test_slurm_requeues_and_the_same_line_goes_on(folder: Path) -> None:
    options = ("--trainer.max_epochs", 2, "--ckpt_path", "auto")
    finished(folder, "whole", *options)
    # Of another run, or by Lightning's own way: nobody takes it.
    (folder / "checkpoints/hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    done = fit(folder, "job", *options, kill_at="step:8", kill_with="SIGUSR1", **slurm(folder))
    assert done.returncode == 128 + signal.SIGUSR1 and "stopped after step 8;" in done.stderr
    assert (folder / "asked").read_text() == "requeue 123\n"
    # Time is up without a warning, or another job is more urgent.
    done = fit(folder, "job", *options, kill_at="step:13", kill_with="SIGTERM", **slurm(folder))
    assert done.returncode == 143 and (folder / "asked").read_text() == "requeue 123\n"
    finished(folder, "job", *options, **slurm(folder))
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/job") == []
    assert not list((folder / "checkpoints/job").glob("hpc*"))
    assert "is complete" in finished(folder, "job", *options, **slurm(folder))


@pytest.mark.slow
def test_two_tasks_of_slurm(folder: Path) -> None:
    options = (*SHORT, "--ckpt_path", "auto")

    def srun(**more: str) -> list[str]:
        tasks = [group(command("job", *options), folder, **slurm(folder, rank, 2), **more) for rank in (0, 1)]
        answers = [task.communicate(timeout=100)[1] for task in tasks]
        assert [task.returncode for task in tasks] == ([138, 0] if more else [0, 0]), answers
        return answers

    srun(KILL_AT="step:5", KILL_WITH="SIGUSR1", MASTER_PORT="29581")
    assert (folder / "asked").read_text() == "requeue 123\n"
    assert last(folder / "checkpoints/job")["global_step"] in (5, 6)
    srun()
    finished(folder, "whole", *SHORT)
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/job") == []


@pytest.mark.slow
def test_two_nodes(folder: Path) -> None:
    options = (*SHORT[2:], "--trainer.devices", 1, "--trainer.num_nodes", 2)
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7"]
    line = [*TORCHRUN[:3], *rendezvous, "--rdzv-endpoint", "localhost:29567", "-m", "upright"]
    nodes = [group([*line, *command("nodes", *options)[3:]], folder) for _ in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=100)
        assert node.returncode == 0, err
    finished(folder, "whole", *SHORT)
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/nodes") == []
