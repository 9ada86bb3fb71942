"""``fit``: a run in its own folder, begun, stopped, gone on with."""

import shlex
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from upright.checkpoint import KEY, find_checkpoint, git_commit, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UprightError, UserError
from upright.files import check_name, check_replaceable, write_text
from upright.runs.callbacks import Divergence, GradientNorm, MetricsFile, RunRecord, brief, checkpoints
from upright.runs.cli.arguments import value_of
from upright.runs.cli.command import Command
from upright.runs.folder import ROOT, begun, claimed, is_first_process
from upright.runs.hooks import without_empty_hooks
from upright.runs.interruption import Interrupted, Interruption
from upright.runs.pictures import RunPictures
from upright.runs.resuming import check_resumable, is_done
from upright.runs.tracking import Artifacts, agent_run, finish_wandb, wandb_logger
from upright.tables import read_rows
from upright.training.classifier import ImageClassifier
from upright.training.finetuning import start_from
from upright.training.restoring import check_data, load_weights

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


class Fit(Command):
    """A run, of which one process at a time writes the folder."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Without Lightning's checkpoint; ours may be ``auto``."""
        return {self.verb: super().subcommands()[self.verb] | {"ckpt_path"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Of the run, and of what it goes on from or begins with."""
        super().add_arguments_to_parser(parser)
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

    def before_instantiate_classes(self) -> None:
        """Find the run's folder, and what it goes on from or begins with; refuse another run that stands there."""
        super().before_instantiate_classes()
        self.name = self._name()
        check_name(self.name)
        self.folder = Path(self.option("trainer").default_root_dir or ROOT) / self.name
        if is_first_process():
            self.held.enter_context(claimed(self.folder))
        auto, start = self.option("ckpt_path") == "auto", self.option("start_from")
        self.checkpoint = self._checkpoint()
        # A run that goes on has its start behind it: the config's is then history, and another one a contradiction,
        # but where the same command stands for both.
        if self.checkpoint and not auto and value_of(self.arguments, "--start_from"):
            raise UserError(
                "--start_from begins a run, and --ckpt_path goes on with one that holds its weights: give one of them."
            )
        self.start = find_checkpoint(start) if start is not None and not self.checkpoint else None
        self.goes_on = self.checkpoint is not None and self.checkpoint.parent.resolve() == self.folder.resolve()
        if self.goes_on or not self.folder.exists() or not is_first_process():
            return
        check_replaceable(self.folder, "the folder of a run", "config.yaml")
        # With auto, what is there did not get as far as a checkpoint.
        if not self.option("force") and not auto:
            raise UserError(
                f"Run '{self.folder}' exists: --ckpt_path last goes on with it, --force replaces it, "
                "--name gives this one another name."
            )

    def _name(self) -> str:
        configs = [str(path) for path in self.option("config") or []]
        # The runs of a W&B sweep have one config, and an id each.
        stems = [f"{_stem(path)}-{agent_run()}" if agent_run() else _stem(path) for path in reversed(configs)]
        # The parser reads an empty name as null.
        names = (value_of(self.arguments, "--name"), self.option("name"), *stems)
        return str(next(name for name in names if name is not None))

    def _checkpoint(self) -> Path | None:
        path = self.option("ckpt_path")
        if path == "auto":
            # In the first epoch the best may have been written, and the last not yet.
            path = next((kind for kind in ("last", "best") if (self.folder / f"{kind}.ckpt").is_file()), None)
        if path not in ("last", "best"):
            return None if path is None else find_checkpoint(path)
        checkpoint = self.folder / f"{path}.ckpt"
        if not checkpoint.is_file():
            raise UserError(f"There is no '{checkpoint}' to go on with; leave --ckpt_path out to start anew.")
        return checkpoint

    def instantiate_trainer(self, callbacks: Sequence[Callback] = (), **kwargs: Any) -> Any:
        """With what watches, writes down and draws a run, and its logger."""
        config = self._get(self.config_init, "trainer")
        run = {"name": self.name, "id": agent_run() or uuid.uuid4().hex[:8]}
        if self.checkpoint and self.goes_on:
            run["id"] = self._to_go_on_from()[KEY]["run"]["id"]
        self.interruption = Interruption(self.folder / "last.ckpt")
        own = [
            RunRecord(run),
            RunFolder(self),
            Divergence(self.folder),
            *checkpoints(self.folder, self.option("save_every_n_steps")),
            self.interruption,
            # Before what writes it down.
            *([GradientNorm()] if self.option("log_grad_norm") else []),
            MetricsFile(self.folder / "metrics.csv", lines=not config["enable_progress_bar"]),
            RunPictures(self.folder),
            Artifacts(self.folder),
        ]
        # Where Lightning looks for checkpoints of a requeued job, of any run.
        kwargs["default_root_dir"] = str(self.folder)
        if config["logger"] is None:
            kwargs["logger"] = wandb_logger(self.option("wandb"), self.folder, run)
        return super().instantiate_trainer([*own, *callbacks], **kwargs)

    def resolved_config(self) -> dict[str, Any]:
        """The whole experiment as plain data, all defaults included."""
        parser = self._parser(self.verb)
        text = parser.dump(self.config[self.verb], skip_unset=False, skip_link_targets=True)
        config: dict[str, Any] = yaml.safe_load(text)
        return {key: value for key, value in config.items() if key not in OWN_OPTIONS}

    def fit(self, model: ImageClassifier, datamodule: ImageDataModule, **_: Any) -> None:
        """Train; what did not get as far as a checkpoint leaves nothing behind, and what stood before stands again."""
        resume = str(self.checkpoint) if self.checkpoint else None
        if self.option("compile"):
            # In place: the weights keep their names.
            model.model.compile()
        if self.checkpoint:
            checkpoint = self._to_go_on_from()
            load_weights(model, checkpoint, self.checkpoint)
            check_data(checkpoint[KEY], datamodule, self.checkpoint, same_split=True)
            if self.option("ckpt_path") == "auto" and is_done(checkpoint, self.trainer):
                if self.trainer.is_global_zero:
                    print(f"Run '{self.folder}' has all of its epochs behind it.")
                return
            check_resumable(checkpoint, model, self.trainer, self.checkpoint)
        elif self.start:
            lines = start_from(model, self.start, datamodule, allow_seen=self.option("allow_seen_images"))
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
            raise UserError(f"{error} --ckpt_path best goes on from the best one, --force begins anew.") from None

    def _how_to_go_on(self) -> str:
        last = self.folder / "last.ckpt"
        if not last.is_file():
            return "upright: stopped before the first step; nothing is left."
        given = ((option, value_of(self.arguments, f"--{option}")) for option in ("wandb", "save_every_n_steps"))
        options = "".join(f" --{option} {value}" for option, value in given if value is not None)
        options += " --compile" if self.option("compile") else ""
        step = self.trainer.global_step
        return (
            f"upright: stopped after step {step}; to go on: upright fit --ckpt_path {shlex.quote(str(last))}{options}"
        )


@without_empty_hooks
class RunFolder(Callback):
    """Writes ``config.yaml``, and tells the logger what the run is."""

    def __init__(self, cli: Fit) -> None:
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


def _stem(path: str) -> str:
    # The config of an existing run stands for the run.
    return Path(path).resolve().parent.name if Path(path).name == "config.yaml" else Path(path).stem
