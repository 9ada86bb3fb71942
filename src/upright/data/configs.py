"""Data as a YAML or a recipe describes them."""

from pathlib import Path
from typing import Any

import yaml

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.recipes import Recipe, build


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. Give a YAML file.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())}") from None


def read_data(path: str | Path, **options: object) -> ImageDataModule:
    """The datamodule of a YAML like those in ``configs/data``, or of an experiment's.

    Args:
        path: of the YAML.
        **options: of the datamodule, in place of what stands there.

    Raises:
        UserError: if it describes none.
    """
    found = read_yaml(path)
    if isinstance(found, dict) and "model" in found:
        found = found.get("data")
        if found is None:
            raise UserError(f"'{path}' does not say what data it is for; give the YAML of some.")
        if isinstance(found, str):
            return read_data(Path(path).parent / found, **options)
    if not isinstance(found, dict) or not isinstance(found.get("class_path"), str):
        raise UserError(f"'{path}' needs a class_path and init_args, like configs/data/digits.yaml.")
    return build_data(found, path, **options)


def build_data(data: Recipe, path: str | Path, **options: object) -> ImageDataModule:
    """The datamodule of a recipe.

    Args:
        data: its recipe.
        path: where that was found, for messages.
        **options: in place of what stands there.

    Raises:
        UserError: if it does not take these options, or is no datamodule.
    """
    try:
        made = build(data)(**options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # of another type than it takes
        raise UserError(f"'{path}': {error}.") from None
    if not isinstance(made, ImageDataModule):
        raise UserError(f"'{path}' describes a {type(made).__name__}, which is no ImageDataModule.")
    return made
