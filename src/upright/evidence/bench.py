"""What a study works with: how much it may spend, its data, and runs of ``upright fit`` side by side."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import joblib
import torch
import yaml
from torch.optim import AdamW

from upright.architectures.spatial_transformer import Network
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.mnist import MNIST
from upright.errors import UprightError, UserError
from upright.files import file_hash, write_text
from upright.recipes import recipe
from upright.runs.cli.run import run as run_verb
from upright.tables import read_rows
from upright.training.losses import CrossEntropy
from upright.training.restoring import Restored, restore
from upright.training.schedules import OneCycle

Scale = Literal["quick", "standard", "full"]
Made = TypeVar("Made")
Value = TypeVar("Value")
Key = TypeVar("Key")


class Experiment(NamedTuple):
    """What ``upright fit`` is to train: classes, or partials of classes.

    Args:
        network: completed with ``(input_shape, num_classes)``.
        data: a datamodule.
        epochs: passes over its training images.
        optimizer: completed with parameter groups.
        loss: completed with ``(num_classes)``.
        init: scheme of the weights; by default the network's own.
        upright_weight: of the upright loss.
        callbacks: of the trainer.
        validate_every: so many epochs.
        start_from: a checkpoint whose weights it begins with.
        precision: of the trainer: ``bf16-mixed`` halves the time of a convolution where the processor has bfloat16.
    """

    network: Network
    data: Callable[[], ImageDataModule]
    epochs: int
    optimizer: Callable[..., Any] = partial(AdamW, lr=0.003, weight_decay=0.01)
    loss: Callable[..., Any] = CrossEntropy
    init: str | None = None
    upright_weight: float = 0.0
    callbacks: tuple[Callable[[], Any], ...] = ()
    validate_every: int = 1
    start_from: Path | None = None
    precision: str = "32-true"

    def config(self, seed: int) -> str:
        """The YAML that ``upright fit`` takes."""
        parts = {"network": self.network, "optimizer": self.optimizer, "scheduler": OneCycle, "loss": self.loss}
        model = {name: recipe(part) for name, part in parts.items()}
        model |= {"init": self.init, "upright_weight": self.upright_weight}
        callbacks = [recipe(callback) for callback in self.callbacks]
        trainer = {"max_epochs": self.epochs, "enable_progress_bar": False, "callbacks": callbacks}
        trainer |= {"check_val_every_n_epoch": self.validate_every, "precision": self.precision}
        start = str(self.start_from) if self.start_from else None
        data = recipe(self.data)
        whole = {"seed_everything": seed, "model": model, "data": data, "trainer": trainer, "start_from": start}
        # With other weights to begin with it is another experiment, though the file has the same name.
        known = f"# {file_hash(self.start_from)}\n" if self.start_from else ""
        return known + yaml.safe_dump(whole, sort_keys=False)


class Run(NamedTuple):
    """A run that was trained and tested.

    Args:
        folder: of the run, with all that ``upright fit`` leaves.
        metrics: of the test split, of ``best.ckpt``.
        seconds: that it took a processor to train and test it; what was before a stop, as the clock ran.
    """

    folder: Path
    metrics: dict[str, float]
    seconds: float

    def column(self, name: str) -> list[float]:
        """A metric over the epochs, as in ``metrics.csv``."""
        return [float(row[name]) for row in read_rows(self.folder / "metrics.csv") if row.get(name)]

    def restored(self) -> Restored:
        """Model and data, of ``best.ckpt``."""
        return restore(self.folder / "best.ckpt")

    @torch.no_grad()
    def loss_and_accuracy(self, split: str) -> tuple[float, float]:
        """Of the model on a split, as it is tested: in evaluation mode, without augmentation."""
        classifier, data, _ = self.restored()
        found = [(classifier(batch.images), batch.labels) for batch in data.loader(split)]
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return float(classifier.loss(logits, labels)), float((logits.argmax(1) == labels).float().mean())


class Bench:
    """What a study is given.

    Args:
        folder: for its runs.
        seeds: runs of each variant.
        scale: ``quick`` is for the digits, in seconds; ``standard`` takes at most half an hour on two cores.
    """

    def __init__(self, folder: Path, seeds: int, scale: Scale) -> None:
        self.folder, self.seeds, self.scale = folder, seeds, scale
        self.workers = 1 if scale == "quick" else joblib.cpu_count()
        """Processes at a time."""
        self.seconds = 0.0
        """Of processors, in other processes than this one and before it."""

    def choose(self, quick: Value, standard: Value, full: Value | None = None) -> Value:
        """What belongs to this scale; that of ``standard`` where ``full`` asks for no more."""
        return {"quick": quick, "standard": standard, "full": standard if full is None else full}[self.scale]

    def data(self, **options: Any) -> Callable[[], ImageDataModule]:
        """MNIST, or the digits where it must be quick, with options of `ImageDataModule`."""
        return partial(Digits if self.scale == "quick" else MNIST, **options)

    def train(self, variants: Mapping[str, Experiment | Callable[[int], Experiment]]) -> dict[str, list[Run]]:
        """Train and test every variant with every seed. What is there already, of the same experiment, stays.

        Args:
            variants: by name; a function gives that of a seed.

        Raises:
            UserError: for a mistake in an experiment; what else goes wrong in a run comes as it is.
        """
        names = [(variant, seed) for seed in range(self.seeds) for variant in variants]
        given = []
        for variant, seed in names:
            experiment = variants[variant]
            own = experiment if isinstance(experiment, Experiment) else experiment(seed)
            given.append((self.folder, f"{variant}-{seed}", own, seed))
        there = [trained(*each) for each in given]
        left = [each for each, run in zip(given, there, strict=True) if run is None]
        self.seconds += sum(_behind(*each) or 0.0 for each in left)
        print(f"  {len(left)} of {len(given)} runs are to be trained, {self.workers} at a time.", flush=True)
        try:
            made = iter(self.map(train, left))
        except KeyboardInterrupt:
            # Workers are killed in the middle of their runs: their locks are left to this process.
            for path in self.folder.glob(".*.running"):
                path.unlink(missing_ok=True)
            raise
        self.seconds += sum(run.seconds for run in there if run)
        runs = [run or next(made) for run in there]
        found: dict[str, list[Run]] = {variant: [] for variant in variants}
        for (variant, _), run in zip(names, runs, strict=True):
            found[variant].append(run)
        return found

    def losses_and_accuracies(
        self, runs: Mapping[Key, Sequence[Run]], split: str
    ) -> dict[Key, list[tuple[float, float]]]:
        """`Run.loss_and_accuracy` of every run, in the groups that they are in."""
        found = iter(self.map(Run.loss_and_accuracy, [(run, split) for each in runs.values() for run in each]))
        return {key: [next(found) for _ in each] for key, each in runs.items()}

    def map(self, function: Callable[..., Made], arguments: Iterable[tuple[Any, ...]]) -> list[Made]:
        """The function of each of the arguments, in their order, a process for every core unless it must be quick."""
        made = joblib.Parallel(n_jobs=self.workers)(joblib.delayed(_timed)(function, *each) for each in arguments)
        self.seconds += sum(seconds for _, seconds in made) if self.workers > 1 else 0
        return [result for result, _ in made]


def _timed(function: Callable[..., Made], *arguments: Any) -> tuple[Made, float]:
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def trained(folder: Path, name: str, experiment: Experiment, seed: int) -> Run | None:
    """What `train` has left of the same experiment, if it has ended."""
    done = folder / name / "done.json"
    if done.exists() and _holds(folder / f"{name}.yaml", experiment.config(seed)):
        return Run(folder / name, **json.loads(done.read_text()))
    return None


def _behind(folder: Path, name: str, experiment: Experiment, seed: int) -> float | None:
    """Seconds of the epochs that the same experiment had behind it when it was stopped; None if it never began."""
    if _holds(folder / f"{name}.yaml", experiment.config(seed)) and (folder / name / "last.ckpt").exists():
        return sum(float(row["seconds"]) for row in read_rows(folder / name / "metrics.csv"))
    return None


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def train(folder: Path, name: str, experiment: Experiment, seed: int) -> Run:
    """Fit and test in ``folder/name``, saying in a line how it went; the same experiment goes on where it was stopped.

    Args:
        folder: of the study.
        name: of the run.
        experiment: what to train.
        seed: of weights, order and augmentation.

    Raises:
        UserError: for a mistake in the experiment.
    """
    config, before = folder / f"{name}.yaml", _behind(folder, name, experiment, seed)
    if before is None:
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(config, experiment.config(seed))
    start = time.process_time()
    where = ["--trainer.default_root_dir", str(folder), "--name", name, "--wandb", "off", "--ckpt_path", "auto"]
    # A line per run is enough; what the run itself says is in its folder.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            code = run_verb("fit", ["--config", str(config), *where])
            code = code or run_verb("test", ["--ckpt_path", str(folder / name / "best.ckpt")])
        except UprightError as error:
            raise UserError(f"{name}: {error}") from error
    if code:
        raise KeyboardInterrupt
    metrics = json.loads((folder / name / "test.json").read_text())["metrics"]
    run = Run(folder / name, metrics, round((before or 0.0) + time.process_time() - start, 1))
    write_text(folder / name / "done.json", json.dumps({"metrics": run.metrics, "seconds": run.seconds}) + "\n")
    print(f"  {name}: {run.seconds:.0f} s, test accuracy {metrics['test/accuracy']:.4f}", flush=True)
    return run
