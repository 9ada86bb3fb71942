"""The plan of a run, without a command line."""

from pathlib import Path

import pytest

from upright.errors import UserError
from upright.runs.plan import RunPlan, config_to_resume, plan_run, run_name


@pytest.mark.parametrize(
    ("name", "configs", "expected"),
    [
        ("mine", ["configs/lenet.yaml"], "mine"),
        (None, ["configs/lenet.yaml"], "lenet"),
        (None, ["configs/lenet.yaml", "trainer.yaml"], "lenet-trainer"),
        (None, ["checkpoints/first/config.yaml"], "first"),
        (None, ["checkpoints/first/config.yaml", "configs/presets/profile.yaml"], "first-profile"),
    ],
)
def test_the_name_of_a_run(name: str | None, configs: list[str], expected: str) -> None:
    assert run_name(name, configs) == expected


def test_runs_of_a_wandb_sweep_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    assert run_name(None, ["configs/lenet.yaml"]) == "lenet-r7" and run_name("mine", []) == "mine"


def test_a_run_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"The run has no name: give --config or --name"):
        run_name(None, [])


def plan(folder: Path, ckpt_path: str | None = None, start_from: str | None = None, force: bool = False) -> RunPlan:
    return plan_run(folder, ckpt_path=ckpt_path, start_from=start_from, force=force)


def run(folder: Path, *checkpoints: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", *checkpoints):
        (folder / name).touch()
    return folder


def test_a_new_run(tmp_path: Path) -> None:
    assert plan(tmp_path / "new") == RunPlan(tmp_path / "new", None, None)


def test_an_existing_run_is_replaced_only_with_force(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", "last.ckpt")
    with pytest.raises(UserError, match=r"exists: --ckpt_path last resumes it, --force replaces it, --name gives"):
        plan(folder)
    assert plan(folder, force=True) == RunPlan(folder, None, None)


@pytest.mark.parametrize("kind", ["last", "best"])
def test_last_and_best_are_checkpoints_of_the_run(tmp_path: Path, kind: str) -> None:
    folder = run(tmp_path / "one", "last.ckpt", "best.ckpt")
    resumed = plan(folder, kind)
    assert resumed.checkpoint == folder / f"{kind}.ckpt" and resumed.resumes_in_place
    with pytest.raises(UserError, match=rf"no '.*{kind}.ckpt' to resume from; leave --ckpt_path out to start"):
        plan(tmp_path / "two", kind)


def test_a_folder_means_its_last_checkpoint(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", "last.ckpt", "best.ckpt")
    elsewhere = plan(tmp_path / "two", str(folder))
    assert elsewhere.checkpoint == folder / "last.ckpt" and not elsewhere.resumes_in_place


@pytest.mark.parametrize(
    ("checkpoints", "expected"), [((), None), (("best.ckpt",), "best.ckpt"), (("best.ckpt", "last.ckpt"), "last.ckpt")]
)
def test_auto_resumes_from_a_checkpoint(tmp_path: Path, checkpoints: tuple[str, ...], expected: str | None) -> None:
    folder = run(tmp_path / "one", *checkpoints)
    assert plan(folder, "auto").checkpoint == (expected and folder / expected)


def test_weights_to_start_with_are_not_used_by_a_resumed_run(tmp_path: Path) -> None:
    source, folder = run(tmp_path / "source", "best.ckpt"), run(tmp_path / "one", "last.ckpt")
    assert plan(tmp_path / "new", start_from=str(source)).start == source / "best.ckpt"
    assert plan(folder, "auto", str(source)).start is None


def test_a_folder_that_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.png").touch()
    with pytest.raises(UserError, match=r"is not the folder of a run"):
        plan(tmp_path / "photos", force=True)


def test_the_config_of_the_run_to_resume(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", "last.ckpt")
    for ckpt_path, name in ((str(folder), None), (str(folder / "last.ckpt"), None), ("last", "one")):
        assert config_to_resume(ckpt_path, tmp_path, name) == folder / "config.yaml"
    with pytest.raises(UserError, match=r"fit needs an experiment, for example `upright fit --config"):
        config_to_resume("auto", tmp_path, "one")
    with pytest.raises(UserError, match=r"--ckpt_path best needs the name of a run: give --config or --name"):
        config_to_resume("best", tmp_path, None)
    with pytest.raises(UserError, match=r"holds no config.yaml of a run to resume; give --config"):
        config_to_resume("last", tmp_path, "two")
