"""Run the experiments of a study by ``upright fit``, in parallel."""

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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from upright.architectures.lenet import LeNet
from upright.architectures.localisers import ConvLocaliser, Network
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.architectures.transforms import TransformName
from upright.cores import count_cores
from upright.data.batch import Batch
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.mnist import MNIST
from upright.errors import UprightError, UserError
from upright.files import file_hash, write_text
from upright.images import ImageSpec
from upright.recipes import recipe
from upright.runs.cli.run import run as run_command
from upright.tables import read_rows
from upright.training.classifier import ImageClassifier
from upright.training.losses import CrossEntropy
from upright.training.model import Model
from upright.training.restoring import restore
from upright.training.schedules import OneCycle

Scale = Literal["quick", "standard", "full"]
ReturnValue = TypeVar("ReturnValue")
Value = TypeVar("Value")
Key = TypeVar("Key")

LENET = partial(LeNet, activation="relu", pooling="max")


def transformed(transform: TransformName, network: Network = LENET, **options: Any) -> Network:
    """Return a factory of ``network`` behind a spatial transformer; ``options`` are those of `SpatialTransformer`.

    By default, the localiser is the paper's.
    """
    own: dict[str, Any] = {"localiser": ConvLocaliser, "padding": "border"} | options
    transformer = partial(SpatialTransformer, transform=transform, **own)
    return partial(TransformerNetwork, transformer=transformer, network=network)


class Experiment(NamedTuple):
    """Settings of one run of ``upright fit``, with the defaults of the studies.

    Network, data, optimizer, loss and callbacks are classes, or partials of classes, as in a config. ``start_from`` is
    a checkpoint with the initial weights. The precision ``bf16-mixed`` halves the time of a convolution on a processor
    with bfloat16.
    """

    network: Network
    data: Callable[[], ImageDataModule]
    epochs: int
    optimizer: Callable[..., Any] = partial(AdamW, lr=0.003, weight_decay=0.01)
    loss: Callable[..., Any] = CrossEntropy
    init: str | None = None
    upright_weight: float = 0.0
    prior_weight: float = 0.0
    callbacks: tuple[Callable[[], Any], ...] = ()
    validate_every: int = 1
    start_from: Path | None = None
    precision: str = "32-true"

    def config(self, seed: int) -> str:
        """Return the YAML for ``upright fit``."""
        parts = {"network": self.network, "optimizer": self.optimizer, "scheduler": OneCycle, "loss": self.loss}
        model = {name: recipe(part) for name, part in parts.items()}
        model |= {"init": self.init, "upright_weight": self.upright_weight, "prior_weight": self.prior_weight}
        callbacks = [recipe(callback) for callback in self.callbacks]
        trainer = {"max_epochs": self.epochs, "enable_progress_bar": False, "callbacks": callbacks}
        trainer |= {"check_val_every_n_epoch": self.validate_every, "precision": self.precision}
        start = str(self.start_from) if self.start_from else None
        data = recipe(self.data)
        config = {"seed_everything": seed, "model": model, "data": data, "trainer": trainer, "start_from": start}
        # The hash distinguishes experiments whose initial weights are different files with the same name.
        comment = f"# {file_hash(self.start_from)}\n" if self.start_from else ""
        return comment + yaml.safe_dump(config, sort_keys=False)


class Run(NamedTuple):
    """A complete run.

    Args:
        folder: folder of the run, as ``upright fit`` wrote it.
        metrics: metrics of ``best.ckpt`` on the test split.
        seconds: processor time of training and test; wall-clock time for epochs before an interruption.
    """

    folder: Path
    metrics: dict[str, float]
    seconds: float

    def column(self, name: str) -> list[float]:
        """Return a column of ``metrics.csv``, without the epochs that have no value."""
        return [float(row[name]) for row in read_rows(self.folder / "metrics.csv") if row.get(name)]

    @torch.no_grad()
    def loss_and_accuracy(self, split: str) -> tuple[float, float]:
        """Return loss and accuracy of ``best.ckpt`` on a split, without augmentation."""
        classifier, data, *_ = restore(self.folder / "best.ckpt")
        assert isinstance(classifier, ImageClassifier)
        pairs = [(classifier(batch.images), batch.labels) for batch in data.loader(split)]
        logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return float(classifier.loss(logits, labels)), float((logits.argmax(1) == labels).float().mean())


