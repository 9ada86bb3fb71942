"""A search over options of fit: what its file may say, and what becomes of its trials."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import CONFIGS, ROOT, Upright
from upright.errors import UprightError
from upright.runs.sweeping.space import Range, as_arguments, read_space
from upright.runs.sweeping.sweep import sweep
from upright.runs.sweeping.trial import COMMAND

LENET = ROOT / "configs/lenet.yaml"
FOLDER = Path("checkpoints/try")
SPACE: dict[str, Any] = {
    "config": str(LENET),
    "metric": "val/loss",
    "trials": 3,
    "space": {"x": {"low": 0.0, "high": 1.0}, "kind": ["a", [1, 2]], "epochs": 2},
}
# What `upright fit` leaves, in a hundredth of the time. Its loss is x; `x` above `fail` fails, and so on.
STUB = """
import json, os, pickle, sys, time, zipfile
from pathlib import Path

options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if "=" in argument)
folder = Path(options["trainer.default_root_dir"], options["name"])
x, epochs = float(options["x"]), int(options["epochs"])
do = json.loads(os.environ.get("STUB", "{}"))
if "mistake" in do:
    print("upright: error: " + do["mistake"], file=sys.stderr)
    sys.exit(2)
if x > do.get("fail", 2):
    sys.exit("Traceback\\nRuntimeError: x is too large\\n")
if x > do.get("kill", 2):
    os.kill(os.getpid(), 9)
folder.mkdir(parents=True)
(folder / "pid").write_text(str(os.getpid()))
rows = "epoch,val/loss,val/accuracy\\n"
for epoch in range(epochs):
    rows += f"{epoch},{x},{1 - x}\\n"
    (folder / "new").write_text(rows)
    os.replace(folder / "new", folder / "metrics.csv")
    time.sleep(do.get("sleep", 0))
contents = {"state_dict": {}, "upright": {"format": 1, "metrics": {"val/loss": x, "val/accuracy": 1 - x}}}
with zipfile.ZipFile(folder / "best.ckpt", "w") as archive:
    archive.writestr("best/data.pkl", pickle.dumps(contents, protocol=2))
    archive.writestr("best/version", "3\\n")
    archive.writestr("best/byteorder", "little")
