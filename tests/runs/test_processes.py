"""Runs of several processes, started by Lightning, torchrun and SLURM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Upright
from tests.runs.killing import command, differences, environment, fit, last, prepare, run_to_end

TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 8, "--trainer.max_epochs", 2)
"""An epoch of the 1168 digits has 73 steps with two processes."""
SHORT = (*TWO, "--trainer.limit_train_batches", 10)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "upright")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def shares(path: Path, epoch: int) -> list[int]:
    """Return the samples of a process in an epoch, in order."""
    lines = [[int(part) for part in line.split()] for line in path.read_text().splitlines()]
    return [sample for number, *samples in lines if number == epoch for sample in samples]


@pytest.mark.slow
def test_each_sample_is_used_once_and_a_killed_run_resumes_exactly(folder: Path, upright: Upright) -> None:
    options = (*TWO, "--save_every_n_steps", 20)
    out = run_to_end(folder, "whole", *options, POSITIONS=str(folder / "positions"))
    assert out.count("epoch 1/2") == out.count("Next: upright test") == 1
    for epoch in (0, 1):
        mine, others = (shares(folder / f"positions-{rank}", epoch) for rank in (0, 1))
        assert len(mine) == len(others) and sorted(mine + others) == list(range(1168))
    killed_run = fit(folder, "killed", *options, kill_at="step:100", KILL_RANK="1")
    assert killed_run.returncode != 0 and last(folder / "checkpoints/killed")["global_step"] == 80
    run_to_end(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert {path.name for path in (folder / "checkpoints/killed").iterdir() if path.suffix != ".png"} == {
        "config.yaml",
        "best.ckpt",
        "last.ckpt",
        "metrics.csv",
    }
    # The metrics of two processes equal those of one.
    metrics = torch.load(folder / "checkpoints/whole/best.ckpt", weights_only=True)["upright"]["metrics"]
    sys.modules.pop("own", None)
    answer = upright("validate", "--ckpt_path", "checkpoints/whole")
    assert answer.code == 0, answer.err
    for name in ("accuracy", "loss", "f1"):
        assert f"{metrics[f'val/{name}']:.6f}"[:7] in answer.out


def group(arguments: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start processes that all receive Ctrl-C from a terminal."""
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
def test_ctrl_c_stops_all_processes_at_one_step(folder: Path, launcher: str) -> None:
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
def test_two_stopped_processes_resume_exactly(folder: Path) -> None:
    run_to_end(folder, "whole", *SHORT)
    # Only one process gets the signal.
    process = fit(folder, "stopped", *SHORT, kill_at="step:6", kill_with="SIGTERM", KILL_RANK="1")
    assert process.returncode == 143 and "stopped after step 6;" in process.stderr
    run_to_end(folder, "stopped", *SHORT, "--ckpt_path", "auto")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/stopped") == []


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    own = command("a", *SHORT, *arguments)[3:]
    return subprocess.run(
        [*TORCHRUN, *own], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.slow
def test_torchrun_replaces_a_run_and_prints_errors_once(folder: Path) -> None:
    assert torchrun(folder).returncode == 0
    before = last(folder / "checkpoints/a")["upright"]["run"]["id"]
    process = torchrun(folder)
    assert process.returncode == 1 and process.stderr.count("upright: error: Run 'checkpoints/a' exists") == 1
    process = torchrun(folder, "--force", "--trainer.max_epochz", 1)
    assert process.returncode == 1 and process.stderr.count("upright: error: unknown option") == 1
    process = torchrun(folder, "--force")
    assert process.returncode == 0, process.stderr
    assert last(folder / "checkpoints/a")["upright"]["run"]["id"] != before
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["a"]


def slurm(folder: Path, rank: int = 0, tasks: int = 1) -> dict[str, str]:
    """Return the environment of a SLURM task, with an ``scontrol`` that records its requests."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requests\n')
    scontrol.chmod(0o755)
    variables = {"JOB_ID": "123", "JOB_NAME": "x", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1}
    variables |= {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NODELIST": "localhost"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {f"SLURM_{name}": str(value) for name, value in variables.items()} | {"PATH": path}


def test_slurm_requeues_a_job_and_the_same_command_resumes(folder: Path) -> None:
    options = ("--trainer.max_epochs", 2, "--ckpt_path", "auto")
    run_to_end(folder, "whole", *options)
    # A checkpoint in Lightning's own place is not used.
    (folder / "checkpoints/hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    process = fit(folder, "job", *options, kill_at="step:8", kill_with="SIGUSR1", **slurm(folder))
    assert process.returncode == 128 + signal.SIGUSR1 and "stopped after step 8;" in process.stderr
    assert (folder / "requests").read_text() == "requeue 123\n"
    # SLURM stops a job without a warning, for example for a more urgent one.
    process = fit(folder, "job", *options, kill_at="step:13", kill_with="SIGTERM", **slurm(folder))
    assert process.returncode == 143 and (folder / "requests").read_text() == "requeue 123\n"
    run_to_end(folder, "job", *options, **slurm(folder))
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/job") == []
    assert not list((folder / "checkpoints/job").glob("hpc*"))
    assert "is complete" in run_to_end(folder, "job", *options, **slurm(folder))


@pytest.mark.slow
def test_two_tasks_of_slurm_resume_exactly(folder: Path) -> None:
    options = (*SHORT, "--ckpt_path", "auto")

    def srun(**more: str) -> list[str]:
        tasks = [group(command("job", *options), folder, **slurm(folder, rank, 2), **more) for rank in (0, 1)]
        answers = [task.communicate(timeout=100)[1] for task in tasks]
        assert [task.returncode for task in tasks] == ([138, 0] if more else [0, 0]), answers
        return answers

    srun(KILL_AT="step:5", KILL_WITH="SIGUSR1", MASTER_PORT="29581")
    assert (folder / "requests").read_text() == "requeue 123\n"
    assert last(folder / "checkpoints/job")["global_step"] in (5, 6)
    srun()
    run_to_end(folder, "whole", *SHORT)
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/job") == []


@pytest.mark.slow
def test_two_nodes_equal_two_processes(folder: Path) -> None:
    options = (*SHORT[2:], "--trainer.devices", 1, "--trainer.num_nodes", 2)
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7"]
    line = [*TORCHRUN[:3], *rendezvous, "--rdzv-endpoint", "localhost:29567", "-m", "upright"]
    nodes = [group([*line, *command("nodes", *options)[3:]], folder) for _ in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=100)
        assert node.returncode == 0, err
    run_to_end(folder, "whole", *SHORT)
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/nodes") == []
