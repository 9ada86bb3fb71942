"""A run that is killed in mid-epoch and resumed ends with the weights of a run that was not, bit by bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

OWN = """
import os, signal
from lightning.pytorch.callbacks import Callback
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU(),
                                    nn.Dropout(0.5), nn.Linear(32, num_classes))
    def forward(self, images):
        return self.layers(images)

class Kill(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
"""
CONFIG = """
seed_everything: 3
model:
  network: own.Net
  optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: upright.data.digits.Digits
  init_args:
    size: 12
    margin: 0
    augment: [{class_path: upright.data.augmentation.RandomAffine, init_args: {rotate: 20}}]
trainer: {max_epochs: 3, callbacks: [{class_path: own.Kill}], accelerator: cpu}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(CONFIG)
    return tmp_path


def fit(folder: Path, name: str, *arguments: str, kill_at: int = -1) -> int:
    command = [sys.executable, "-m", "upright", "fit", "--config", "own.yaml", "--name", name, "--wandb", "off"]
    environment = os.environ | {"KILL_AT": str(kill_at), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def last(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / name / "last.ckpt", weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{key}.{name}": value for key, state in optimizer.items() for name, value in state.items()}
    return checkpoint["state_dict"] | moments | {"step": torch.tensor(checkpoint["global_step"])}


def test_killed_and_resumed_equals_uninterrupted(folder: Path) -> None:
    # An epoch has 18 steps: one kill is in mid-epoch, steps after the last checkpoint, one at an epoch's start.
    options = ("--save_every_n_steps", "4")
    assert fit(folder, "whole", *options) == 0
    assert fit(folder, "killed", *options, kill_at=27) == -signal.SIGKILL
    state = torch.load(folder / "checkpoints/killed/last.ckpt", weights_only=True)
    assert state["global_step"] == 24
    assert fit(folder, "killed", *options, "--ckpt_path", "last", kill_at=36) == -signal.SIGKILL
    assert fit(folder, "killed", *options, "--ckpt_path", "last") == 0
    whole, resumed = last(folder, "whole"), last(folder, "killed")
    assert whole.keys() == resumed.keys() and int(whole["step"]) == 54
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    metrics = (folder / "checkpoints/killed/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in metrics] == ["epoch", "0", "1", "2"]
    ours = [
        torch.load(folder / f"checkpoints/{name}/last.ckpt", weights_only=True)["upright"]
        for name in ("whole", "killed")
    ]
    assert ours[0]["metrics"]["val/loss"] == ours[1]["metrics"]["val/loss"]
    assert state["upright"]["run"] == ours[1]["run"]


def test_averaged_weights_go_on_where_they_stood(folder: Path) -> None:
    average = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
    config = CONFIG.replace("callbacks: [", f"callbacks: [{average}, ").replace("max_epochs: 3", "max_epochs: 2")
    (folder / "own.yaml").write_text(config)
    options = ("--save_every_n_steps", "4")
    assert fit(folder, "whole", *options) == 0
    assert fit(folder, "killed", *options, kill_at=23) == -signal.SIGKILL
    assert fit(folder, "killed", *options, "--ckpt_path", "last") == 0
    whole, resumed = (
        torch.load(folder / f"checkpoints/{name}/last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert whole[part].keys() == resumed[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), (part, name)
    assert whole["averaging_state"]["n_averaged"] == 36


def test_the_first_test_can_fail(folder: Path) -> None:
    options = ("--save_every_n_steps", "4", "--trainer.max_epochs", "1")
    assert fit(folder, "whole", *options) == 0
    assert fit(folder, "killed", *options, kill_at=10) == -signal.SIGKILL
    path = folder / "checkpoints/killed/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["Digits"] == {"epoch": 0, "position": 8}
    checkpoint["Digits"]["position"] = 7
    torch.save(checkpoint, path)
    assert fit(folder, "killed", *options, "--ckpt_path", "last") == 0
    whole, resumed = last(folder, "whole"), last(folder, "killed")
    assert not torch.equal(whole["model.network.layers.1.weight"], resumed["model.network.layers.1.weight"])
