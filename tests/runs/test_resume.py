"""A run that dies and goes on ends with the weights of a run that did not, bit by bit, wherever it died."""

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
    finished,
    fit,
    killed,
    last,
    prepare,
    rows_of,
    started,
)
from tests.runs.test_cli import LENET, QUICK, save_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_killed_and_resumed_equals_uninterrupted(folder: Path) -> None:
    # One kill is in mid-epoch, steps after the last checkpoint; one in validation, after a step that would save.
    options = ("--save_every_n_steps", 6)
    finished(folder, "whole", *options)
    killed(folder, "killed", *options, at="step:28")
    assert last(folder / "checkpoints/killed")["global_step"] == 24
    killed(folder, "killed", *options, "--ckpt_path", "last", at="validation:2")
    assert last(folder / "checkpoints/killed")["global_step"] == 30
    finished(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert [row["epoch"] for row in rows_of(folder / "checkpoints/killed")] == ["0", "1", "2"]


def test_a_second_death_in_the_window_of_an_accumulation(tmp_path: Path) -> None:
    folder = prepare(tmp_path, AVERAGED)
    options = ("--save_every_n_steps", 2, "--trainer.accumulate_grad_batches", 3, "--trainer.max_epochs", 2)
    finished(folder, "whole", *options)
    killed(folder, "killed", *options, at="step:14")
    # The first batch after a restart is amid a window, at a step that is saved.
    killed(folder, "killed", *options, "--ckpt_path", "last", at="step:3")
    finished(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert last(folder / "checkpoints/killed")["averaging_state"]["n_averaged"] == 12


def test_the_first_test_can_fail(folder: Path) -> None:
    options = ("--save_every_n_steps", 4, "--trainer.max_epochs", 1)
    finished(folder, "whole", *options)
    killed(folder, "killed", *options, at="step:11")
    run = folder / "checkpoints/killed"
    checkpoint = last(run)
    assert checkpoint["Digits"] == {"epoch": 0, "position": 8}
    checkpoint["Digits"]["position"] = 7
    torch.save(checkpoint, run / "last.ckpt")
    finished(folder, "killed", *options, "--ckpt_path", "last")
    found = differences(folder / "checkpoints/whole", run)
    assert "last.ckpt /state_dict/model.network.layers.1.weight" in found and found[-1].startswith("metrics.csv")


def test_a_cut_off_checkpoint_is_not_the_last(folder: Path) -> None:
    options = ("--save_every_n_steps", 4, "--trainer.max_epochs", 1)
    finished(folder, "whole", *options)
    killed(folder, "killed", *options, at="write:3")
    run = folder / "checkpoints/killed"
    assert (run / ".last.ckpt.new").is_file() and last(run)["global_step"] == 8
    finished(folder, "killed", *options, "--ckpt_path", "last")
    assert differences(folder / "checkpoints/whole", run) == [] and not (run / ".last.ckpt.new").exists()
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:5000])
    done = fit(folder, "killed", "--ckpt_path", "last")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "killed/last.ckpt' is not a complete checkpoint" in done.stderr and "--ckpt_path best" in done.stderr


def test_auto_begins_and_goes_on_and_has_an_end(folder: Path) -> None:
    options = ("--ckpt_path", "auto", "--trainer.max_epochs", 2)
    # Not a step; then best.ckpt, but not the last; then the last.
    killed(folder, "auto", *options, at="fit_start:1")
    killed(folder, "auto", *options, at="rename:2")
    run = folder / "checkpoints/auto"
    assert not (run / "last.ckpt").exists() and (run / "best.ckpt").exists()
    killed(folder, "auto", *options, at="step:6")
    finished(folder, "auto", *options)
    finished(folder, "whole", "--trainer.max_epochs", 2)
    assert differences(folder / "checkpoints/whole", run) == []
    before = (run / "last.ckpt").read_bytes()
    assert "is complete: all its epochs are done" in finished(folder, "auto", *options)
    assert (run / "last.ckpt").read_bytes() == before


def test_auto_needs_an_experiment_and_leaves_other_folders_alone(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--ckpt_path", "auto")
    assert answer.code == 2 and "fit needs an experiment" in answer.err
    (tmp_path / "checkpoints/lenet").mkdir(parents=True)
    (tmp_path / "checkpoints/lenet/thesis.tex").touch()
    answer = upright("fit", "--config", LENET, "--ckpt_path", "auto", *QUICK)
    assert answer.code == 2 and "not the folder of a run" in answer.err
    assert (tmp_path / "checkpoints/lenet/thesis.tex").exists()


def test_what_a_killed_run_had_replaced_comes_back(folder: Path) -> None:
    finished(folder, "a", "--trainer.max_epochs", 1)
    before = (folder / "checkpoints/a/last.ckpt").read_bytes()
    killed(folder, "a", "--force", at="step:3")
    assert not (folder / "checkpoints/a/last.ckpt").exists()
    done = fit(folder, "a")
    assert done.returncode == 2 and "Run 'checkpoints/a' exists" in done.stderr
    assert (folder / "checkpoints/a/last.ckpt").read_bytes() == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["a"]


def other_file_system(folder: Path) -> Path | None:
    """A folder on a file system other than that of ``folder``, which is that of temporary files."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == folder.stat().st_dev:
        return None
    return Path(tempfile.mkdtemp(dir=shared))


PLACES = {
    # Every other write is of best.ckpt.
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
RANDOM = 2
"""Kills more in each series, at random steps."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", SERIES)
def test_campaign(tmp_path: Path, series: str) -> None:
    config, options, places = SERIES[series]
    # Long enough for all of them.
    options += ("--trainer.max_epochs", 8)
    folder, draw = prepare(tmp_path, config), random.Random(series)
    if series == "workers":
        options += ("--data", "upright.data.folder.Folder", "--data.root", save_pictures(tmp_path / "pictures", 60))
        options += ("--data.size", 12, "--data.batch_size", 8, "--data.cache", "none", "--data.num_workers", 2)
    runs = folder / "checkpoints"
    if series == "another file system":
        elsewhere = other_file_system(tmp_path)
        if elsewhere is None:
            pytest.skip("there is one file system only")
        runs = elsewhere
        options += ("--trainer.default_root_dir", runs)
    finished(folder, "whole", *options)
    places = [*places, *(f"step:{draw.randint(2, 9)}" for _ in range(RANDOM))]
    draw.shuffle(places)
    for place in places:
        killed(folder, "killed", *options, "--ckpt_path", "auto", at=place)
    finished(folder, "killed", *options, "--ckpt_path", "auto")
    assert differences(runs / "whole", runs / "killed") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_campaign_at_any_moment(folder: Path) -> None:
    options, draw = ("--save_every_n_steps", 1, "--trainer.max_epochs", 120), random.Random(0)
    finished(folder, "whole", *options)
    kills = 0
    for _ in range(10):
        process = started(folder, "killed", *options, "--ckpt_path", "auto")
        process.join(draw.uniform(1, 6))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    finished(folder, "killed", *options, "--ckpt_path", "auto")
    assert differences(folder / "checkpoints/whole", folder / "checkpoints/killed") == []
    assert kills > 5