"""

Sweep = Callable[..., int]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Sweep with a trial that takes no time: `stub(SPACE | {...}, trials=3, do={"sleep": 1})`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("upright.runs.sweeping.search.POLL", 0.02)
    (tmp_path / "stub.py").write_text(STUB)

    def run(space: dict[str, Any] = SPACE, do: dict[str, Any] | None = None, **options: Any) -> int:
        monkeypatch.setenv("STUB", json.dumps(do or {}))
        (tmp_path / "try.yaml").write_text(yaml.safe_dump(space))
        return sweep("try.yaml", **{"command": (sys.executable, "-S", "stub.py"), **options})

    return run


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader((FOLDER / "trials.csv").read_text().splitlines()))


def in_order() -> list[dict[str, str]]:
    return sorted(rows(), key=lambda row: int(row["trial"]))


def searched() -> list[tuple[str, str]]:
    return [(row["x"], row["kind"]) for row in in_order()]


def test_a_space_is_read(tmp_path: Path) -> None:
    space = {"a": {"low": "1e-4", "high": 1, "log": True}, "b": {"low": 1, "high": 9, "step": 2}, "c": [None, {"d": 1}]}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"space": space | {"e": "x"}}))
    found = read_space(path)
    assert found.options == {"a": Range(1e-4, 1, True), "b": Range(1, 9, False, 2), "c": [None, {"d": 1}], "e": ["x"]}
    assert (found.direction, found.searched) == ("minimize", ["a", "b", "c"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"trails": 3}, "unknown key 'trails'. Did you mean 'trials'? Allowed: config, metric, trials, seed, space"),
        ({"config": "nope.yaml"}, "there is no config 'nope.yaml' (it is looked for beside this file)"),
        ({"config": None}, "'try.yaml' needs 'config', like configs/sweeps/"),
        ({"space": [1]}, "'space' must be options of `upright fit`"),
        ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
        ({"trials": None}, "How many trials? --trials 20, or `trials: 20` in 'try.yaml'"),
        ({"metric": "test/accuracy"}, "'test/accuracy' is not of the validation split (val/...)"),
        ({"metric": "val/accuracy"}, "does not say what is better: {name: val/accuracy, direction: maximize}"),
        ({"metric": {"name": "val/loss", "direction": "up"}}, "has direction 'up'"),
        ({"metric": {"nam": "val/loss"}}, "metric must be a name or {name: val/accuracy"),
        ({"space": {"x": {"low": 1, "hihg": 2}}}, "x: unknown key 'hihg' of a range. Did you mean 'high'?"),
        ({"space": {"x": {"low": 2, "high": 1}}}, "low below high, got {'high': 1, 'low': 2}"),
        ({"space": {"x": {"low": 1, "high": "many"}}}, "low below high"),
        ({"space": {"x": {"low": 0, "high": 1, "log": True}}}, "with it low is above 0 and no step"),
        ({"space": {"x": {"low": 0, "high": 1, "step": 0.3}}}, "steps of 0.3 do not lead from 0 to 1"),
        ({"space": {"x": {"low": 0, "high": 1}}}, "x: whole numbers from 0 to 1 are these two: [0, 1], or low: 0.0"),
        ({"space": {"x": []}}, "x: a choice of nothing"),
        ({"space": {"x": [1, 2, 1]}}, "x: 1 is there twice"),
        ({"space": {"name": ["a", "b"]}}, "'name' is the sweep's own"),
        ({"space": {"trainer.default_root_dir": "x"}}, "'trainer.default_root_dir' is the sweep's own"),
    ],
)
def test_a_mistake_in_the_file_is_named_and_leaves_nothing(
    stub: Sweep, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UprightError) as error:
        stub(SPACE | change)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"options": ["--name=x"]}, "'name' is the sweep's own"),
        ({"options": ["--x", "1"]}, "'x' is searched by 'try.yaml' and cannot be fixed too"),
        ({"name": "a/b"}, "must be a plain folder name"),
        ({"trials": 0}, "How many trials?"),
    ],
)
def test_a_mistake_in_the_command(stub: Sweep, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        stub(**options)
    assert not (tmp_path / "checkpoints").exists()


def test_a_storage_that_cannot_be_had(stub: Sweep) -> None:
    for url in ("nonsense", "postgresql+nodriver://x/y"):
        with pytest.raises(UprightError, match=r"--storage cannot be opened: .* for example postgresql://"):
            stub(storage=url)


def test_trials_are_runs_and_the_best_is_shown(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert stub() == 0
    table = rows()
    assert [row["state"] for row in table] == ["complete"] * 3
    losses = [float(row["val/loss"]) for row in table]
    assert losses == sorted(losses)
    best = Path(table[0]["folder"])
    out = capsys.readouterr().out
    assert f"Run:    {best}\nNext:   upright test --ckpt_path {best}/best.ckpt" in out
    record = json.loads((best / "trial.json").read_text())
    assert record["state"] == "complete" and record["options"]["epochs"] == 2
    assert f"--x={record['options']['x']}" in (best / "log.txt").read_text().splitlines()[0]


def test_what_is_better_can_be_more(stub: Sweep) -> None:
    assert stub(SPACE | {"metric": {"name": "val/accuracy", "direction": "maximize"}}) == 0
    accuracies = [float(row["val/accuracy"]) for row in rows()]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) == 3


def test_a_sweep_that_goes_on_searches_what_one_that_was_not_stopped_does(stub: Sweep) -> None:
    assert stub(trials=12, name="try") == 0
    whole = searched()
    FOLDER.rename("checkpoints/whole")
    assert stub(trials=5) == 0 and stub(trials=12) == 0
    assert searched() == whole and len(set(whole)) == 12
    before = (FOLDER / "trials.csv").read_text()
    assert stub(trials=12) == 0 and (FOLDER / "trials.csv").read_text() == before


def test_a_trial_that_fails_or_is_killed_does_not_end_the_sweep(stub: Sweep) -> None:
    assert stub(trials=8, do={"fail": 0.5, "kill": 0.3}) == 0
    failed = [row for row in rows() if row["state"] == "failed"]
    assert len(rows()) == 8 and {row["error"] for row in failed} == {
        "RuntimeError: x is too large",
        "ended by SIGKILL (is there enough memory?)",
    }
    record = json.loads(Path(failed[0]["folder"], "trial.json").read_text())
    assert (record["state"], record["error"]) == ("failed", failed[0]["error"])


def test_without_any_score_the_sweep_says_why(stub: Sweep) -> None:
    with pytest.raises(UprightError, match=r"No trial of 'checkpoints/try' has a score: RuntimeError: x is too large"):
        stub(do={"fail": -1})


def test_a_mistake_of_the_first_trial_is_one_of_all(stub: Sweep) -> None:
    with pytest.raises(UprightError, match=r"The first trial made a mistake: unknown key 'x'\."):
        stub(do={"mistake": "unknown key 'x'."})
    assert not FOLDER.exists()
    with pytest.raises(UprightError, match=r"no metric 'val/los'\. Did you mean 'val/loss'\? It has val/loss, val/acc"):
        stub(SPACE | {"metric": {"name": "val/los", "direction": "minimize"}})
    assert not FOLDER.exists()
    # Later it may be the values of one trial.
    assert stub(trials=1) == 0 and stub(trials=2, do={"mistake": "widths too large."}) == 0
    assert rows()[1]["error"] == "widths too large."


def test_another_space_needs_another_name(stub: Sweep) -> None:
    assert stub(trials=1) == 0
    for space, text in (
        (SPACE | {"space": SPACE["space"] | {"x": {"low": 0, "high": 2}}}, "space.x.high was 1.0 and is 2"),
        (SPACE | {"space": SPACE["space"] | {"y": 1}}, "space.y was not there and is [1]"),
        (SPACE | {"config": str(ROOT / "configs/mlp.yaml")}, "config lenet.yaml"),
        (SPACE | {"seed": 1}, "seed was 0 and is 1"),
    ):
        with pytest.raises(UprightError) as error:
            stub(space)
        assert "Sweep 'try' is of another space: " in str(error.value) and text in str(error.value)
    with pytest.raises(UprightError, match="options was not there"):
        stub(options=["--y=1"])


def test_a_folder_that_is_no_sweeps_is_left_alone(stub: Sweep) -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / "best.ckpt").touch()
    with pytest.raises(UprightError, match="'checkpoints/try' is there and not of a sweep; give"):
        stub()
    assert [path.name for path in FOLDER.iterdir()] == ["best.ckpt"]


def test_the_same_parameters_are_trained_once(stub: Sweep) -> None:
    assert stub(SPACE | {"space": {"x": [0.1, 0.2], "epochs": 1}}, trials=6) == 0
    assert len(rows()) == 6 and len(list(FOLDER.glob("trial-*"))) == 2
    assert {row["folder"] for row in rows()} == {str(path) for path in FOLDER.glob("trial-*")}
    assert sum(row["state"] == f"same as {rows()[0]['trial']}" for row in rows()) >= 1


def test_a_bad_trial_is_pruned_and_its_folder_stays(stub: Sweep) -> None:
    space = SPACE | {"space": {"x": {"low": 0.0, "high": 1.0}, "epochs": 3}}
    assert stub(space, trials=6) == 0
    assert stub(space, trials=14, do={"sleep": 0.1}) == 0
    pruned = [row for row in rows() if row["state"] == "pruned"]
    assert pruned and all(not Path(row["folder"], "best.ckpt").exists() for row in pruned)
    for row in pruned:
        assert json.loads(Path(row["folder"], "trial.json").read_text())["state"] == "pruned"
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(row["folder"], "pid").read_text()), 0)
    assert stub(space, trials=20, prune=False) == 0
    assert len([row for row in rows() if row["state"] == "pruned"]) == len(pruned)


def test_time_is_up(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert stub(trials=1) == 0
    assert stub(trials=50, timeout=0.01) == 0
    assert 1 < len(rows()) < 50 and "of 50 trials; the same command goes on" in capsys.readouterr().out


DRIVER = """
import signal, sys
# A shell lets its background jobs ignore Ctrl-C, and they what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
from upright.runs.sweeping import search, sweep
search.POLL = 0.02
sys.exit(sweep.sweep("try.yaml", command=[sys.executable, "-S", "stub.py"], trials=int(sys.argv[1])))
"""


@pytest.fixture
def started(stub: Sweep) -> Callable[..., subprocess.Popen[str]]:
    """A sweep in a process of its own."""

    def start(trials: int, **do: Any) -> subprocess.Popen[str]:
        Path("try.yaml").write_text(yaml.safe_dump(SPACE))
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(trials)],
            env={**os.environ, "STUB": json.dumps(do)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def until(path: Path) -> str:
    for _ in range(3000):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} does not come")


def test_two_processes_share_a_sweep(started: Callable[..., subprocess.Popen[str]]) -> None:
    both = [started(12, sleep=0.05) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.count("val/loss 0.") >= 2  # each had its share
    ended = in_order()
    assert len(ended) == 12 and len(set(searched())) == 12
    assert {row["state"] for row in ended} <= {"complete", "pruned"}
    assert len({row["folder"] for row in ended}) == 12 == len(list(FOLDER.glob("trial-*")))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_goes_on_with_the_same_parameters(
    started: Callable[..., subprocess.Popen[str]], stub: Sweep, how: signal.Signals
) -> None:
    process = started(2, sleep=60)
    trial = int(until(FOLDER / "trial-000/pid"))
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "\nStopped after 0 of 2 trials; the same command goes on.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(trial, 0)
    before = json.loads((FOLDER / "trial-000/trial.json").read_text())
    assert before["state"] == "stopped" and not list(FOLDER.glob(".trial*"))
    assert stub(trials=2) == 0
    after = json.loads((FOLDER / "trial-001/trial.json").read_text())
    assert (after["state"], after["options"]) == ("complete", before["options"])
    assert [row["trial"] for row in in_order()] == ["1", "2"]


def test_killed_it_goes_on_with_the_same_parameters(started: Callable[..., subprocess.Popen[str]], stub: Sweep) -> None:
    process = started(2, sleep=60)
    trial = int(until(FOLDER / "trial-000/pid"))
    options = (FOLDER / "trial-000.log").read_text().split("--x=")[1].split(" --name")[0]
    process.kill()
    process.communicate()
    os.kill(trial, signal.SIGKILL)  # the stub does not watch for its sweep's end; the test below does
    assert stub(trials=2) == 0
    assert (FOLDER / "trial-001/log.txt").read_text().split("--x=")[1].split(" --name")[0] == options
    assert (FOLDER / "trial-000/log.txt").is_file() and [row["trial"] for row in in_order()] == ["1", "2"]


@pytest.mark.slow
def test_a_trial_of_a_machine_that_is_gone_is_tried_again(
    started: Callable[..., subprocess.Popen[str]], stub: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = started(1, sleep=60)
    trial = int(until(FOLDER / "trial-000/pid"))
    process.kill()
    process.communicate()
    os.kill(trial, signal.SIGKILL)
    # Of another machine there is no lock to look at.
    (FOLDER / ".trial-000.lock").unlink()
    with pytest.raises(UprightError, match="has a score: none has ended"):
        stub(trials=1)
    monkeypatch.setattr("upright.runs.sweeping.sweep.HEARTBEAT", 1)
    time.sleep(6)
    assert stub(trials=1) == 0 and [row["trial"] for row in rows()] == ["1"]


@pytest.mark.slow
def test_what_kills_its_sweep_is_not_tried_without_end(
    started: Callable[..., subprocess.Popen[str]], stub: Sweep
) -> None:
    for number in range(3):
        process = started(2, sleep=60)
        trial = int(until(FOLDER / f"trial-{number:03d}/pid"))
        process.kill()
        process.communicate(timeout=60)
        os.kill(trial, signal.SIGKILL)
    assert stub(trials=2) == 0
    assert [(row["trial"], row["state"]) for row in in_order()] == [("2", "failed"), ("3", "complete")]


def test_a_trial_ends_with_the_sweep_that_started_it() -> None:
    code = "from upright.runs.sweeping.trial import end_with_parent; end_with_parent(); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert process.stdin
    process.stdin.close()
    assert process.wait(10) == -signal.SIGKILL


SEALED = """
from upright.data.digits import Digits

