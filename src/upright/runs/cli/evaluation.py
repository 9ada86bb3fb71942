"""``validate test predict``: metrics and predictions of a checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from upright.checkpoint import KEY, find_checkpoint, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import write_text
from upright.recipes import Recipe
from upright.runs.cli.command import Command, early_options
from upright.runs.drawing import draw_confusion, save_png
from upright.runs.plots import draw_orientation, draw_transformer
from upright.runs.seal import open_test_split
from upright.runtime.task import task_of
from upright.tables import write_rows
from upright.training.metrics import write_tables
from upright.training.restoring import restore

READING_OPTIONS = ("batch_size", "cache", "num_workers")
"""Options of a datamodule that change how images are read, but not which images."""


class Evaluation(Command):
    """Evaluate a checkpoint's model on data that it was not trained on."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        early = early_options(arguments)
        self.recorded: Recipe | None = None
        if not early.help_all:
            if early.ckpt_path is None:
                example = f"`upright {command} --ckpt_path checkpoints/NAME/best.ckpt`"
                raise UserError(f"{command} needs --ckpt_path, for example {example}.")
            self.path = find_checkpoint(early.ckpt_path)
            self.content = read_checkpoint(self.path)
            self.recorded = self.content[KEY]["data"]
        super().__init__(command, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the checkpoint's data the defaults of ``--data``."""
        super().add_arguments_to_parser(parser)
        if self.recorded is not None:
            parser.set_defaults(data=self.recorded)

    def instantiate_classes(self) -> None:
        """Restore model and data. The options' data are built only if they differ from the checkpoint's."""
        self.config_init = self.instantiate()
        options = self.as_data().get("data")
        self.config = self.parser.parse_args([])
        unchanged = self.as_data().get("data")
        evaluated_on = () if self.config_init.allow_seen_images else ("val" if self.command == "validate" else "test",)
        restored = restore(
            self.path,
            None if options == unchanged else self.config_init.data,
            same_split=_images(options) == _images(unchanged),
            evaluated_on=evaluated_on,
            content=self.content,
        )
        self.model, self.datamodule, self.epoch = restored.classifier, restored.data, restored.epoch
        if self.datamodule is None:
            raise UserError(f"'{self.path}' does not record its data; give them with --data.")
        self.trainer = self.instantiate_trainer()

    def evaluate(self) -> None:
        trainer: Any = self.trainer
        if self.command == "predict" and trainer.world_size > 1:
            raise UserError(f"predict runs in one process, got {trainer.world_size}: --trainer.devices 1.")
        if self.command != "validate" and isinstance(self.datamodule, ImageDataModule) and trainer.is_global_zero:
            open_test_split(self.path, self.path.parent, self.datamodule, f"upright {self.command}")
        results = getattr(trainer, self.command)(self.model, self.datamodule)
        if self.command == "test" and trainer.is_global_zero:
            self._write_test(results[0])
        if self.command == "predict":
            self._write_predictions(results or [])

    def _write_test(self, metrics: dict[str, float]) -> None:
        folder, model, data = self.path.parent, self.model, self.datamodule
        record = {"checkpoint": str(self.path), "data": getattr(data, "recipe", None), "metrics": metrics}
        write_text(folder / "test.json", json.dumps(record, indent=2) + "\n")
        print(f"Written: {folder / 'test.json'}")
        title, plots = f"Test, epoch {self.epoch}", {}
        if model.confusion is not None:
            print(f"Tables:  {', '.join(map(str, write_tables(folder, model.confusion, model.spec.classes)))}")
        if model.spec.task == "classification" and model.confusion is not None:
            plots["confusion"] = draw_confusion(title, model.confusion, model.spec.classes)
        if isinstance(data, ImageDataModule):
            if not model.spec.classes:
                plots["orientation"] = draw_orientation(title, model, data)
            elif model.transformers:
                plots["transformer"] = draw_transformer(title, model, data)
        for name, plot in plots.items():
            save_png(plot, folder / f"test_{name}.png")
            print(f"Plot:    {folder / f'test_{name}.png'}")

    def _write_predictions(self, batches: list[Any]) -> None:
        data, classes, task = self.datamodule, self.model.spec.classes, task_of(self.model.spec)
        if classes:
            labels, probabilities = (torch.cat(parts) for parts in zip(*batches, strict=True))
            header = ["label", "prediction", *classes]
            rows = [
                [task.label(label), task.text(row), *(f"{p:.6f}" for p in row.tolist())]
                for label, row in zip(labels.tolist(), probabilities.numpy(), strict=True)
            ]
        else:
            header = ["angle", "confidence"]
            rows = [[f"{angle:.2f}", f"{confidence:.6f}"] for angle, confidence in torch.cat(batches).tolist()]
        names = list(data.names("test")) if isinstance(data, ImageDataModule) else map(str, range(len(rows)))
        path = Path(self.config_init.output or self.path.parent / "predictions.csv")
        write_rows(path, [["name", *header], *([name, *row] for name, row in zip(names, rows, strict=True))])
        print(f"Written: {path} ({len(rows)} images)")


def _images(data: Recipe | None) -> Recipe | None:
    """Return a config of data without the options that only change how images are read."""
    if data is None:
        return None
    arguments = {key: value for key, value in data.get("init_args", {}).items() if key not in READING_OPTIONS}
    return {**data, "init_args": arguments}
