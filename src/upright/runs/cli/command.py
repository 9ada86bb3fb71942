"""What Lightning's verbs have in common here: their options, and the trainer."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.runs.checkpoint_io import AtomicCheckpointIO
from upright.runs.cli.parser import OneLineParser
from upright.runs.folder import ROOT
from upright.runs.hooks import NoProfiler
from upright.training.classifier import ImageClassifier

TRAINER_DEFAULTS = {
    "default_root_dir": str(ROOT),
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    # Several processes are a choice: they change the batch that the optimiser sees.
    "devices": 1,
    # Everything is logged per epoch; Lightning warns when an epoch has fewer steps than this.
    "log_every_n_steps": 1,
}


class Command(LightningCLI):
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
        return {self.verb: LightningCLI.subcommands()[self.verb]}

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
        parser.add_argument(
            "--allow_seen_images",
            action="store_true",
            help="Go on where the model was trained on images that it would be judged by.",
        )

    def option(self, key: str) -> Any:
        """What the command line and the configs give together."""
        return self._get(self.config, key)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the run's folder, before anything is built."""
        if self.option("data") is None:
            raise UserError("No data: add `data: data/digits.yaml` to the config, or --data configs/data/digits.yaml.")

    def instantiate_trainer(self, callbacks: Sequence[Callback] = (), **kwargs: Any) -> Any:
        """Lightning's trainer, with Upright's checkpoint writer.

        Args:
            callbacks: beside those of the config.
            kwargs: what takes the place of the config's.
        """
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        plugins = config["plugins"] or []
        config["plugins"] = [*(plugins if isinstance(plugins, list | tuple) else [plugins]), AtomicCheckpointIO()]
        config["logger"] = False if config["logger"] is None else config["logger"]
        config["profiler"] = config["profiler"] or NoProfiler()
        try:
            return self._instantiate_trainer(config, list(callbacks))
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error