class Sealed(Digits):
    def loader(self, split, **options):
        return super().loader(self.closed(split), **options)

    def _samples(self, split):
        return super()._samples(self.closed(split))

    def originals(self, split):
        return super().originals(self.closed(split))

    def closed(self, split):
        if split == "test":
            raise RuntimeError("the test split was touched")
        return split
"""


def test_real_trials_leave_the_test_split_sealed(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "sealed.py").write_text(SEALED)
    widths = [[6, 16, 120, 84], [4, 8, 30, 20]]
    space = {
        "model.optimizer.init_args.lr": {"low": 0.001, "high": 0.01, "log": True},
        "model.network.init_args.widths": widths,
        "trainer.limit_train_batches": 2,
        "data": [{"class_path": "sealed.Sealed"}],
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(SPACE | {"space": space}))
    options = ("--", "--trainer.max_epochs", 2, "--wandb", "off")
    answer = upright("sweep", "try.yaml", "--trials", 2, *options)
    assert answer.code == 0, answer.err
    assert "is the best of 2 runs" in " ".join(answer.out.split()) and (FOLDER / "selection.md").is_file()
    for row in rows():
        folder = Path(row["folder"])
        files = {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "log.txt", "trial.json", "val_predictions.npz"}
        assert {path.name for path in folder.iterdir() if path.suffix != ".png"} == files
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["optimizer"]["init_args"]["lr"] == float(row["model.optimizer.init_args.lr"])
        assert config["model"]["network"]["init_args"]["widths"] == json.loads(row["model.network.init_args.widths"])
        told = torch.load(folder / "best.ckpt", weights_only=True)["upright"]["metrics"]["val/loss"]
        assert float(row["val/loss"]) == pytest.approx(told, rel=1e-5)
    assert "The test split was not opened for any of these runs." in " ".join(answer.out.split()) and not list(
        tmp_path.rglob("test*")
    )
    with pytest.raises(RuntimeError, match="the test split was touched"):
        upright("test", "--ckpt_path", folder / "best.ckpt")


def test_a_real_mistake_stops_at_the_first_trial(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(SPACE | {"space": {"model.netwrk.x": [1, 2]}}))
    answer = upright("sweep", "try.yaml")
    assert answer.code == 2 and answer.err.count("\n") == 1 and not FOLDER.exists()
    assert "The first trial made a mistake: unknown" in answer.err and "Did you mean" in answer.err


def test_values_reach_the_parser_as_they_are(upright: Upright, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-05}}
    values = {"model.optimizer": optimizer, "data.augment": [], "trainer.max_epochs": 7, "trainer.max_time": None}
    values |= {"model.network.init_args.activation": "tanh", "trainer.enable_progress_bar": True}
    with pytest.raises(SystemExit):
        upright("fit", "--config", LENET, *as_arguments(values), "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-5 and config["data"]["init_args"]["augment"] == []
    assert config["trainer"]["max_epochs"] == 7 and config["trainer"]["max_time"] is None
    assert config["model"]["network"]["init_args"]["activation"] == "tanh"


@pytest.mark.parametrize(
    "path", [path for path in sorted(ROOT.glob("configs/sweeps/*.yaml")) if path.stem != "wandb"], ids=lambda p: p.stem
)
def test_the_sweeps_of_the_configs_are_read(path: Path) -> None:
    space = read_space(path)
    assert space.trials and space.searched and all(config.resolve() in CONFIGS for config in space.configs)


def test_a_run_of_the_wandb_agent(upright: Upright, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    described = yaml.safe_load((ROOT / "configs/sweeps/wandb.yaml").read_text())
    parameters = described["parameters"]
    chosen = {name: p.get("value", p.get("values", [p.get("min")])) for name, p in parameters.items()}
    values = {name: {"value": v[0] if isinstance(v, list) else v} for name, v in chosen.items()}
    # The agent's own code makes the arguments; it puts the run's id in the environment.
    arguments = utils.create_sweep_command_args({"args": values})["args"]
    command = [part for part in utils.create_sweep_command(described["command"]) if part != "${env}"]
    assert command[:2] == ["${program}", "fit"] and described["program"] == "upright" and command[-1] == "${args}"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    config = [str(ROOT / part) if part.startswith("configs/") else part for part in command[2:-1]]
    quick = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2, "--wandb", "off")
    for run_id in ("abc123", "def456"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        answer = upright("fit", *config, *arguments, *quick)
        assert answer.code == 0, answer.err
        folder = tmp_path / f"checkpoints/lenet-{run_id}"
        assert torch.load(folder / "best.ckpt", weights_only=True)["upright"]["run"]["id"] == run_id
        written = yaml.safe_load((folder / "config.yaml").read_text())
        assert written["model"]["network"]["init_args"]["widths"] == [6, 16, 120, 84]
        assert written["model"]["optimizer"]["init_args"]["lr"] == 0.0003


def test_a_trial_is_upright_fit() -> None:
    assert COMMAND[-1] == "fit"
