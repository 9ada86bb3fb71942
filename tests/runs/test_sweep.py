"""A search over options of fit: its YAML, and its trials."""

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
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tests.conftest import CONFIGS, ROOT, Upright
from upright.errors import UprightError
from upright.runs.sweeping.space import as_arguments, read_space
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
# It writes the files of `upright fit` in a hundredth of the time. Its loss is x; an `x` above `fail` fails, and so on.
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
folder.mkdir(parents=True, exist_ok=True)
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
    """Return a sweep with fast trials: `stub(SPACE | {...}, trials=3, do={"sleep": 1})`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("upright.runs.sweeping.sweep.POLL_SECONDS", 0.02)
    (tmp_path / "stub.py").write_text(STUB)

    def run(space: dict[str, Any] = SPACE, do: dict[str, Any] | None = None, **options: Any) -> int:
        monkeypatch.setenv("STUB", json.dumps(do or {}))
        (tmp_path / "try.yaml").write_text(yaml.safe_dump(space))
        return sweep("try.yaml", **{"command": (sys.executable, "-S", "stub.py"), **options})

    return run


def records() -> list[dict[str, Any]]:
    """The record of every trial that has a folder, in order."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("trial-*/trial.json"))]


def searched() -> list[tuple[float, str]]:
    return [(record["options"]["x"], record["options"]["kind"]) for record in records()]


