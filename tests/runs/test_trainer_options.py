"""Every callback and every option of Lightning's trainer works, or is refused in one line."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as lightning_callbacks

from tests.conftest import ROOT, Answer, Upright
from upright.tables import read_rows

FIT = (
    *("fit", "--config", ROOT / "configs/lenet.yaml", "--data.train_fraction", 0.1, "--data.val_fraction", 0.1),
    *("--trainer.max_epochs", 2, "--wandb", "off", "--name", "run"),
)

CALLBACKS: dict[str, dict[str, Any]] = {
    "BackboneFinetuning": {},
    "BatchSizeFinder": {"max_trials": 1, "steps_per_trial": 1},
    "DeviceStatsMonitor": {},
    "EMAWeightAveraging": {},
    "EarlyStopping": {"monitor": "val/loss"},
    "GradientAccumulationScheduler": {"scheduling": {0: 1, 1: 2}},
    "LambdaCallback": {},
    "LearningRateFinder": {"num_training_steps": 3},
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"save_last": True},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.1},
    "ModelSummary": {},
    "OnExceptionCheckpoint": {"dirpath": "."},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "SpikeDetection": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "TQDMProgressBar": {},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "Timer": {"duration": {"minutes": 10}},
    "WeightAveraging": {},
}
BASES = {"Callback", "BaseFinetuning", "BasePredictionWriter", "Checkpoint", "ProgressBar"}
# Cases that once ended in a traceback, or in a run other than the recorded one.
REFUSED = {
    "BackboneFinetuning": "does not work with `upright fit`: it needs an attribute `backbone`",
    "BatchSizeFinder": "does not work with `upright fit`: it changes the batch size after the schedule was made",
    "LearningRateFinder": "does not work with `upright fit`: it replaces the schedule while it searches",
    "ModelPruning": "does not work with `upright fit`: it gives the weights other names",
    "RichProgressBar": "`RichProgressBar` requires `rich`",
    "StochasticWeightAveraging": "does not work with `upright fit`: it averages after the last checkpoint",
}

OPTIONS: dict[str, list[Any]] = {
    "accelerator": ["cpu", "gpu"],
    "strategy": ["auto", "ddp"],
    "devices": [1],
    "num_nodes": [1],
    "precision": ["bf16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine"],
    "logger": [True, False],
    "callbacks": [],
    "fast_dev_run": [True, 2],
    "max_epochs": [0, 1],
    "min_epochs": [1],
    "max_steps": [0, 3],
    "min_steps": [2],
    "max_time": ["00:00:10:00"],
    "limit_train_batches": [1, 0.5, 0],
    "limit_val_batches": [1, 0],
    "limit_test_batches": [1],
    "limit_predict_batches": [1],
    "overfit_batches": [1],
    "val_check_interval": [1, 0.5],
    "check_val_every_n_epoch": [2],
    "num_sanity_val_steps": [1],
    "log_every_n_steps": [2],
    "enable_checkpointing": [False],
    "enable_progress_bar": [True],
    "enable_model_summary": [True],
    "accumulate_grad_batches": [2],
    "gradient_clip_val": [1.0],
    "gradient_clip_algorithm": ["value"],
    "deterministic": [True],
    "benchmark": [True],
    "inference_mode": [False],
    "use_distributed_sampler": [False],
    "profiler": ["simple"],
    "detect_anomaly": [True],
    "barebones": [True],
    "plugins": ["upright.runs.checkpoint_io.AtomicCheckpointIO"],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "default_root_dir": ["elsewhere"],
    "enable_autolog_hparams": [False],
    "model_registry": ["somewhere"],
}


def check(answer: Answer) -> None:
    """Check that an error is one line, and that a success names only files that exist."""
    assert answer.code in (0, 2), answer.err
    assert "Traceback" not in answer.err
    if answer.code == 2:
        assert answer.err.count("\n") == 1 and answer.err.startswith("upright: error: "), answer.err
    else:
        for line in answer.out.splitlines():
            if line.startswith("Next: "):
                assert Path(line.split()[-1]).is_file(), line


def with_callback(folder: Path, name: str) -> Path:
    path = folder / "callback.yaml"
    entry = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": CALLBACKS[name]}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    return path


def test_the_lists_are_complete() -> None:
    assert set(CALLBACKS) == set(lightning_callbacks.__all__) - BASES
    assert set(OPTIONS) == set(inspect.signature(L.Trainer).parameters)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_callbacks_are_refused(upright: Upright, tmp_path: Path, name: str) -> None:
    answer = upright(*FIT, "--config", with_callback(tmp_path, name))
    check(answer)
    assert answer.code == 2 and REFUSED[name] in answer.err
    assert not (tmp_path / "checkpoints/run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(set(CALLBACKS) - set(REFUSED)))
def test_every_other_callback(upright: Upright, tmp_path: Path, name: str) -> None:
    check(upright(*FIT, "--config", with_callback(tmp_path, name)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("no_process_group_after")
@pytest.mark.parametrize(("option", "value"), [(option, value) for option in OPTIONS for value in OPTIONS[option]])
def test_every_option(upright: Upright, option: str, value: object) -> None:
    check(upright(*FIT, f"--trainer.{option}={value}"))


@pytest.mark.parametrize("option", ["max_epochs", "max_steps", "limit_train_batches"])
def test_a_run_of_no_step_is_refused(upright: Upright, option: str) -> None:
    answer = upright(*FIT, f"--trainer.{option}", 0)
    assert answer.code == 2 and f"trainer.{option} 0 trains nothing: give more" in answer.err


def test_a_fast_dev_run_writes_nothing_and_reports_it(upright: Upright, tmp_path: Path) -> None:
    answer = upright(*FIT, "--trainer.fast_dev_run", "true")
    assert answer.code == 0 and "nothing was written" in answer.out and "Next" not in answer.out
    assert not (tmp_path / "checkpoints/run").exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        (
            "model.optimizer.init_args.lr",
            0.0001,
            "with model.optimizer.init_args.lr 0.003 and cannot resume with 0.0001",
        ),
        ("model.optimizer.init_args.weight_decay", 0.3, "model.optimizer.init_args.weight_decay 0.01"),
        ("model.scheduler.init_args.warmup", 0.1, "model.scheduler.init_args.warmup 0.3"),
        (
            "model.optimizer",
            "torch.optim.SGD",
            "with model.optimizer torch.optim.adamw.AdamW and cannot resume with torch.optim.sgd.SGD",
        ),
        ("data.batch_size", 16, "with data.batch_size 64 and cannot resume with 16"),
    ],
)
def test_a_resumed_run_uses_what_it_records(
    upright: Upright, run_folder: Path, option: str, value: object, text: str
) -> None:
    changed = (f"--{option}", value)
    answer = upright("fit", "--ckpt_path", run_folder, "--trainer.max_epochs", 3, "--wandb", "off", *changed)
    assert answer.code == 2 and text in answer.err and "--start_from" in answer.err and answer.err.count("\n") == 1


def test_the_checkpoint_has_the_averaged_weights(upright: Upright, tmp_path: Path) -> None:
    answer = upright(*FIT, "--config", with_callback(tmp_path, "EMAWeightAveraging"))
    assert answer.code == 0
    checkpoint = torch.load(tmp_path / "checkpoints/run/last.ckpt", weights_only=True)
    current = checkpoint["current_model_state"]
    assert any(not torch.equal(value, current[name]) for name, value in checkpoint["state_dict"].items())


def test_the_chosen_metric_decides_the_best_epoch(upright: Upright) -> None:
    assert upright(*FIT, "--monitor", "val/calibration_error", "--mode", "max").code == 0
    best = torch.load("checkpoints/run/best.ckpt", weights_only=True)
    rows = read_rows(Path("checkpoints/run/metrics.csv"))
    values = [float(row["val/calibration_error"]) for row in rows]
    assert best["epoch"] == values.index(max(values))
    assert yaml.safe_load(Path("checkpoints/run/config.yaml").read_text())["mode"] == "max"
    resumed = upright(*FIT, "--ckpt_path", "last", "--monitor", "val/loss", "--trainer.max_epochs", 3)
    assert resumed.code == 2
    assert "was chosen by val/calibration_error, and val/loss cannot be compared with it: resume with" in resumed.err


def test_a_metric_that_cannot_choose_is_refused(upright: Upright) -> None:
    answer = upright(*FIT, "--monitor", "val/f1")
    assert answer.code == 2 and "--monitor val/f1 needs --mode min or --mode max." in answer.err
    answer = upright(*FIT, "--monitor", "val/f2", "--mode", "max")
    assert answer.code == 2 and "could not find the monitored key" in answer.err and "'val/f1'" in answer.err
    assert not Path("checkpoints/run").exists()


def test_a_schedule_of_torch_steps_by_epoch_and_resumes_exactly(upright: Upright) -> None:
    restarts = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "init_args": {"T_0": 2}}
    own = {"class_path": "upright.training.schedules.TorchScheduler", "init_args": {"scheduler": restarts}}
    Path("restarts.yaml").write_text(yaml.safe_dump({"model": {"scheduler": own}}))
    fit = (*FIT, "--config", "restarts.yaml", "--data.batch_size", 64, "--trainer.accumulate_grad_batches", 2)
    assert upright(*fit, "--trainer.max_epochs", 3).code == 0
    rates = [float(row["lr"]) for row in read_rows(Path("checkpoints/run/metrics.csv"))]
    assert rates == pytest.approx([0.0015, 0.003, 0.0015])  # the rate of the next epoch, as of every schedule
    complete = torch.load("checkpoints/run/last.ckpt", weights_only=True)
    assert upright(*fit, "--trainer.max_epochs", 1, "--force").code == 0
    resume = ("fit", "--wandb", "off", "--trainer.max_epochs", 3, "--ckpt_path")
    answer = upright(*resume, "checkpoints/run/best.ckpt", "--model.scheduler.scheduler.T_0", 3)
    assert answer.code == 2 and "scheduler {'class_path'" in answer.err and "'T_0': 3" in answer.err
    assert upright(*resume, "checkpoints/run/best.ckpt").code == 0
    resumed = torch.load("checkpoints/run/last.ckpt", weights_only=True)
    assert resumed["lr_schedulers"] == complete["lr_schedulers"]
    weights = complete["state_dict"]
    assert all(torch.equal(weights[name], resumed["state_dict"][name]) for name in weights)


def test_a_plateau_lowers_the_rate_and_resumes_exactly(upright: Upright) -> None:
    plateau = ("--model.scheduler", "upright.training.schedules.Plateau", "--model.scheduler.patience", 0)
    falling = (*plateau, "--model.scheduler.threshold", 0.9, "--trainer.max_epochs")  # no epoch is ten times better
    assert upright(*FIT, *falling, 3).code == 0
    complete = [float(row["lr"]) for row in read_rows(Path("checkpoints/run/metrics.csv"))]
    assert complete == pytest.approx([0.003, 0.0003, 0.00003])
    weights = torch.load("checkpoints/run/last.ckpt", weights_only=True)["state_dict"]
    assert upright(*FIT, *falling, 1, "--force").code == 0
    assert (
        upright("fit", "--ckpt_path", "checkpoints/run/best.ckpt", "--trainer.max_epochs", 3, "--wandb", "off").code
        == 0
    )
    resumed = torch.load("checkpoints/run/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
