"""Ctrl-C and SIGTERM, two runs in one folder, a full disk: one line reports it, and the run can be resumed."""

import os
import resource
import shlex
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock
from lightning.pytorch.callbacks import Callback

from tests.conftest import Upright
from tests.runs.killing import differences, fit, last, prepare, run_to_end, start
from tests.runs.test_cli import LENET, QUICK

DOWN_TO = ("--trainer.max_epochs", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def resume_arguments(line: str) -> list[str]:
    """Return the arguments in the command that a stopped run prints."""
    return shlex.split(line.partition("to resume: upright ")[2])


@pytest.mark.slow
def test_stopped_runs_resume_with_the_command_that_they_print(folder: Path, upright: Upright) -> None:
    run_to_end(folder, "complete", *DOWN_TO)
    process = fit(folder, "stopped", *DOWN_TO, "--save_every_n_steps", 7, kill_at="step:11", kill_with="SIGINT")
    assert process.returncode == 130
    notice, instruction = process.stderr.strip().splitlines()
    assert "stopping after this step or validation; press Ctrl-C again to end at once" in notice
    assert instruction.endswith(
        "stopped after step 11; to resume: upright fit --ckpt_path checkpoints/stopped/last.ckpt "
        "--wandb off --save_every_n_steps 7"
    )
    assert last(folder / "checkpoints/stopped")["global_step"] == 11
    # Validation continues to its end, so the epoch is complete.
    process = fit(
        folder, "stopped", *DOWN_TO, *resume_arguments(instruction)[1:], kill_at="validation:2", kill_with="SIGTERM"
    )
    assert process.returncode == 143 and "stopped after step 18;" in process.stderr
    answer = upright(*resume_arguments(instruction))
    assert answer.code == 0 and "Next: upright test" in answer.out
    assert differences(folder / "checkpoints/complete", folder / "checkpoints/stopped") == []


def test_a_run_stopped_within_an_accumulation_completes_the_step(folder: Path) -> None:
    options = (*DOWN_TO, "--trainer.accumulate_grad_batches", 3)
    run_to_end(folder, "complete", *options)
    process = fit(folder, "stopped", *options, kill_at="step:7", kill_with="SIGINT")
    assert process.returncode == 130 and "stopped after step 3;" in process.stderr
    run_to_end(folder, "stopped", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/complete", folder / "checkpoints/stopped") == []


def test_a_run_stopped_before_the_first_step_leaves_nothing(folder: Path) -> None:
    run_to_end(folder, "a", "--trainer.max_epochs", 1)
    before = last(folder / "checkpoints/a")["upright"]["run"]["id"]
    for arguments in (("b",), ("a", "--force")):
        process = fit(folder, *arguments, kill_at="fit_start:1", kill_with="SIGTERM")
        assert (
            process.returncode == 143
            and process.stderr == "upright: stopped before the first step; nothing was written.\n"
        )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["a"]
    assert last(folder / "checkpoints/a")["upright"]["run"]["id"] == before


def test_a_second_ctrl_c_ends_the_run_at_once(folder: Path) -> None:
    # After the first signal, it waits in validation for 300 seconds.
    process = start(folder, "a", "--trainer.max_epochs", "1", KILL_AT="validation:2", KILL_WITH="SIGINT", WAIT="300")
    waiting = folder / "waiting"
    while not waiting.exists():
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(1.1)
    assert process.is_alive() and process.pid
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT


def test_a_second_run_in_a_folder_is_refused(folder: Path, upright: Upright, request: pytest.FixtureRequest) -> None:
    process = start(folder, "a", "--trainer.max_epochs", "9999")
    request.addfinalizer(process.kill)
    while not (folder / "checkpoints/a/last.ckpt").exists():
        assert process.is_alive()
        time.sleep(0.05)
    before = last(folder / "checkpoints/a")["upright"]["run"]["id"]
    for options in ([], ["--force"], ["--ckpt_path", "last"], ["--ckpt_path", "auto"]):
        answer = upright("fit", "--config", "own.yaml", "--name", "a", *options, "--wandb", "off")
        assert answer.code == 2 and answer.err.count("\n") == 1
        assert "Run 'checkpoints/a' is running in another process: wait for it, stop it, or" in answer.err
    # Other commands may read the run.
    assert upright("validate", "--ckpt_path", "checkpoints/a/last.ckpt").code == 0
    process.kill()
    process.join()
    assert last(folder / "checkpoints/a")["upright"]["run"]["id"] == before
    answer = upright(
        "fit", "--config", "own.yaml", "--name", "a", "--force", "--trainer.max_epochs", 1, "--wandb", "off"
    )
    assert answer.code == 0 and [path.name for path in (folder / "checkpoints").iterdir()] == ["a"]


def test_one_of_two_new_runs_of_the_same_name_is_refused(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with FileLock(tmp_path / "checkpoints/.lenet.running"):
        answer = upright("fit", "--config", LENET, *QUICK)
        assert answer.code == 2 and "is running in another process" in answer.err
    assert upright("fit", "--config", LENET, *QUICK).code == 0


@pytest.fixture
def small_disk() -> object:
    """Limit the size of files, so that a larger file fails like on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_checkpoint(
    upright: Upright, folder: Path, monkeypatch: pytest.MonkeyPatch, small_disk: object
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    # Without plots, which would be the largest files.
    monkeypatch.setattr("upright.runs.cli.fit.RunPlots", lambda folder: Callback())
    first = ("fit", "--config", "own.yaml", "--wandb", "off", "--trainer.max_epochs", 1)
    assert upright(*first).code == 0
    run = folder / "checkpoints/own"
    header, row = (run / "metrics.csv").read_text().splitlines()
    # Make it larger than the config, as after many epochs.
    (run / "metrics.csv").write_bytes("\r\n".join([header, *[row] * 100, ""]).encode())
    complete, rows = ((run / name).read_bytes() for name in ("last.ckpt", "metrics.csv"))
    for size, name in ((len(complete) // 2, "best.ckpt"), (len(rows) // 2, "metrics.csv"), (100, "config.yaml")):
        small_disk(size)  # type: ignore[operator]
        answer = upright(*first[:-1], 3, "--ckpt_path", "last")
        small_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # type: ignore[operator]
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert answer.err.startswith("upright: error: File too large: '")
        assert answer.err.endswith(f"checkpoints/own/{name}'.\n")
        assert (run / "last.ckpt").read_bytes() == complete and (run / "metrics.csv").read_bytes()[: len(rows)] == rows
        assert {path.name for path in run.iterdir() if path.suffix != ".png"} == {
            "config.yaml",
            "best.ckpt",
            "last.ckpt",
            "metrics.csv",
        }
    assert upright(*first[:-1], 2, "--ckpt_path", "last").code == 0


def test_a_full_disk_at_the_start_leaves_no_run(
    upright: Upright, folder: Path, monkeypatch: pytest.MonkeyPatch, small_disk: object
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("upright.runs.cli.fit.RunPlots", lambda folder: Callback())
    small_disk(20_000)  # type: ignore[operator]
    answer = upright("fit", "--config", "own.yaml", "--wandb", "off", "--trainer.max_epochs", 1)
    assert answer.code == 2 and "checkpoints/own/best.ckpt'" in answer.err
    assert not (folder / "checkpoints").exists()