def test_reading_a_space(tmp_path: Path) -> None:
    options = {
        "a": {"low": "1e-4", "high": 1, "log": True},
        "b": {"low": 1, "high": 9, "step": 2},
        "c": [None, {"d": 1}],
    }
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"space": options | {"e": "x", "f": [{"g": 1}]}}))
    space = read_space(path)
    assert space.searched == {
        "a": FloatDistribution(1e-4, 1, log=True),
        "b": IntDistribution(1, 9, step=2),
        "c": CategoricalDistribution(["null", '{"d": 1}']),
    }
    assert (space.direction, space.fixed, space.prune) == ("minimize", {"e": "x", "f": {"g": 1}}, True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"trails": 3},
            "unknown key 'trails'. Did you mean 'trials'? Allowed: config, metric, space, trials, seed, prune",
        ),
        ({"config": "nope.yaml"}, "config 'nope.yaml' does not exist. Its path is relative to this file"),
        ({"config": None}, "'try.yaml' needs 'config', like configs/sweeps/"),
        ({"space": [1]}, "'space' must be options of `upright fit`"),
        ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
        ({"trials": None}, "trials must be a whole number of at least 1, got None"),
        ({"metric": "test/accuracy"}, "one of the validation split, like val/loss, got"),
        (
            {"metric": "val/accuracy"},
            "needs a direction, minimize or maximize: {name: val/accuracy, direction: maximize}",
        ),
        ({"metric": {"name": "val/loss", "direction": "up"}}, "metric 'val/loss' needs a direction"),
        ({"metric": {"nam": "val/loss"}}, "one of the validation split, like val/loss, got {'nam'"),
        ({"space": {"x": {"low": 1, "hihg": 2}}}, "x: a range is {low: 0.1, high: 1}, with `log: true` or a `step`"),
        ({"space": {"x": {"low": 2, "high": 1}}}, "x: a range is"),
        ({"space": {"x": {"low": 1, "high": "many"}}}, "x: a range is"),
        ({"space": {"x": {"low": 0, "high": 1, "log": True}}}, "x: a range is"),
        ({"space": {"x": {"low": 0, "high": 1}}}, "for the integers write [0, 1], for real numbers low: 0.0"),
        ({"space": {"x": []}}, "x: a choice needs at least one value, and different ones, got []"),
        ({"space": {"x": [1, 2, 1]}}, "x: a choice needs at least one value"),
        ({"space": {"name": ["a", "b"]}}, "'name' is set by the sweep"),
        ({"space": {"trainer.default_root_dir": "x"}}, "'trainer.default_root_dir' is set by the sweep"),
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
        ({"options": ["--name=x"]}, "'name' is set by the sweep"),
        ({"options": ["--x", "1"]}, "'x' is searched by 'try.yaml' and cannot be fixed too"),
        ({"name": "a/b"}, "must be a plain folder name"),
        ({"trials": 0}, "number of trials must be at least 1, got 0: --trials 20"),
    ],
)
def test_a_mistake_in_the_command_is_refused(stub: Sweep, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        stub(**options)
    assert not (tmp_path / "checkpoints").exists()


def test_trials_are_runs_and_the_best_is_printed(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert stub() == 0
    assert [record["state"] for record in records()] == ["complete"] * 3
    best = min(records(), key=lambda record: record["val/loss"])
    folder = FOLDER / f"trial-{best['trial']:03d}"
    out = capsys.readouterr().out
    assert f"Run:  {folder}\nNext: upright test --ckpt_path {folder}/best.ckpt" in out
    assert best["options"]["epochs"] == 2
    assert f"--x={best['options']['x']}" in folder.with_suffix(".log").read_text().splitlines()[0]


def test_a_metric_can_be_maximised(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert stub(SPACE | {"metric": {"name": "val/accuracy", "direction": "maximize"}}) == 0
    accuracies = [record["val/accuracy"] for record in records()]
    assert len(set(accuracies)) == 3 and f"Best: val/accuracy {max(accuracies):.6g}" in capsys.readouterr().out


def test_a_resumed_sweep_proposes_the_same_values(stub: Sweep) -> None:
    assert stub(trials=12, name="try") == 0
    complete = searched()
    FOLDER.rename("checkpoints/complete")
    assert stub(trials=5) == 0 and stub(trials=12) == 0
    assert searched() == complete and len(set(complete)) == 12
    assert stub(trials=12) == 0 and len(records()) == 12


def test_a_trial_that_fails_or_is_killed_does_not_end_the_sweep(
    stub: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stub(trials=8, do={"fail": 0.5, "kill": 0.3}) == 0
    failed = {line.split("failed: ")[1].split(" (checkpoints")[0] for line in printed(capsys) if "failed: " in line}
    assert failed == {"RuntimeError: x is too large", "ended by SIGKILL (is there enough memory?)"}
    assert len(list(FOLDER.glob("trial-*.log"))) == 8


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_failure_is_one_line_with_its_log(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UprightError, match=r"No trial of 'checkpoints/try' has a score"):
        stub(trials=1, do={"fail": -1})
    assert "trial 0  failed: RuntimeError: x is too large (checkpoints/try/trial-000.log)" in printed(capsys)


def test_a_mistake_in_the_first_trial_stops_the_sweep(stub: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UprightError, match=r"The first trial failed: unknown key 'x'\."):
        stub(do={"mistake": "unknown key 'x'."})
    assert not FOLDER.exists()
    with pytest.raises(
        UprightError, match=r"no metric 'val/los'\. Did you mean 'val/loss'\? Metrics: val/loss, val/acc"
    ):
        stub(SPACE | {"metric": {"name": "val/los", "direction": "minimize"}})
    assert not FOLDER.exists()
    # Later, the mistake may be in the values of one trial.
    assert stub(trials=1) == 0 and stub(trials=2, do={"mistake": "widths too large."}) == 0
    assert "trial 1  failed: widths too large. (checkpoints/try/trial-001.log)" in printed(capsys)


def test_another_space_needs_another_name(stub: Sweep) -> None:
    assert stub(trials=1) == 0
    for space, text in (
        (SPACE | {"space": SPACE["space"] | {"x": {"low": 0, "high": 2}}}, "space"),
        (SPACE | {"config": str(ROOT / "configs/mlp.yaml")}, "config"),
        (SPACE | {"seed": 1}, "seed"),
    ):
        with pytest.raises(UprightError, match=f"Sweep 'try' has another {text}; give this one another --name"):
            stub(space)
    with pytest.raises(UprightError, match="Sweep 'try' has another options"):
        stub(options=["--y=1"])
    assert stub(SPACE | {"prune": False, "trials": 1}) == 0


def test_a_folder_that_is_no_sweep_is_refused(stub: Sweep) -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / "best.ckpt").touch()
    with pytest.raises(UprightError, match="'checkpoints/try' exists and is not a sweep; give"):
        stub()
    assert [path.name for path in FOLDER.iterdir()] == ["best.ckpt"]


def test_a_bad_trial_is_pruned_and_its_folder_stays(stub: Sweep) -> None:
    space = SPACE | {"space": {"x": {"low": 0.0, "high": 1.0}, "epochs": 3}}
    assert stub(space, trials=6, do={"sleep": 0.05}) == 0
    assert stub(space, trials=14, do={"sleep": 0.1}) == 0
    pruned = [FOLDER / f"trial-{record['trial']:03d}" for record in records() if record["state"] == "pruned"]
    assert pruned and not any((folder / "best.ckpt").exists() for folder in pruned)
    for folder in pruned:
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "pid").read_text()), 0)
    assert stub(space | {"prune": False}, trials=20) == 0
    assert len([record for record in records() if record["state"] == "pruned"]) == len(pruned)


