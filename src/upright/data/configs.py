"""Datamodules from a YAML or from a recipe."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError, one_line
from upright.examples import find_config
from upright.files import replacing_file
from upright.recipes import Recipe, build, load_class


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file. Raise a `UserError` if it cannot be read."""
    try:
        return yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. Give a YAML file.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {one_line(error)}") from None


def read_data(path: str | Path, model: Any = None, **options: object) -> ImageDataModule:
    """Build the datamodule of a YAML like those in ``configs/data``, or of an experiment's YAML.

    Args:
        path: path of the YAML.
        model: config of the model, for `adopt_format`; by default that of an experiment's YAML.
        **options: options of the datamodule that replace those of the YAML.

    Raises:
        UserError: if the YAML does not describe a datamodule.
    """
    content = read_yaml(path)
    if isinstance(content, dict) and "model" in content:
        model, content = content["model"] if model is None else model, content.get("data")
        path = find_config(path)
        if content is None:
            raise UserError(f"'{path}' does not name its data; give the YAML of a dataset.")
        if isinstance(content, str):
            path = Path(path).parent / content
            content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise UserError(f"'{path}' needs a class_path and init_args, like configs/data/digits.yaml.")
    adopt_format(model, content)
    return build_data(content, path, **options)


def adopt_format(model: Any, data: Any) -> None:
    """Set missing data options, in place, to the image format of the network's published weights.

    The network states them in a classmethod ``image_format``; `ResizedImages.adopted` lists the options. The configs of
    model and data are dictionaries, or jsonargparse's Namespaces. Raise a `UserError` if the network has no format.
    """
    image_format, entries = _image_format(model), _entries(data)
    if image_format is None or not isinstance(entries.get("class_path"), str):
        return
    if entries.get("init_args") is None:
        entries["init_args"] = type(data)()
    arguments = _entries(entries["init_args"])
    missing = [
        each for each in getattr(load_class(entries["class_path"]), "adopted", ()) if arguments.get(each) is None
    ]
    if missing:
        try:
            values = image_format()
        except ValueError as error:
            raise UserError(str(error)) from None
        if arguments.get("channels") == 1:
            values |= {name: (sum(values[name]) / len(values[name]),) for name in ("mean", "std")}
        arguments.update({name: values[name] for name in missing if name in values})


def _image_format(model: Any) -> Callable[[], dict[str, Any]] | None:
    """Return the ``image_format`` of the first network in a config that has one, with its arguments."""
    for network in _networks(model):
        class_path = network.get("class_path")
        image_format = isinstance(class_path, str) and getattr(load_class(class_path), "image_format", None)
        if image_format:
            return partial(image_format, **_entries(network.get("init_args")))
    return None


def _networks(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of each network in a config, at any depth."""
    for key, value in _entries(config).items():
        if key == "network":
            yield _entries(value)
        yield from _networks(value)


def _entries(config: Any) -> dict[str, Any]:
    """Return the entries of a dictionary or of jsonargparse's Namespace, to read or change; of others, an empty one."""
    if isinstance(config, dict):
        return config
    return vars(config) if type(config).__name__ == "Namespace" else {}


def build_data(data: Recipe, path: str | Path, **options: object) -> ImageDataModule:
    """Build the datamodule of a recipe from the file ``path``; ``options`` replace its own.

    Raise a `UserError` if the class does not take these options, or is not a datamodule.
    """
    try:
        datamodule = build(data)(**options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # an option of the wrong type
        raise UserError(f"'{path}': {error}.") from None
    if not isinstance(datamodule, ImageDataModule):
        raise UserError(f"'{path}' describes a {type(datamodule).__name__}, which is not an ImageDataModule.")
    return datamodule


def set_arguments(path: Path, **values: str) -> None:
    """Set arguments in the YAML of a dataset, or of an experiment that contains one. All other text stays.

    Raise a `UserError` if the YAML has no such place, or cannot be written.
    """
    text = path.read_text(encoding="utf-8")
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    data = _child(document, "data") or document
    if isinstance(data, yaml.ScalarNode):
        raise UserError(f"'{path}' names a file as its data: give '{data.value}'.")
    arguments = _child(data, "init_args")
    if not isinstance(arguments, yaml.MappingNode) or not arguments.value:
        raise UserError(f"'{path}' has no init_args to write {' and '.join(values)} to; write them yourself: {values}.")
    first = arguments.value[0][0].start_mark
    separator = ", " if arguments.flow_style else "\n" + " " * first.column
    edits = []
    for name, value in values.items():
        if old := _child(arguments, name):
            last = old.value[-1] if isinstance(old, yaml.SequenceNode) and old.value else old
            end = old.end_mark if old.flow_style or last is old else last.end_mark
            edits.append((old.start_mark.index, end.index, value))
        else:
            edits.append((first.index, first.index, f"{name}: {value}{separator}"))
    for start, end, value in sorted(edits, reverse=True):
        text = text[:start] + value + text[end:]
    try:
        with replacing_file(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from None


def _child(node: Any, key: str) -> Any:
    """Return the value of a key in a mapping of YAML, or None."""
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in entries if name.value == key), None)
