"""What a training step costs beside the arithmetic: Lightning's loop, our callbacks and metrics, bar, W&B.

    python benchmarks/overhead.py [--rounds 5]

A single linear layer on batches of 8 random images, 800 steps an epoch, one thread: next to no arithmetic. Microseconds
of processor time per step, of an epoch with its validation and checkpoints, the least of all rounds and epochs but the
first; each variant in a fresh process, in turn. The second column is what a variant costs more than the one that it is
compared with.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import training
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn

from upright.cli import main as upright
from upright.data.augmentation import Augmentation
from upright.training.classifier import ImageClassifier

COUNT, BATCH, EPOCHS = 6400, 8, 4
FIT = ("--wandb", "off", "--trainer.enable_progress_bar", "false")
VARIANTS: dict[str, tuple[str, Any]] = {
    "bare loop": ("", None),
    "Lightning's loop (barebones), our module": ("bare loop", None),
    "upright fit": ("Lightning's loop (barebones), our module", FIT),
    "with a progress bar": ("upright fit", ("--wandb", "off", "--trainer.enable_progress_bar", "true")),
    "with W&B offline": ("upright fit", ("--wandb", "offline", "--trainer.enable_progress_bar", "false")),
    "with gradient norms": ("upright fit", (*FIT, "--log_grad_norm")),
}


class Linear(nn.Sequential):
    """One layer."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))


class Clock(Callback):
    """Processor time at the beginning of every epoch, and at the end."""

    ticks: ClassVar[list[float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch ends where the next one begins."""
        self.ticks.append(time.process_time())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The last one."""
        self.ticks.append(time.process_time())


class Timed(ImageClassifier):
    """Barebones trainers take no callbacks."""

    def on_train_epoch_start(self) -> None:
        """See `Clock`."""
        Clock.ticks.append(time.process_time())


def measure(variant: str) -> float:
    """Microseconds of a step, in this process."""
    data = training.Noise(count=COUNT, batch_size=BATCH)
    if variant == "bare loop":
        bare = training.Bare(Linear((1, 28, 28), 10), BATCH, data, EPOCHS * COUNT, Augmentation([]))
        for _ in range(EPOCHS):
            Clock.ticks.append(time.process_time())
            bare.epoch()
        Clock.ticks.append(time.process_time())
    elif (arguments := VARIANTS[variant][1]) is None:
        module = Timed(data.spec, Linear, torch.optim.AdamW)
        trainer = L.Trainer(barebones=True, max_epochs=EPOCHS, accelerator="cpu")
        trainer.fit(module, datamodule=data)
        Clock.ticks.append(time.process_time())
    else:
        experiment = {
            "model": {"network": "overhead.Linear", "optimizer": "torch.optim.AdamW"},
            "data": {"class_path": "training.Noise", "init_args": {"count": COUNT, "batch_size": BATCH}},
            "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu", "callbacks": [{"class_path": "overhead.Clock"}]},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "overhead.yaml"
            path.write_text(yaml.safe_dump(experiment))
            assert upright(["fit", "--config", str(path), "--trainer.default_root_dir", folder, *arguments]) == 0
    ends = zip(Clock.ticks[1:], Clock.ticks[2:], strict=False)
    return min(end - start for start, end in ends) / (COUNT // BATCH) * 1e6


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            program = f"import json, overhead; print(json.dumps(overhead.measure({variant!r})))"
            command = [sys.executable, "-c", program]
            done = subprocess.run(
                command, cwd=sys.path[0], env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            found.setdefault(variant, []).append(json.loads(done.stdout.splitlines()[-1]))
    print("| | microseconds a step | more than before |\n|---|---|---|")
    for variant, (before, _) in VARIANTS.items():
        least = min(found[variant])
        more = f"{least - min(found[before]):,.0f}, than {before}" if before else ""
        print(f"| {variant} | {least:,.0f} | {more} |")


if __name__ == "__main__":
    main()
