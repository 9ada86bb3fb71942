"""``fit validate test predict``: Lightning's command line, with Upright's run folder, restoring and one-line errors."""

import csv
import io
import json
import logging
import re
import shlex
import signal
import sys
import tempfile
import time
import uuid
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from upright.data.datamodule import ImageDataModule
from upright.errors import UprightError
from upright.files import check_replaceable, write_text
from upright.tables import read_rows
from upright.training.arguments import replacing_data, value_of, with_own_config
from upright.training.callbacks import (
    Divergence,
    GradientNorm,
    MetricsFile,
    RunRecord,
    brief,
    checkpoints,
)
from upright.training.checkpoint import (
    KEY,
    AtomicCheckpointIO,
    check_data,
    check_name,
    find_checkpoint,
    git_commit,
    load_weights,
    read_checkpoint,
)
from upright.training.classifier import ImageClassifier
from upright.training.drawing import draw_confusion, save_picture
from upright.training.finetuning import start_from
from upright.training.hooks import NoProfiler, without_empty_hooks
from upright.training.interruption import Interrupted, Interruption
from upright.training.metrics import write_tables
from upright.training.parser import OneLineParser, user_error
from upright.training.pictures import RunPictures, draw_transformer
from upright.training.process import keep_freed_memory, leave_a_core
from upright.training.resuming import check_resumable, is_done
from upright.training.run_folder import ROOT, begun, claimed, is_first_process
from upright.training.seal import open_test_split
from upright.training.tracking import Artifacts, agent_run, finish_wandb, wandb_logger

TRAINER_DEFAULTS = {
    "default_root_dir": str(ROOT),
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    # Several processes are a choice: they change the batch that the optimiser sees.
    "devices": 1,
    # Everything is logged per epoch; Lightning warns when an epoch has fewer steps than this.
    "log_every_n_steps": 1,
}
OWN_OPTIONS = (
    "name",
    "force",
    "wandb",
    "save_every_n_steps",
    "compile",
    "output",
    "allow_seen_images",
    "no_cache",
    "ckpt_path",
    "weights_only",
    "config",
)


def run(verb: str, arguments: list[str]) -> int:
    """Run one of Lightning's verbs.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what followed it on the command line.

    Returns:
        The exit code: 0, or 128 and the signal by which a run was stopped.

    Raises:
        UprightError: for every mistake of the user's.
    """
    keep_freed_memory()
    leave_a_core()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        # Lightning 2.6 calls functions that jsonargparse 5 will not have; the version is pinned below it.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.pytorch.cli")
        warnings.filterwarnings("ignore", message=".*jsonargparse.*", category=DeprecationWarning)
        # Lightning 2.6 asks for a class that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # A resumed run goes on in its own folder.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        # It may do without the saving within epochs that the run had before.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        try:
            if "--no-cache" in arguments:
                # Last, for data that come after it would replace it.
                arguments = [*(argument for argument in arguments if argument != "--no-cache"), "--data.cache=none"]
            UprightCLI(verb, replacing_data(with_own_config(verb, arguments, Path(scratch))), held)
        except Interrupted as stop:
            # Whoever started several processes would take the first to end for the one that failed.
            return stop.exit_code if is_first_process() else 0
        except MisconfigurationException as error:
            raise UprightError(" ".join(str(error).split())) from error
        except UnicodeDecodeError as error:
            raise UprightError(f"A config must be YAML in UTF-8: {error}.") from error
        except ValueError as error:
            raise user_error(error) or error from None
        except UprightError:
            if not is_first_process():
                # The first of them says the same, and whoever started them ends them all.
                time.sleep(10)
            raise
    return 0


