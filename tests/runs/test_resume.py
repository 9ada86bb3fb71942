"""A killed and resumed run ends with exactly the weights of an uninterrupted one, wherever it was killed."""

import os
import random
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from tests.conftest import Upright
from tests.runs.killing import (
    AVERAGED,
    CONFIG,
    differences,
    fit,
    last,
    prepare,
    rows_of,
    run_and_kill,
    run_to_end,
    start,
)
from tests.runs.test_cli import LENET, QUICK, save_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_killed_and_resumed_equals_uninterrupted(folder: Path) -> None:
    # One kill is within an epoch, steps after the last checkpoint. The other is in validation, after a step that saves.
    options = ("--save_every_n_steps", 6)
    run_to_end(folder, "whole", *options)
    run_and_kill(folder, "killed", *options, at="step:28")
    assert last(folder / "checkpoints/killed")["global_step"] == 24
    run_and_kill(folder, "killed", *options, "--ckpt_path", "last", at="validation:2")
    assert last(folder / "checkpoints/killed")["global_step"] == 30
    run_to_end(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert [row["epoch"] for row in rows_of(folder / "checkpoints/killed")] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_second_kill_within_an_accumulation(tmp_path: Path) -> None:
    folder = prepare(tmp_path, AVERAGED)
    options = ("--save_every_n_steps", 2, "--trainer.accumulate_grad_batches", 3, "--trainer.max_epochs", 2)
    run_to_end(folder, "whole", *options)
    run_and_kill(folder, "killed", *options, at="step:14")
    # The first batch after a restart is within a window, at a step that is saved.
    run_and_kill(folder, "killed", *options, "--ckpt_path", "last", at="step:3")
    run_to_end(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert last(folder / "checkpoints/killed")["averaging_state"]["n_averaged"] == 12


def test_the_comparison_can_fail(folder: Path) -> None:
    options = ("--save_every_n_steps", 4, "--trainer.max_epochs", 1)
    run_to_end(folder, "whole", *options)
    run_and_kill(folder, "killed", *options, at="step:11")
    run = folder / "checkpoints/killed"
    checkpoint = last(run)
    assert checkpoint["Digits"] == {"epoch": 0, "position": 8}
    checkpoint["Digits"]["position"] = 7
    torch.save(checkpoint, run / "last.ckpt")
    run_to_end(folder, "killed", *options, "--ckpt_path", "last")
    changes = differences(folder / "checkpoints/whole", run)
    assert "last.ckpt /state_dict/model.network.layers.1.weight" in changes and changes[-1].startswith("metrics.csv")


def test_a_truncated_checkpoint_is_not_used(folder: Path) -> None:
    options = ("--save_every_n_steps", 4, "--trainer.max_epochs", 1)
    run_to_end(folder, "whole", *options)
    run_and_kill(folder, "killed", *options, at="write:3")
    run = folder / "checkpoints/killed"
    assert (run / ".last.ckpt.new").is_file() and last(run)["global_step"] == 8
    run_to_end(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", run) == [] and not (run / ".last.ckpt.new").exists()
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:5000])
    process = fit(folder, "killed", "--ckpt_path", "last")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "killed/last.ckpt' is not a complete checkpoint" in process.stderr and "--ckpt_path best" in process.stderr


@pytest.mark.slow
def test_auto_starts_resumes_and_completes_a_run(folder: Path) -> None:
    options = ("--ckpt_path", "auto", "--trainer.max_epochs", 2)
    # It is killed before a step, then with best.ckpt but without last.ckpt, then with both.
    run_and_kill(folder, "auto", *options, at="fit_start:1")
    run_and_kill(folder, "auto", *options, at="rename:2")
    run = folder / "checkpoints/auto"
    assert not (run / "last.ckpt").exists() and (run / "best.ckpt").exists()
    run_and_kill(folder, "auto", *options, at="step:6")
    run_to_end(folder, "auto", *options)
    run_to_end(folder, "whole", "--trainer.max_epochs", 2)
    assert differences(folder / "checkpoints/whole", run) == []
    before = (run / "last.ckpt").read_bytes()
    assert "is complete: all its epochs are done" in run_to_end(folder, "auto", *options)
    assert (run / "last.ckpt").read_bytes() == before


def test_auto_needs_an_experiment_and_leaves_other_folders_alone(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--ckpt_path", "auto")
    assert answer.code == 2 and "fit needs an experiment" in answer.err
    (tmp_path / "checkpoints/lenet").mkdir(parents=True)
    (tmp_path / "checkpoints/lenet/thesis.tex").touch()
    answer = upright("fit", "--config", LENET, "--ckpt_path", "auto", *QUICK)
    assert answer.code == 2 and "not the folder of a run" in answer.err
    assert (tmp_path / "checkpoints/lenet/thesis.tex").exists()


def test_a_run_replaced_by_a_killed_one_is_restored(folder: Path) -> None:
    run_to_end(folder, "a", "--trainer.max_epochs", 1)
    before = (folder / "checkpoints/a/last.ckpt").read_bytes()
    run_and_kill(folder, "a", "--force", at="step:3")
    assert not (folder / "checkpoints/a/last.ckpt").exists()
    process = fit(folder, "a")
    assert process.returncode == 2 and "Run 'checkpoints/a' exists" in process.stderr
    assert (folder / "checkpoints/a/last.ckpt").read_bytes() == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["a"]


def other_file_system(folder: Path) -> Path | None:
    """Return a folder on another file system than ``folder``, which is on that of temporary files."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == folder.stat().st_dev:
        return None
    return Path(tempfile.mkdtemp(dir=shared))


PLACES = {
    # Every second write is that of best.ckpt.
    "inside a save": ["write:1", "rename:3", "write:4", "rename:2"],
    "validation": ["validation_start:1", "validation:3", "validation:7", "validation_end:1"],
    "an epoch's edge": ["epoch_end:1", "metrics:1", "epoch_start:2", "epoch_start:1"],
}
SERIES = {
    "places": (CONFIG, ("--save_every_n_steps", 4), [*PLACES["inside a save"], *PLACES["validation"]]),
    "edges": (CONFIG, (), PLACES["an epoch's edge"]),
    "accumulation": (
        CONFIG,
        ("--save_every_n_steps", 2, "--trainer.accumulate_grad_batches", 3),
        ["step:9", "step:3", "write:2", "validation:1"],
    ),
    "validation by batches": (
        CONFIG,
        ("--save_every_n_steps", 7, "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", 7),
        ["validation_start:1", "step:8"],
    ),
    "averages": (AVERAGED, ("--save_every_n_steps", 5), ["step:13", "validation:4", "write:2", "rename:2"]),
    "workers": (
        CONFIG,
        ("--save_every_n_steps", 2, "--data.cache", "none", "--data.num_workers", 2),
        ["step:4", "validation:1"],
    ),
    "another file system": (CONFIG, ("--save_every_n_steps", 4), ["write:2", "rename:3", "step:7"]),
}
RANDOM_KILLS = 2
"""Number of additional kills in each series, at random steps."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", SERIES)
def test_campaign_of_kills(tmp_path: Path, series: str) -> None:
    config, options, places = SERIES[series]
    # The run must be long enough for all kills.
    options += ("--trainer.max_epochs", 8)
    folder, draw = prepare(tmp_path, config), random.Random(series)
    if series == "workers":
        options += ("--data", "upright.data.folder.Folder", "--data.root", save_images(tmp_path / "images", 60))
        options += ("--data.size", 12, "--data.batch_size", 8, "--data.cache", "none", "--data.num_workers", 2)
    runs = folder / "checkpoints"
    if series == "another file system":
        elsewhere = other_file_system(tmp_path)
        if elsewhere is None:
            pytest.skip("there is only one file system")
        runs = elsewhere
        options += ("--trainer.default_root_dir", runs)
    run_to_end(folder, "whole", *options)
    places = [*places, *(f"step:{draw.randint(2, 9)}" for _ in range(RANDOM_KILLS))]
    draw.shuffle(places)
    for place in places:
        run_and_kill(folder, "killed", *options, "--ckpt_path", "auto", at=place)
    run_to_end(folder, "killed", *options, "--ckpt_path", "auto")
    assert differences(runs / "whole", runs / "killed") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_campaign_of_kills_at_random_times(folder: Path) -> None:
    options, draw = ("--save_every_n_steps", 1, "--trainer.max_epochs", 120), random.Random(0)
    run_to_end(folder, "whole", *options)
    kills = 0
    for _ in range(10):
        process = start(folder, "killed", *options, "--ckpt_path", "auto")
        process.join(draw.uniform(1, 6))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    run_to_end(folder, "killed", *options, "--ckpt_path", "auto")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert kills > 5
