"""Runs of a small network in separate processes, which are killed at a named place."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT

OWN = r"""
import io, os, signal, time
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

KIND, _, NUMBER = os.environ.get("KILL_AT", "never:0").partition(":")
SIGNAL = getattr(signal, os.environ.get("KILL_WITH", "SIGKILL"))
COUNTS = {}

def at(kind):
    COUNTS[kind] = COUNTS.get(kind, 0) + 1
    rank, mine = os.environ.get("KILL_RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if kind == KIND and COUNTS[kind] == int(NUMBER) and rank == mine:
        os.kill(os.getpid(), SIGNAL)
        if seconds := os.environ.get("WAIT"):
            open("waiting", "w").close()
            time.sleep(int(seconds))

class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        pixels = input_shape[0] * input_shape[1] * input_shape[2]
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.BatchNorm1d(32), nn.ReLU(),
                                    nn.Dropout(0.5), nn.Linear(32, num_classes))
    def forward(self, images):
        return self.layers(images)

class Kill(Callback):
    def on_train_batch_start(self, *_): at("step")
    def on_validation_start(self, *_): at("validation_start")
    def on_validation_batch_end(self, *_): at("validation")
    def on_validation_end(self, *_): at("validation_end")
    def on_train_epoch_start(self, *_): at("epoch_start")
    def on_train_epoch_end(self, *_): at("epoch_end")
    def on_fit_start(self, *_): at("fit_start")
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if path := os.environ.get("POSITIONS"):
            with open(f"{path}-{trainer.global_rank}", "a") as file:
                print(trainer.current_epoch, *batch.position.tolist(), file=file)

real_save, real_replace = torch.save, os.replace

def save(checkpoint, file, *args, **options):
    COUNTS["write"] = COUNTS.get("write", 0) + 1
    if KIND == "write" and COUNTS["write"] == int(NUMBER):
        complete = io.BytesIO()
        real_save(checkpoint, complete, *args, **options)
        file.write(complete.getvalue()[: len(complete.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), SIGNAL)
    real_save(checkpoint, file, *args, **options)

def replace(source, target):
    name = os.path.basename(str(target))
    if name.endswith(".ckpt"): at("rename")
    if name == "metrics.csv": at("metrics")
    if name == "config.yaml": at("config")
    real_replace(source, target)

torch.save, os.replace = save, replace
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
"""An epoch has 18 steps, and 5 batches of validation."""
AVERAGED = CONFIG.replace(
    "callbacks: [",
    "callbacks: [{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}, ",
)


def prepare(folder: Path, config: str = CONFIG) -> Path:
    """Write network and experiment into a folder."""
    (folder / "own.py").write_text(OWN)
    (folder / "own.yaml").write_text(config)
    return folder


def command(name: str, *arguments: object) -> list[str]:
    own = ["fit", "--config", "own.yaml", "--name", name, "--wandb", "off"]
    return [sys.executable, "-m", "upright", *own, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | more


FRESH = multiprocessing.get_context("forkserver")
"""Its processes are forked from one that has done the slow imports."""
FRESH.set_forkserver_preload(["upright.runs.cli.run", "upright.data.digits"])


def _run(arguments: list[str], folder: Path, variables: dict[str, str], out: str, err: str) -> None:
    for path, standard in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), standard)
    os.chdir(folder)
    os.environ |= variables
    # Loader workers are forked, as in a user's process.
    multiprocessing.set_start_method("fork", force=True)
    from upright.cli import main

    code = main(arguments)
    # Skip the exit handlers of multiprocessing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(
    folder: Path, name: str, *arguments: object, out: str = os.devnull, err: str = os.devnull, **variables: str
) -> BaseProcess:
    """Start a run in a process, and return the process."""
    process = FRESH.Process(target=_run, args=(command(name, *arguments)[3:], folder, variables, out, err))
    process.start()
    return process


def fit(
    folder: Path, name: str, *arguments: object, kill_at: str = "never:0", kill_with: str = "SIGKILL", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end, or until it is killed the ``n``-th time that it reaches a place: ``place:n``."""
    line, variables = command(name, *arguments), {"KILL_AT": kill_at, "KILL_WITH": kill_with, **more}
    if "--trainer.devices" in arguments:
        # Lightning starts the other processes with the command line of this one.
        return subprocess.run(
            line,
            cwd=folder,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = start(folder, name, *arguments, out=out.name, err=err.name, **variables)
        process.join(200)
        assert process.exitcode is not None
        texts = [Path(file.name).read_text() for file in (out, err)]
    return subprocess.CompletedProcess(line, process.exitcode, *texts)


def run_and_kill(folder: Path, name: str, *arguments: object, at: str) -> None:
    process = fit(folder, name, *arguments, kill_at=at)
    assert process.returncode == -signal.SIGKILL, (at, process.stderr)


def run_to_end(folder: Path, name: str, *arguments: object, **more: str) -> str:
    process = fit(folder, name, *arguments, **more)
    assert process.returncode == 0, process.stderr
    return process.stdout


def last(run: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "last.ckpt", weights_only=True)
    return checkpoint


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return all values in nested dicts and lists, by their path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {inner: leaf for key, part in items for inner, leaf in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences between two runs: last and best checkpoint, and metrics.csv without the times.

    The compared parts of the checkpoints are weights, averages, optimiser, schedule, loops, position in the data and
    metrics.
    """
    parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "loops")
    parts += ("epoch", "global_step", "Digits", "Folder", "train_means")
    different = []
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(run / name, weights_only=True) for run in (one, other))
        ours, theirs = (
            leaves({part: c.get(part) for part in parts} | {"metrics": c["upright"]["metrics"]}) for c in (ours, theirs)
        )
        if ours.keys() != theirs.keys():
            different.append(f"{name} keys {ours.keys() ^ theirs.keys()}")
        for key in ours.keys() & theirs.keys():
            a, b = ours[key], theirs[key]
            equal = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            if not equal:
                different.append(f"{name} {key}")
    rows = [rows_of(run) for run in (one, other)]
    if rows[0] != rows[1]:
        different.append(f"metrics.csv {rows}")
    return different


def rows_of(run: Path) -> list[dict[str, str]]:
    header, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return [{key: row[key] for key in sorted(row) if key not in ("seconds", "images_per_second")} for row in rows]
