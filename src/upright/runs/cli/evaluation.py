"""``validate test predict``: what a checkpoint answers."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from upright.checkpoint import KEY, find_checkpoint, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import write_text
from upright.runs.cli.command import Command
from upright.runs.drawing import draw_confusion, save_picture
from upright.runs.pictures import draw_transformer
from upright.runs.seal import open_test_split
from upright.training.classifier import ImageClassifier
from upright.training.metrics import write_tables
from upright.training.restoring import check_data, load_weights


class Evaluation(Command):
    """The model of a checkpoint, on images that it was not trained on."""

    checkpoint: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Of predictions, where they go."""
        super().add_arguments_to_parser(parser)
        if self.verb == "predict":
            parser.add_argument(
                "--output", type=str | None, help="CSV to write; predictions.csv beside the checkpoint."
            )

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint; what is written goes beside it."""
        super().before_instantiate_classes()
        self.checkpoint = find_checkpoint(self.option("ckpt_path"))
        self.folder = self.checkpoint.parent

    def _evaluate(self, model: ImageClassifier, datamodule: ImageDataModule) -> None:
        checkpoint = read_checkpoint(self.checkpoint)
        load_weights(model, checkpoint, self.checkpoint)
        self.epoch = checkpoint["epoch"] + 1
        # The first --config is the checkpoint's own; anything about data beyond it is the user's.
        # How they are read, and in what batches, makes no other data of them.
        how = r"(?!\.(init_args\.)?(cache|num_workers|batch_size)\b)"
        given = [a for a in self.arguments[2:] if re.match(rf"--(data\b{how}|config\b)|-c\b", a)]
        judged_by = () if self.option("allow_seen_images") else ("val" if self.verb == "validate" else "test",)
        check_data(checkpoint[KEY], datamodule, self.checkpoint, same_split=not given, judged_by=judged_by)

    def _open_test_split(self, datamodule: ImageDataModule) -> None:
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
            raise UserError(f"predict runs in one process, got {self.trainer.world_size}: --trainer.devices 1.")
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
        path = Path(self.option("output") or self.folder / "predictions.csv")
        write_text(path, text.getvalue())
        print(f"Written: {path} ({len(index)} images)")
