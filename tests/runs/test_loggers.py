"""TensorBoard and MLflow, offline: what a run and its resumption log."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.runs.loggers import tensorboard_logger

STN = ROOT / "configs/stn_lenet.yaml"
resuming = pytest.mark.slow
"""Marks the tests that use the fixture `logged`, which trains for some time."""
mlflow_warns = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
QUICK = ("--wandb", "off", "--trainer.limit_train_batches", 2)
PLOTS = {"samples", "mistakes", "confusion", "transformer"}
PROGRAM = """
import sys
from upright.cli import main

quick = ["--trainer.limit_train_batches", "2", "--wandb", "off", "--tensorboard", "--mlflow"]
assert main(["fit", "--config", sys.argv[1], "--name", "run", "--trainer.max_epochs", "2", *quick]) == 0
assert main(["fit", "--name", "run", "--ckpt_path", "last", "--trainer.max_epochs", "3", *quick]) == 0
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was trained, and resumed for a third epoch, with both loggers."""
    folder = tmp_path_factory.mktemp("logged")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, STN],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return folder


@pytest.fixture(scope="module")
def rows(logged: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((logged / "checkpoints/run/metrics.csv").read_text().splitlines()))


def scalars(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """The values of a metric with their steps. Lightning counts steps from 0, and metrics.csv from 1."""
    return [(int(row["step"]) - 1, float(row[name])) for row in rows]


@pytest.fixture(scope="module")
def events(logged: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(logged / "checkpoints/run/tensorboard"), size_guidance={"images": 0}).Reload()


@resuming
def test_tensorboard_has_every_metric(rows: list[dict[str, str]], events: Any) -> None:
    assert {"train/loss", "val/accuracy", "val/uprightness", "lr", "images_per_second"} <= set(rows[0])
    for name in set(rows[0]) - {"step", "epoch"}:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert np.array(logged) == pytest.approx(np.array(scalars(rows, name)), rel=1e-4), name


@resuming
def test_tensorboard_has_the_plots(logged: Path, rows: list[dict[str, str]], events: Any) -> None:
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in PLOTS}
    for name in PLOTS:
        plots = events.Images(f"val/{name}")
        assert [plot.step for plot in plots] == [step for step, _ in scalars(rows, "val/loss")]
        with Image.open(logged / f"checkpoints/run/{name}.png") as image:
            assert (plots[-1].width, plots[-1].height) == image.size


@resuming
def test_tensorboard_has_the_hyperparameters_of_the_start_and_the_best_metrics(logged: Path, events: Any) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (content,) = {
        tag: content for tag, content in events.PluginTagToContent("hparams").items() if "session_start" in tag
    }.values()
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["trainer/max_epochs"].number_value == 2
    assert hyperparameters["model/optimizer/init_args/lr"].number_value == 0.003
    best = torch.load(logged / "checkpoints/run/best.ckpt", weights_only=True)["upright"]["metrics"]
    assert {name: events.Scalars(f"best/{name}")[-1].value for name in best} == pytest.approx(best)


@pytest.fixture(scope="module")
def client(logged: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{logged}/mlflow.db")


@pytest.fixture(scope="module")
def mlflow_run(client: Any) -> Any:
    """The only run in the store: a resumed run continues its first one."""
    (run,) = client.search_runs([client.get_experiment_by_name("upright").experiment_id])
    return run


@resuming
@mlflow_warns
def test_mlflow_has_every_metric(rows: list[dict[str, str]], client: Any, mlflow_run: Any) -> None:
    assert mlflow_run.info.run_name == "run" and mlflow_run.info.status == "FINISHED"
    for name in set(rows[0]) - {"step", "epoch"}:
        logged = [(each.step, each.value) for each in client.get_metric_history(mlflow_run.info.run_id, name)]
        assert np.array(logged) == pytest.approx(np.array(scalars(rows, name)), rel=1e-4), name


@resuming
@mlflow_warns
def test_mlflow_has_the_hyperparameters_of_the_start(logged: Path, mlflow_run: Any) -> None:
    assert yaml.safe_load((logged / "checkpoints/run/config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert mlflow_run.data.params["trainer/max_epochs"] == "2"
    assert mlflow_run.data.params["model/optimizer/init_args/lr"] == "0.003"
    assert {"git_commit", "split_digest"} <= set(mlflow_run.data.params)


@resuming
@mlflow_warns
def test_mlflow_has_the_plots(rows: list[dict[str, str]], client: Any, mlflow_run: Any) -> None:
    files = [Path(each.path).name for each in client.list_artifacts(mlflow_run.info.run_id, "images")]
    for name in PLOTS:
        for step, _ in scalars(rows, "val/loss"):
            assert sum(file.startswith(f"val~{name}+step+{step}+") and file.endswith(".png") for file in files) == 1


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, steps in ((None, range(4)), (2, range(2, 3))):
        logger = tensorboard_logger(tmp_path, resumed_at)
        for step in steps:
            logger.log_metrics({"loss": float(resumed_at is None)}, step)
        logger.finalize("failed")
    losses = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(0, 1.0), (1, 1.0), (2, 0.0)]


@pytest.mark.parametrize(
    ("option", "missing"),
    [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy"), ("mlflow", "alembic")],
)
def test_a_missing_package_is_named(
    option: str, missing: str, upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upright.runs.loggers.find_spec", lambda name: None if name == missing else object())
    answer = upright("fit", "--config", STN, *QUICK, f"--{option}")
    line = f"upright: error: --{option} needs the package {missing}: `pip install 'upright[{option}]'`.\n"
    assert (answer.code, answer.err) == (2, line)
    assert not list(tmp_path.glob("checkpoints/*/*"))


@pytest.fixture
def mlflow_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the address of an earlier run in this process."""
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.mark.usefixtures("mlflow_address")
@pytest.mark.parametrize(
    ("address", "reason"),
    [("nonsense://x", "nonsense://x"), ("http://127.0.0.1:9", "127.0.0.1"), ("runs", "filesystem tracking backend")],
)
def test_an_address_that_mlflow_refuses_is_one_line(
    address: str, reason: str, upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answer = upright("fit", "--config", STN, *QUICK, "--mlflow")
    assert answer.code == 2 and answer.err.startswith("upright: error: --mlflow: ") and reason in answer.err
    assert answer.err.count("\n") == 1
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_a_logger_of_the_config_and_tensorboard_together(upright: Upright, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "more.yaml").write_text(
        "tensorboard: true\n"
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv}}}\n"
    )
    fit = ("fit", "--config", STN, "--config", "more.yaml", "--name", "both", *QUICK, "--trainer.max_epochs", 1)
    answer = upright(*fit)
    assert answer.code == 0, answer.err
    (table,) = tmp_path.glob("csv/**/metrics.csv")
    events = EventAccumulator(str(tmp_path / "checkpoints/both/tensorboard")).Reload()
    losses = [float(row["val/loss"]) for row in csv.DictReader(table.read_text().splitlines()) if row["val/loss"]]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(losses)
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in PLOTS}
    assert "tensorboard" not in yaml.safe_load((tmp_path / "checkpoints/both/config.yaml").read_text())
