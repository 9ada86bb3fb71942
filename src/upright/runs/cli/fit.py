"""``fit``: train a run in its own folder, or resume it."""

import shlex
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from upright.architectures.factory import wrap_foreign
from upright.checkpoint import KEY, git_commit, read_checkpoint
from upright.data.configs import adopt_format
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import write_text
from upright.images import ImageSpec
from upright.runs.callbacks import Divergence, GradientNorm, MetricsFile, brief, checkpoints
from upright.runs.cli.command import Command, early_options, listed
from upright.runs.folder import is_first_process, locked_run, replacing_run
from upright.runs.interruption import Interrupted, Interruption
from upright.runs.loggers import log_best_metrics, mlflow_logger, tensorboard_logger
from upright.runs.plan import agent_run, config_to_resume, plan_run, run_name
from upright.runs.plots import RunPlots
from upright.runs.resuming import check_resumable, check_supported, is_complete
from upright.runs.tracking import Artifacts, finish_wandb, wandb_logger
from upright.tables import read_rows
from upright.training.finetuning import start_from
from upright.training.module import ImageModule
from upright.training.restoring import check_data

MODEL = "upright.ImageClassifier"

NOT_RECORDED = (
    *("config", "name", "force", "ckpt_path", "allow_seen_images"),
    *("wandb", "tensorboard", "mlflow", "save_every_n_steps", "compile"),
)
"""Options that are not part of the experiment, and so not of ``config.yaml``."""


def experiment(model: Callable[[ImageSpec], ImageModule]) -> None:
    """Declare the option ``--model``; its types do not have to be annotated.

    Args:
        model: Arguments of ImageClassifier, or class_path and init_args of another ImageModule.
    """


def fit(arguments: Sequence[str]) -> None:
    """Train, or resume, with the options that follow ``upright fit``."""
    early = early_options(arguments)
    if not early.config and not early.help_all:
        config = config_to_resume(early.ckpt_path, early.root, early.name)
        # The run stays in its folder, whatever the working directory.
        root = config.parent.resolve().parent
        arguments = ["--config", str(config), "--trainer.default_root_dir", str(root), *arguments]
    with ExitStack() as resources:
        Fit(arguments, resources).train()