class UprightCLI(LightningCLI):
    """One verb of Lightning's, run.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: its options.
        held: keeps the run's folder from others until it is closed.
    """

    def __init__(self, verb: str, arguments: list[str], held: ExitStack) -> None:
        self.verb, self.arguments, self.held = verb, arguments, held
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            subclass_mode_data=True,
            parser_class=OneLineParser,
            trainer_defaults=TRAINER_DEFAULTS | {"enable_progress_bar": sys.stderr.isatty()},
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=[verb, *arguments],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # stock: a static method of all four
        """Only the verb that runs: its parser is a quarter of the start-up."""
        own = {"ckpt_path"} if self.verb == "fit" else set()
        return {self.verb: LightningCLI.subcommands()[self.verb] | own}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what we were given, whatever ``sys.argv`` says."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Upright's own options."""
        parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")
        # Put in place before parsing; here for --help and for near misses.
        parser.add_argument(
            "--no-cache", action="store_true", help="Decode files whenever they are wanted: --data.cache none."
        )
        if self.verb == "fit":
            parser.add_argument("--name", type=str | None, help="Name of the run; the config's by default.")
            parser.add_argument("--force", action="store_true", help="Replace an existing run of this name.")
            parser.add_argument(
                "--wandb",
                type=Literal["offline", "online", "off"],
                default="offline",
                help="Track with Weights & Biases on this disk (`wandb sync` uploads it later), on its server, or not.",
            )
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                help="Checkpoint to go on from: a file, `last` or `best` of the run, or `auto`: the last if there is "
                "one, else begin, so that one command line does for a scheduler.",
            )
            parser.add_argument(
                "--save_every_n_steps", type=int, default=0, help="Also write last.ckpt within an epoch; 0: do not."
            )
            parser.add_argument(
                "--compile",
                action="store_true",
                help="Compile the model with torch.compile; the first step then takes a minute or two.",
            )
            parser.add_argument(
                "--log_grad_norm",
                action="store_true",
                help="Log the norm of the gradients: mean and maximum per epoch.",
            )
            parser.add_argument(
                "--start_from",
                type=str | None,
                help="Weights to start from: an Upright checkpoint or run, or torchvision's .pth of a ResNet or VGG.",
            )
        parser.add_argument(
            "--allow_seen_images",
            action="store_true",
            help="Go on where the model was trained on images that it would be judged by.",
        )
        if self.verb == "predict":
            parser.add_argument(
                "--output", type=str | None, help="CSV to write; predictions.csv beside the checkpoint."
            )

    def _own(self, key: str) -> Any:
        return self._get(self.config, key)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the run's folder, before anything is built."""
        if self._own("data") is None:
            raise UprightError(
                "No data: add `data: data/digits.yaml` to the config, or --data configs/data/digits.yaml."
            )
        self.checkpoint: Path | None = None
        if self.verb != "fit":
            self.checkpoint = find_checkpoint(self._own("ckpt_path"))
            self.folder = self.checkpoint.parent
            return
        configs = [str(path) for path in self._own("config") or []]
        # The parser reads an empty name as null.
        # The runs of a W&B sweep have one config, and an id each.
        stems = [f"{_stem(path)}-{agent_run()}" if agent_run() else _stem(path) for path in reversed(configs)]
        names = (value_of(self.arguments, "--name"), self._own("name"), *stems)
        self.name = next(name for name in names if name is not None)
        check_name(self.name)
        self.folder = Path(self._own("trainer").default_root_dir or ROOT) / self.name
        if is_first_process():
            self.held.enter_context(claimed(self.folder))
        path, auto = self._own("ckpt_path"), self._own("ckpt_path") == "auto"
        if auto:
            # In the first epoch the best may have been written, and the last not yet.
            path = next((kind for kind in ("last", "best") if (self.folder / f"{kind}.ckpt").is_file()), None)
        if path in ("last", "best"):
            self.checkpoint = self.folder / f"{path}.ckpt"
            if not self.checkpoint.is_file():
                raise UprightError(
                    f"There is no '{self.checkpoint}' to go on with; leave --ckpt_path out to start anew."
                )
        elif path is not None:
            self.checkpoint = find_checkpoint(path)
        # A run that goes on has its start behind it: the config's is then history, and another one a contradiction,
        # but where the same command stands for both.
        if self.checkpoint and not auto and value_of(self.arguments, "--start_from"):
            raise UprightError(
                "--start_from begins a run, and --ckpt_path goes on with one that holds its weights: give one of them."
            )
        self.start = None
        if self._own("start_from") is not None and not self.checkpoint:
            self.start = find_checkpoint(self._own("start_from"))
        self.goes_on = self.checkpoint is not None and self.checkpoint.parent.resolve() == self.folder.resolve()
        if self.goes_on or not self.folder.exists() or not is_first_process():
            return
        check_replaceable(self.folder, "the folder of a run", "config.yaml")
        # With auto, what is there did not get as far as a checkpoint.
        if not self._own("force") and not auto:
            raise UprightError(
                f"Run '{self.folder}' exists: --ckpt_path last goes on with it, --force replaces it, "
                "--name gives this one another name."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Lightning's trainer with Upright's callbacks, logger and checkpoint writer."""
        config = self._get(self.config_init, "trainer")
        callbacks: list[Callback] = []
        logger: Logger | bool = False
        if self.verb == "fit":
            run = {"name": self.name, "id": agent_run() or uuid.uuid4().hex[:8]}
            if self.checkpoint and self.goes_on:
                run["id"] = self._to_go_on_from()[KEY]["run"]["id"]
            self.interruption = Interruption(self.folder / "last.ckpt")
            callbacks += [
                RunRecord(run),
                RunFolder(self),
                Divergence(self.folder),
                *checkpoints(self.folder, self._own("save_every_n_steps")),
                self.interruption,
                # Before what writes it down.
                *([GradientNorm()] if self._own("log_grad_norm") else []),
                MetricsFile(self.folder / "metrics.csv", lines=not config["enable_progress_bar"]),
                RunPictures(self.folder),
                Artifacts(self.folder),
            ]
            # Where Lightning looks for checkpoints of a requeued job, of any run.
            config = {**config, "default_root_dir": str(self.folder)}
            if config["logger"] is None:
                logger = wandb_logger(self._own("wandb"), self.folder, run) or False
        config = {**config, "plugins": [*_as_list(config["plugins"]), AtomicCheckpointIO()]}
        if config["logger"] is None:
            config["logger"] = logger
        if config["profiler"] is None:
            config["profiler"] = NoProfiler()
        try:
            return self._instantiate_trainer({**config, **kwargs}, callbacks)
        except ValueError as error:
            raise UprightError(" ".join(str(error).split())) from error

    def resolved_config(self) -> dict[str, Any]:
        """The whole experiment as plain data, all defaults included."""
        parser = self._parser(self.verb)
        text = parser.dump(self.config[self.verb], skip_unset=False, skip_link_targets=True)
        config: dict[str, Any] = yaml.safe_load(text)
        return {key: value for key, value in config.items() if key not in OWN_OPTIONS}

    def fit(self, model: ImageClassifier, datamodule: ImageDataModule, **_: Any) -> None:
        """Train; what did not get as far as a checkpoint leaves nothing behind, and what stood before stands again."""
        resume = str(self.checkpoint) if self.checkpoint else None
        if self._own("compile"):
            # In place: the weights keep their names.
            model.model.compile()
        if self.checkpoint:
            checkpoint = self._to_go_on_from()
            load_weights(model, checkpoint, self.checkpoint)
            check_data(checkpoint[KEY], datamodule, self.checkpoint, same_split=True)
            if self._own("ckpt_path") == "auto" and is_done(checkpoint, self.trainer):
                if self.trainer.is_global_zero:
                    print(f"Run '{self.folder}' has all of its epochs behind it.")
                return
            check_resumable(checkpoint, model, self.trainer, self.checkpoint)
        elif self.start:
            lines = start_from(model, self.start, datamodule, allow_seen=self._own("allow_seen_images"))
            if self.trainer.is_global_zero:
                print(*lines, sep="\n", flush=True)
        first = self.trainer.is_global_zero
        with begun(self.folder) if first and not self.goes_on else nullcontext(), self.interruption.listening():
            try:
                self.trainer.fit(model, datamodule=datamodule, ckpt_path=resume, weights_only=True)
            except BaseException as error:
                if isinstance(error, Interrupted) and first:
                    print(self._how_to_go_on(), file=sys.stderr)
                if self.trainer.strategy.launcher is not None:
                    # They would wait for this one.
                    self.trainer.strategy.launcher.kill(signal.SIGKILL)
                raise
            finally:
                finish_wandb()
        if self.trainer.is_global_zero:
            print(_end(self.folder))

    def _to_go_on_from(self) -> dict[str, Any]:
        assert self.checkpoint
        try:
            return read_checkpoint(self.checkpoint)
        except UprightError as error:
            if not self.goes_on or self.checkpoint.name != "last.ckpt":
                raise
            raise UprightError(f"{error} --ckpt_path best goes on from the best one, --force begins anew.") from None

    def _how_to_go_on(self) -> str:
        last = self.folder / "last.ckpt"
        if not last.is_file():
            return "upright: stopped before the first step; nothing is left."
        given = ((option, value_of(self.arguments, f"--{option}")) for option in ("wandb", "save_every_n_steps"))
        options = "".join(f" --{option} {value}" for option, value in given if value is not None)
        options += " --compile" if self._own("compile") else ""
        step = self.trainer.global_step
        return (
            f"upright: stopped after step {step}; to go on: upright fit --ckpt_path {shlex.quote(str(last))}{options}"
        )

    def _evaluate(self, model: ImageClassifier, datamodule: ImageDataModule) -> None:
        assert self.checkpoint
        checkpoint = read_checkpoint(self.checkpoint)
        load_weights(model, checkpoint, self.checkpoint)
        self.epoch = checkpoint["epoch"] + 1
        # The first --config is the checkpoint's own; anything about data beyond it is the user's.
        # How they are read, and in what batches, makes no other data of them.
        how = r"(?!\.(init_args\.)?(cache|num_workers|batch_size)\b)"
        given = [a for a in self.arguments[2:] if re.match(rf"--(data\b{how}|config\b)|-c\b", a)]
        judged_by = () if self._own("allow_seen_images") else ("val" if self.verb == "validate" else "test",)
        check_data(checkpoint[KEY], datamodule, self.checkpoint, same_split=not given, judged_by=judged_by)

    def _open_test_split(self, datamodule: ImageDataModule) -> None:
        assert self.checkpoint
        if self.trainer.is_global_zero:
            open_test_split(self.checkpoint, self.folder, datamodule, f"upright {self.verb}")

    def validate(self, model: ImageClassifier, datamodule: ImageDataModule, **_: Any) -> None:
        """Metrics of the validation split."""
        self._evaluate(model, datamodule)
        self.trainer.validate(model, datamodule=datamodule)

    def test(self, model: ImageClassifier, datamodule: ImageDataModule, **_: Any) -> None:
        """Metrics of the test split, also in ``test.json`` beside the checkpoint, with tables and pictures."""
        self._evaluate(model, datamodule)
        self._open_test_split(datamodule)
        (metrics,) = self.trainer.test(model, datamodule=datamodule)
        if not self.trainer.is_global_zero:
            return
        record = {"checkpoint": str(self.checkpoint), "data": datamodule.recipe, "metrics": metrics}
        write_text(self.folder / "test.json", json.dumps(record, indent=2) + "\n")
        print(f"Written: {self.folder / 'test.json'}")
        assert model.confusion is not None
        tables = write_tables(self.folder, model.confusion, model.spec.classes)
        print(f"Tables:  {', '.join(map(str, tables))}")
        pictures: dict[str, Any] = {
            "confusion": draw_confusion(f"Test, epoch {self.epoch}", model.confusion, model.spec.classes)
        }
        if model.transformers:
            pictures["transformer"] = draw_transformer(f"Test, epoch {self.epoch}", model, datamodule)
        for name, picture in pictures.items():
            save_picture(picture, self.folder / f"test_{name}.png")
            print(f"Picture: {self.folder / f'test_{name}.png'}")

    def predict(self, model: ImageClassifier, datamodule: ImageDataModule, **_: Any) -> None:
        """Probabilities of every image of the test split, as CSV."""
        if self.trainer.world_size > 1:
            raise UprightError(f"predict runs in one process, got {self.trainer.world_size}: --trainer.devices 1.")
        self._evaluate(model, datamodule)
        self._open_test_split(datamodule)
        batches = self.trainer.predict(model, datamodule=datamodule) or []
        index, labels, probabilities = (torch.cat(parts) for parts in zip(*batches, strict=True))
        names, classes = list(datamodule.names("test")), datamodule.spec.classes
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "label", "prediction", *classes])
        for i, label, row in zip(index.tolist(), labels.tolist(), probabilities, strict=True):
            writer.writerow([names[i], classes[label], classes[int(row.argmax())], *(f"{p:.6f}" for p in row.tolist())])
        path = Path(self._own("output") or self.folder / "predictions.csv")
        write_text(path, text.getvalue())
        print(f"Written: {path} ({len(index)} images)")


@without_empty_hooks
class RunFolder(Callback):
    """Writes ``config.yaml``, and tells the logger what the run is."""

    def __init__(self, cli: UprightCLI) -> None:
        self.cli = cli

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first step."""
        if trainer.is_global_zero:
            for remark in trainer.datamodule.remarks:
                print(f"Note: {remark}", file=sys.stderr)
            config = self.cli.resolved_config()
            self.cli.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.cli.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            facts = {"split_digest": trainer.datamodule.manifest.digest, "git_commit": git_commit()}
            facts |= {"start": pl_module.start} if pl_module.start else {}
            for logger in trainer.loggers:
                logger.log_hyperparams(config | facts)


def _end(folder: Path) -> str:
    """What a run came to, in five lines."""
    best, rows = folder / "best.ckpt", read_rows(folder / "metrics.csv")
    seconds = [float(row["seconds"]) for row in rows]
    images = [float(row["images_per_second"]) * part for row, part in zip(rows, seconds, strict=True)]
    took = sum(seconds)
    if best.is_file():
        checkpoint = read_checkpoint(best)
        epochs = int(rows[-1]["epoch"]) + 1 if rows else checkpoint["epoch"] + 1
        first = f"Best: epoch {checkpoint['epoch'] + 1} of {epochs}  {brief(checkpoint[KEY]['metrics'])}"
    else:
        best, first = folder / "last.ckpt", "Best: not known, for nothing was validated; there is last.ckpt"
    return (
        f"\n{first}\n"
        f"Time: {f'{took:.0f} seconds' if took < 60 else f'{took / 60:.1f} minutes'}, "
        f"{sum(images) / max(took, 1e-9):,.0f} images per second\n"
        f"Run:  {folder}\n"
        f"Next: upright test --ckpt_path {best}"
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _stem(path: str) -> str:
    # The config of an existing run stands for the run.
    return Path(path).resolve().parent.name if Path(path).name == "config.yaml" else Path(path).stem