class TrainingJob(NamedTuple):
    """One run of an experiment with one seed, in ``folder``. The text of its config is in a YAML beside the folder."""

    folder: Path
    config: str

    @property
    def path(self) -> Path:
        """Path of the YAML."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    def owns_folder(self) -> bool:
        """Return whether the folder belongs to this experiment."""
        return self.path.exists() and self.path.read_text() == self.config

    def result(self) -> Run | None:
        """Return the run, if it is complete."""
        record = self.folder / "done.json"
        return Run(self.folder, **json.loads(record.read_text())) if self.owns_folder() and record.exists() else None

    def seconds_before(self) -> float | None:
        """Return the seconds of the epochs before an interruption; None without a checkpoint to resume from."""
        if self.owns_folder() and (self.folder / "last.ckpt").exists():
            return sum(float(row["seconds"]) for row in read_rows(self.folder / "metrics.csv"))
        return None

    def run(self) -> Run:
        """Train and test, and print a line. Resume if the same experiment was interrupted.

        Raises:
            UserError: for a mistake in the experiment.
        """
        folder, before = self.folder, self.seconds_before()
        if before is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, self.config)
        start = time.process_time()
        options = ["--trainer.default_root_dir", str(folder.parent), "--name", folder.name]
        options += ["--wandb", "off", "--ckpt_path", "auto"]
        # Print only one line per run. All other output is in the folder of the run.
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            try:
                code = run_command("fit", ["--config", str(self.path), *options])
                code = code or run_command("test", ["--ckpt_path", str(folder / "best.ckpt")])
            except UprightError as error:
                raise UserError(f"{folder.name}: {error}") from error
        if code:
            raise KeyboardInterrupt
        metrics = json.loads((folder / "test.json").read_text())["metrics"]
        run = Run(folder, metrics, round((before or 0.0) + time.process_time() - start, 1))
        write_text(folder / "done.json", json.dumps({"metrics": run.metrics, "seconds": run.seconds}) + "\n")
        print(f"  {folder.name}: {run.seconds:.0f} s, test accuracy {metrics['test/accuracy']:.4f}", flush=True)
        return run


class Bench:
    """The environment of a study: its scale, its data, and its runs, ``seeds`` of each variant.

    The scale ``quick`` uses the digits and takes seconds; ``standard`` takes at most half an hour on two cores.
    """

    def __init__(self, folder: Path, seeds: int, scale: Scale) -> None:
        self.folder, self.seeds, self.scale = folder, seeds, scale
        self.workers = 1 if scale == "quick" else count_cores()
        """Number of parallel processes."""
        self.seconds = 0.0
        """Processor time in other processes and before an interruption, in seconds."""

    def choose(self, quick: Value, standard: Value, full: Value | None = None) -> Value:
        """Return the value for this scale; ``full`` is ``standard`` by default."""
        return {"quick": quick, "standard": standard, "full": standard if full is None else full}[self.scale]

    def data(self, **options: Any) -> Callable[[], ImageDataModule]:
        """Return MNIST, or scikit-learn's digits for the scale ``quick``, with options of `ImageDataModule`."""
        return partial(Digits if self.scale == "quick" else MNIST, **options)

    def train(self, variants: Mapping[Key, Experiment | Callable[[int], Experiment]]) -> dict[Key, list[Run]]:
        """Train and test every variant with every seed. Runs that are already complete are not repeated.

        A variant is an experiment, or a function that returns the experiment for a seed. Its name may have several
        parts.

        Raises:
            UserError: for a mistake in an experiment.
        """
        jobs = []
        for seed in range(self.seeds):
            for key, experiment in variants.items():
                name = "-".join(map(str, key)) if isinstance(key, tuple) else str(key)
                seeded = experiment if isinstance(experiment, Experiment) else experiment(seed)
                jobs.append(TrainingJob(self.folder / f"{name.replace(' ', '_')}-{seed}", seeded.config(seed)))
        results = [job.result() for job in jobs]
        pending_jobs = [job for job, run in zip(jobs, results, strict=True) if run is None]
        self.seconds += sum(run.seconds for run in results if run)
        self.seconds += sum(job.seconds_before() or 0.0 for job in pending_jobs)
        print(f"  {len(pending_jobs)} of {len(jobs)} runs to train, {self.workers} at a time.", flush=True)
        try:
            new = iter(self.map(TrainingJob.run, [(job,) for job in pending_jobs]))
        except KeyboardInterrupt:
            # joblib has killed the workers during their runs, so this process removes their locks.
            for path in self.folder.glob(".*.running"):
                path.unlink(missing_ok=True)
            raise
        runs = [run or next(new) for run in results]
        return {key: runs[number :: len(variants)] for number, key in enumerate(variants)}

    def measure(
        self, function: Callable[..., ReturnValue], runs: Mapping[Key, Sequence[Run]], *arguments: Any
    ) -> dict[Key, list[ReturnValue]]:
        """Call a function with each run and the arguments. Return the results in the same groups."""
        results = iter(self.map(function, [(run, *arguments) for each in runs.values() for run in each]))
        return {key: [next(results) for _ in each] for key, each in runs.items()}

    def map(self, function: Callable[..., ReturnValue], arguments: Iterable[tuple[Any, ...]]) -> list[ReturnValue]:
        """Call the function for all arguments, in their order. Unless the scale is quick, calls run in parallel."""
        timed = joblib.Parallel(n_jobs=self.workers)(joblib.delayed(_timed)(function, *each) for each in arguments)
        self.seconds += sum(seconds for _, seconds in timed) if self.workers > 1 else 0
        return [result for result, _ in timed]


def _timed(function: Callable[..., ReturnValue], *arguments: Any) -> tuple[ReturnValue, float]:
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def signals_and_gradients(
    network: nn.Module, layers: Iterable[nn.Module], spec: ImageSpec, batch: Batch
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the outputs of ``layers`` for a batch, and the gradients of the cross entropy for them, as float64."""
    outputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    # After 110 layers, the squares of gradients can be too small for float32.
    loss = cross_entropy(Model(spec, network).double()(batch.images), batch.labels)
    return outputs, torch.autograd.grad(loss, outputs)
