"""What is typed after ``fit validate test predict``, before Lightning's parser sees it."""

import re
from pathlib import Path

import yaml

from upright.checkpoint import KEY, read_checkpoint
from upright.errors import UserError
from upright.runs.folder import ROOT
from upright.training.classifier import ImageClassifier


def value_of(arguments: list[str], *flags: str) -> str | None:
    """The last value of ``--flag value`` or ``--flag=value``, before anything heavy parses them."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument in flags:
            found = following
        elif argument.startswith(tuple(f"{flag}=" for flag in flags)):
            found = argument.partition("=")[2]
    return found


def with_own_config(verb: str, arguments: list[str], scratch: Path) -> list[str]:
    """Put first what a checkpoint or a run's folder says of itself, so that the user's own arguments win."""
    if {"-h", "--help"} & set(arguments):
        return arguments
    path = value_of(arguments, "--ckpt_path")
    if verb == "fit":
        if path and Path(path).is_dir():
            # Of a run that goes on, the folder means its last checkpoint.
            path = str(Path(path) / "last.ckpt")
            arguments = [*arguments, "--ckpt_path", path]
        if value_of(arguments, "--config", "-c"):
            return arguments
        if path in (None, "auto"):
            raise UserError("fit needs an experiment, for example `upright fit --config configs/stn_lenet.yaml`.")
        if path in ("last", "best"):
            folder, where = _run_folder(arguments), []
        else:
            folder = Path(path).parent
            # It goes on where it is, whatever the working directory.
            where = ["--name", folder.resolve().name, "--trainer.default_root_dir", str(folder.resolve().parent)]
        if not (folder / "config.yaml").is_file():
            raise UserError(f"'{folder}' holds no config.yaml of a run to go on with; give --config.")
        return ["--config", str(folder / "config.yaml"), *where, *arguments]
    if path is None:
        raise UserError(
            f"{verb} needs --ckpt_path, for example `upright {verb} --ckpt_path checkpoints/NAME/best.ckpt`."
        )
    ours = read_checkpoint(path)[KEY]
    if ours["model"]["class_path"] != f"{ImageClassifier.__module__}.{ImageClassifier.__qualname__}":
        raise UserError(
            f"'{path}' is of a {ours['model']['class_path']}, and the command line knows ImageClassifier only: "
            "upright.training.restoring.restore gives it in Python."
        )
    own = {"model": ours["model"]["init_args"]} | ({"data": ours["data"]} if ours["data"] else {})
    (scratch / "checkpoint.yaml").write_text(yaml.safe_dump(own))
    return ["--config", str(scratch / "checkpoint.yaml"), *arguments]


def replacing_data(arguments: list[str]) -> list[str]:
    """Let ``--data FILE`` replace the data that stood before it.

    jsonargparse merges the file into them, and so options of one dataset would leak into another.
    """
    replaced = []
    for position, argument in enumerate(arguments):
        value = arguments[position + 1] if argument == "--data" and position + 1 < len(arguments) else argument
        if re.match(r"--data(=|$)", argument) and value.endswith((".yaml", ".yml", ".json")):
            replaced += ["--data", "null"]
        replaced.append(argument)
    return replaced


def _run_folder(arguments: list[str]) -> Path:
    name = value_of(arguments, "--name")
    if name is None:
        raise UserError("--ckpt_path last needs to know the run: give --config or --name.")
    return Path(value_of(arguments, "--trainer.default_root_dir") or ROOT) / name
