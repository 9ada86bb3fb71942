"""Base class of ``fit validate test predict``: LightningCLI with Upright's parser, data and trainer."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from upright.errors import UserError, one_line
from upright.examples import find_config
from upright.options import LIGHTNING
from upright.runs.checkpoint_io import AtomicCheckpointIO
from upright.runs.cli.parser import OneLineParser, explain, user_error
from upright.runs.folder import ROOT

TRAINER_DEFAULTS = {
    "default_root_dir": str(ROOT),
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    # Several processes change the optimiser's effective batch, so the user must ask for them.
    "devices": 1,
    # Metrics are logged per epoch; Lightning warns if an epoch has fewer steps than this.
    "log_every_n_steps": 1,
}
CONFIG_OPTIONS = ("--config", "-c", "--data")


def early_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options that name a run or a checkpoint; its config or data become the parser's defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--name")
    parser.add_argument("--trainer.default_root_dir", dest="root", type=Path, default=ROOT)
    parser.add_argument("--help_all", action="store_true")
    return parser.parse_known_args(arguments)[0]


class Command(LightningCLI):
    """LightningCLI for one command. It builds trainer, model and data; the command then runs the trainer."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
        super().__init__(
            datamodule_class=L.LightningDataModule,
            parser_class=OneLineParser,
            parser_kwargs={"prog": f"upright {command}", "allow_abbrev": False},
            trainer_defaults=TRAINER_DEFAULTS | {"enable_progress_bar": sys.stderr.isatty()},
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=resolve_configs(arguments),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args`` alone. Lightning's own method warns if ``sys.argv`` has any."""
        self.config = parser.parse_args(args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of data and trainer, which all commands have."""
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options; LightningCLI has ``--config`` itself."""
        for each in fields(LIGHTNING[self.command]):
            if each.name != "config":
                kind = {"action": "store_true"} if each.type is bool else {"type": each.type, "default": each.default}
                parser.add_argument(f"--{each.name}", help=each.metadata["help"], **kind)

    def instantiate_trainer(self, callbacks: Sequence[Callback] = (), **kwargs: Any) -> L.Trainer:
        """Build Lightning's trainer, with ``callbacks`` before those of the config."""
        config = self.config_init.trainer
        kwargs = {"logger": config.logger or False, **kwargs}
        try:
            return super().instantiate_trainer(
                callbacks=[*callbacks, *listed(config.callbacks)],
                plugins=[*listed(config.plugins), AtomicCheckpointIO()],
                **kwargs,
            )
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(one_line(error)) from error

    def instantiate(self) -> Any:
        """Return the parsed options with their classes instantiated."""
        try:
            return self.parser.instantiate(self.config)
        except (ValueError, TypeError, ImportError) as error:
            raise user_error(error) or UserError(explain(str(error))) from error

    def as_data(self) -> dict[str, Any]:
        """Return the parsed options as plain data, with all defaults."""
        try:
            options: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        except ValueError as error:
            raise UserError(f"An option cannot be recorded as YAML: {explain(str(error))}") from error
        return options


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Replace the names of configs that come with Upright by their paths, and let ``--data FILE`` replace earlier data.

    jsonargparse would merge options of one dataset into the other.
    """
    words: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        words += [option, value] if equals and option in CONFIG_OPTIONS else [argument]
    resolved: list[str] = []
    for previous, word in zip(["", *words], words, strict=False):
        if previous in CONFIG_OPTIONS:
            word = str(find_config(word))
            if previous == "--data" and Path(word).suffix in (".yaml", ".yml", ".json"):
                resolved += ["null", "--data"]
        resolved.append(word)
    return resolved


def listed(value: Any) -> list[Any]:
    """Return an option that is one object, several or none as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