class Fit(Command):
    """Build a run. ``resources`` releases the lock of its folder when it is closed."""

    def __init__(self, arguments: Sequence[str], resources: ExitStack) -> None:
        self.resources = resources
        super().__init__("fit", arguments)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the model: a callable that takes the data's spec, by default `ImageClassifier`."""
        parser.add_function_arguments(experiment, fail_untyped=False, sub_configs=True)
        parser.set_defaults({"model": {"class_path": MODEL}})
        super().add_core_arguments_to_parser(parser)

    def before_instantiate_classes(self) -> None:
        """Plan the run and lock its folder, before anything is built."""
        if self.config.data is None:
            raise UserError("No data: add `data: data/digits.yaml` to the config, or --data configs/data/digits.yaml.")
        if self.config.monitor != "val/loss" and self.config.mode is None:
            raise UserError(f"--monitor {self.config.monitor} needs --mode min or --mode max.")
        wrap_foreign(self.config.model)
        adopt_format(self.config.model, self.config.data)
        options, root = self.config, Path(self.config.trainer.default_root_dir)
        folder = root / run_name(options.name, [str(path) for path in options.config or ()])
        if is_first_process():
            self.resources.enter_context(locked_run(folder))
        # Other processes follow the first one, which may have created the folder meanwhile.
        force = options.force or not is_first_process()
        self.plan = plan_run(folder, ckpt_path=options.ckpt_path, start_from=options.start_from, force=force)
        self.checkpoint = self._read_checkpoint()

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if (path := self.plan.checkpoint) is None:
            return None
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            if self.plan.resumes_in_place and path.name == "last.ckpt":
                error.args = (f"{error} --ckpt_path best resumes from the best one, --force starts a new run.",)
            raise
        start, recorded = self.config.start_from, checkpoint[KEY]["run"].get("start") or {}
        same_start = start is None or recorded.get("path") in (start, str(Path(start) / "best.ckpt"))
        if not same_start and self.config.ckpt_path != "auto":
            raise UserError(
                "--start_from starts a run, and --ckpt_path resumes one that has its weights: give one of them."
            )
        return checkpoint

    def instantiate_classes(self) -> None:
        """Build the data, the model for them, and the trainer."""
        self.config_init = self.instantiate()
        self.datamodule = self.config_init.data
        spec = getattr(self.datamodule, "spec", None)
        if not isinstance(spec, ImageSpec):
            raise UserError(
                f"{type(self.datamodule).__name__} needs an attribute `spec`, an upright.images.ImageSpec: the network "
                "is built for it."
            )
        self.model = self.config_init.model(spec)
        run = {"name": self.plan.name, "id": agent_run() or uuid.uuid4().hex[:8]}
        if self.checkpoint and self.plan.resumes_in_place:
            run["id"] = self.checkpoint[KEY]["run"]["id"]
        self.model.run = run
        self.interruption = Interruption(self.plan.folder / "last.ckpt")
        check_supported(self.config_init.trainer)
        # Lightning looks in its root folder for checkpoints of a requeued job, and takes those of any run.
        options: dict[str, Any] = {"default_root_dir": str(self.plan.folder)}
        if loggers := self._loggers(run):
            options["logger"] = loggers
        self.trainer = self.instantiate_trainer(self._callbacks(), **options)

    def _loggers(self, run: dict[str, Any]) -> list[Logger]:
        """Return the loggers of the config, by default W&B, and those of the options."""
        configured, folder = self.config_init.trainer.logger, self.plan.folder
        if self.config.trainer.fast_dev_run:
            return []
        if isinstance(configured, bool):
            # Lightning replaces True by a default logger of its own.
            loggers = []
        elif configured is None:
            loggers = [wandb_logger(self.config.wandb, folder, run)]
        else:
            loggers = listed(configured)
        resumed_at = self.checkpoint["global_step"] if self.checkpoint and self.plan.resumes_in_place else None
        if self.config.tensorboard:
            loggers.append(tensorboard_logger(folder, resumed_at))
        if self.config.mlflow:
            loggers.append(mlflow_logger(folder, run))
        return [logger for logger in loggers if logger is not None]

    def _callbacks(self) -> list[Callback]:
        folder = self.plan.folder
        if self.config.trainer.fast_dev_run:
            return [self.interruption]
        return [
            RunConfig(folder, self.recorded()),
            Divergence(folder),
            *checkpoints(folder, self.config.monitor, self.config.mode or "min", self.config.save_every_n_steps),
            self.interruption,
            # Before the callbacks that write its metrics.
            *([GradientNorm()] if self.config.log_grad_norm else []),
            MetricsFile(folder / "metrics.csv", lines=not self.config.trainer.enable_progress_bar),
            RunPlots(folder),
            Artifacts(folder),
        ]

    def recorded(self) -> dict[str, Any]:
        """Return the experiment as plain data with all defaults, for ``config.yaml``."""
        options = {key: value for key, value in self.as_data().items() if key not in NOT_RECORDED}
        if options["model"]["class_path"] == MODEL:
            # In the short form that people write.
            options["model"] = options["model"]["init_args"]
        return options

    def train(self) -> None:
        """Train. If the run writes no checkpoint, delete its folder, and restore the run that it replaced."""
        model, data, plan = self.model, self.datamodule, self.plan
        if self.config.compile:
            # Compile in place, so that the weights keep their names.
            model.model.compile()
        if self.checkpoint is not None:
            assert plan.checkpoint
            model.load_weights(self.checkpoint, plan.checkpoint)
            if isinstance(data, ImageDataModule):
                check_data(self.checkpoint[KEY], data, plan.checkpoint, same_split=True)
            if self.config.ckpt_path == "auto" and is_complete(self.checkpoint, self.trainer):
                self._print(f"Run '{plan.folder}' is complete: all its epochs are done.")
                return
            check_resumable(self.checkpoint, model, data, self.trainer, plan.checkpoint)
        else:
            check = isinstance(data, ImageDataModule) and not self.config.allow_seen_images
            for line in start_from(model, plan.start, data if check else None):
                self._print(line)
            if self.trainer.max_epochs == 0 and not model.start:
                raise UserError("trainer.max_epochs 0 trains nothing: give more, or weights with --start_from.")
        first = self.trainer.is_global_zero
        new = first and not plan.resumes_in_place
        with replacing_run(plan.folder) if new else nullcontext(), self.interruption.listening():
            try:
                self.trainer.fit(model, data, ckpt_path=plan.checkpoint and str(plan.checkpoint), weights_only=True)
                if self.trainer.max_epochs == 0:
                    self.trainer.validate(model, data, verbose=False)
                    self.trainer.save_checkpoint(plan.folder / "best.ckpt")
            except BaseException as error:
                if isinstance(error, Interrupted) and first:
                    print(self._how_to_resume(), file=sys.stderr)
                if self.trainer.strategy.launcher is not None:
                    # Without this, the other processes wait for this one.
                    self.trainer.strategy.launcher.kill(9)
                raise
            finally:
                finish_wandb()
            if self.config.trainer.fast_dev_run:
                self._print("fast_dev_run: every step ran, and nothing was written. Leave it out to train.")
            else:
                self._print(_summary(plan.folder))

    def _print(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, flush=True)

    def _how_to_resume(self) -> str:
        last = self.plan.folder / "last.ckpt"
        if not last.is_file():
            return "upright: stopped before the first step; nothing was written."
        options = "".join(
            f" --{name} {self.config[name]}"
            for name in ("wandb", "save_every_n_steps")
            if self.config[name] != self.parser.get_default(name)
        )
        options += "".join(f" --{name}" for name in ("tensorboard", "mlflow", "compile") if self.config[name])
        return (
            f"upright: stopped after step {self.trainer.global_step}; to resume: "
            f"upright fit --ckpt_path {shlex.quote(str(last))}{options}"
        )


