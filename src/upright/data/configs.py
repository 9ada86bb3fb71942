"""Datamodules from a YAML or from a recipe."""

from pathlib import Path
from typing import Any

import yaml

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.examples import find_config
from upright.recipes import Recipe, build


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. Give a YAML file.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())}") from None


def read_data(path: str | Path, **options: object) -> ImageDataModule:
    """Build the datamodule of a YAML like those in ``configs/data``, or of an experiment's YAML.

    Args:
        path: path of the YAML.
        **options: options of the datamodule that replace those of the YAML.

    Raises:
        UserError: if the YAML does not describe a datamodule.
    """
    content = read_yaml(path)
    if isinstance(content, dict) and "model" in content:
        path, content = find_config(path), content.get("data")
        if content is None:
            raise UserError(f"'{path}' does not name its data; give the YAML of a dataset.")
        if isinstance(content, str):
            return read_data(Path(path).parent / content, **options)
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise UserError(f"'{path}' needs a class_path and init_args, like configs/data/digits.yaml.")
    return build_data(content, path, **options)


def build_data(data: Recipe, path: str | Path, **options: object) -> ImageDataModule:
    """Build the datamodule of a recipe.

    Args:
        data: the recipe.
        path: file of the recipe, for messages.
        **options: options that replace those of the recipe.

    Raises:
        UserError: if the class does not take these options, or is not a datamodule.
    """
    try:
        datamodule = build(data)(**options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # an option of the wrong type
        raise UserError(f"'{path}': {error}.") from None
    if not isinstance(datamodule, ImageDataModule):
        raise UserError(f"'{path}' describes a {type(datamodule).__name__}, which is not an ImageDataModule.")
    return datamodule