DRIVER = """
import signal, sys
# A shell makes its background jobs ignore Ctrl-C, and child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
from upright.runs.sweeping import sweep
sweep.POLL_SECONDS = 0.02
sys.exit(sweep.sweep("try.yaml", command=[sys.executable, "-S", "stub.py"], trials=int(sys.argv[1])))
"""


@pytest.fixture
def start_sweep(stub: Sweep) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a sweep in a separate process."""

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
    raise AssertionError(f"{path} was not written")


@pytest.mark.slow
def test_one_process_at_a_time_runs_a_sweep(start_sweep: Callable[..., subprocess.Popen[str]], stub: Sweep) -> None:
    process = start_sweep(2, sleep=60)
    until(FOLDER / "trial-000/pid")
    with pytest.raises(UprightError, match="Sweep 'checkpoints/try' is running in another process"):
        stub()
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_sweep_resumes_its_trial(
    start_sweep: Callable[..., subprocess.Popen[str]], stub: Sweep, number: signal.Signals
) -> None:
    process = start_sweep(2, sleep=60)
    trial = int(until(FOLDER / "trial-000/pid"))
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "\nStopped; the same command resumes the sweep.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(trial, 0)
    check_resumed(stub)


@pytest.mark.slow
def test_a_killed_sweep_resumes_its_trial(start_sweep: Callable[..., subprocess.Popen[str]], stub: Sweep) -> None:
    process = start_sweep(2, sleep=60)
    trial = int(until(FOLDER / "trial-000/pid"))
    process.kill()
    process.communicate()
    os.kill(trial, signal.SIGKILL)  # the stub does not end with its sweep; a test below covers that
    check_resumed(stub)


def check_resumed(stub: Sweep) -> None:
    """Complete the sweep: the unfinished trial runs again, with the same command."""
    log = FOLDER / "trial-000.log"
    (command,) = log.read_text().splitlines()
    assert "--ckpt_path=auto" in command and stub(trials=2) == 0
    assert log.read_text().splitlines() == [command] * 2
    assert [(record["trial"], record["state"]) for record in records()] == [(0, "complete"), (1, "complete")]


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


@pytest.mark.slow
def test_real_trials_do_not_use_the_test_split(upright: Upright, tmp_path: Path) -> None:
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
    for record in records():
        folder = FOLDER / f"trial-{record['trial']:03d}"
        files = {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "trial.json", "val_predictions.npz"}
        assert {path.name for path in folder.iterdir() if path.suffix != ".png"} == files
        model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
        assert model["optimizer"]["init_args"]["lr"] == record["options"]["model.optimizer.init_args.lr"]
        assert model["network"]["init_args"]["widths"] == json.loads(
            record["options"]["model.network.init_args.widths"]
        )
        metrics = torch.load(folder / "best.ckpt", weights_only=True)["upright"]["metrics"]
        assert record["val/loss"] == metrics["val/loss"]
    assert "None of these runs was evaluated on the test split." in " ".join(answer.out.split())
    assert not list(tmp_path.rglob("test*"))
    with pytest.raises(RuntimeError, match="the test split was touched"):
        upright("test", "--ckpt_path", folder / "best.ckpt")


def test_a_real_mistake_stops_at_the_first_trial(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(SPACE | {"space": {"model.netwrk.x": [1, 2]}}))
    answer = upright("sweep", "try.yaml")
    assert answer.code == 2 and answer.err.count("\n") == 1 and not FOLDER.exists()
    assert "The first trial failed: unknown" in answer.err and "Did you mean" in answer.err


def test_values_reach_the_parser_unchanged(upright: Upright, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-05}}
    values = {"model.optimizer": optimizer, "data.augment": [], "trainer.max_epochs": 7, "trainer.max_time": None}
    values |= {"model.network.init_args.activation": "tanh", "trainer.enable_progress_bar": True}
    with pytest.raises(SystemExit):
        upright("fit", "--config", LENET, *as_arguments(values), "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    model = config["model"]["init_args"]
    assert model["optimizer"]["init_args"]["lr"] == 1e-5 and config["data"]["init_args"]["augment"] == []
    assert config["trainer"]["max_epochs"] == 7 and config["trainer"]["max_time"] is None
    assert model["network"]["init_args"]["activation"] == "tanh"


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
    # The agent's own code builds the arguments; it sets the run's id in the environment.
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