class RunConfig(Callback):
    """Write ``config.yaml``, print notes about the data, and pass the experiment and its result to the loggers."""

    def __init__(self, folder: Path, experiment: dict[str, Any]) -> None:
        self.folder, self.experiment = folder, experiment

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ImageModule)
        facts: dict[str, Any] = {"git_commit": git_commit()}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            for remark in data.remarks:
                print(f"Note: {remark}", file=sys.stderr)
            facts["split_digest"] = data.manifest.digest
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.experiment, sort_keys=False))
        facts |= {"start": pl_module.start} if pl_module.start else {}
        for logger in trainer.loggers:
            logger.log_hyperparams(self.experiment | facts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = self.folder / "best.ckpt"
        if trainer.is_global_zero and best.is_file():
            log_best_metrics(trainer, best)


def _summary(folder: Path) -> str:
    """Return the result of a run in five lines."""
    best, rows = folder / "best.ckpt", read_rows(folder / "metrics.csv")
    seconds = [float(row["seconds"]) for row in rows]
    images = [float(row["images_per_second"]) * part for row, part in zip(rows, seconds, strict=True)]
    total = sum(seconds)
    if best.is_file():
        checkpoint = read_checkpoint(best)
        epochs = int(rows[-1]["epoch"]) + 1 if rows else checkpoint["epoch"] + 1
        first = f"Best: epoch {checkpoint['epoch'] + 1} of {epochs}" if checkpoint["global_step"] else "Not trained"
        first += f"  {brief(checkpoint[KEY]['metrics'])}"
    else:
        best, first = folder / "last.ckpt", "Best: unknown, because nothing was validated; there is last.ckpt"
    return (
        f"\n{first}\n"
        f"Time: {f'{total:.0f} seconds' if total < 60 else f'{total / 60:.1f} minutes'}, "
        f"{sum(images) / max(total, 1e-9):,.0f} images per second\n"
        f"Run:  {folder}\n"
        f"Next: upright test --ckpt_path {best}"
    )
