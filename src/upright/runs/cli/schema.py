"""``upright schema``: JSON schemas of the configs, so that an editor completes, explains and checks them."""

import importlib
import inspect
import json
import os
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import capture_parser
from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema
from jsonargparse._typehints import get_callable_return_type
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn
from torch.optim import Optimizer

from upright.errors import UserError
from upright.files import write_text
from upright.runs.cli.run import command_of

OURS = (
    "upright.architectures",
    "upright.data",
    "upright.training.losses",
    "upright.training.schedules",
    "upright.training.finetuning",
)
OTHERS = ("torch.optim", "kornia.augmentation", "lightning.pytorch.callbacks")
"""Packages that say themselves what they offer."""


def schema(modules: Sequence[str] = (), to: str = "schemas") -> int:
    """Write ``experiment.json``, for ``configs/*.yaml``, and ``data.json``, for ``configs/data/*.yaml``.

    Args:
        modules: of the user's, whose classes are offered too.
        to: the folder.

    Raises:
        UserError: if a module cannot be imported.
    """
    experiment = ConfigSchema(modules).generate(parser_of("fit"))
    data = {key: experiment[key] for key in ("$schema", "$defs")} | {"$ref": "#/$defs/ImageDataModule"}
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("experiment", experiment), ("data", data)):
        write_text(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    settings = {f"{to}/experiment.json": "configs/*.yaml", f"{to}/data.json": "configs/data/*.yaml"}
    print(
        f"Written: {folder / 'experiment.json'}, {folder / 'data.json'}\n"
        f"VS Code, with its YAML extension: in .vscode/settings.json {json.dumps({'yaml.schemas': settings})}\n"
        f"Any other editor with yaml-language-server: as the first line of a config in configs/\n"
        f"# yaml-language-server: $schema={os.path.relpath(folder / 'experiment.json', 'configs')}"
    )
    return 0


def parser_of(verb: str) -> Any:
    """The parser of ``fit``, ``validate``, ``test`` or ``predict``."""
    with warnings.catch_warnings():
        # Lightning 2.6 calls functions that jsonargparse 5 will not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        whole = capture_parser(lambda: command_of(verb)(verb, [], ExitStack()))
    verbs: Any = whole._subcommands_action
    return verbs._name_parser_map[verb]


class ConfigSchema(ParserJsonschema):
    """jsonargparse's, which alone would list every module of torch wherever one may stand.

    Of the classes that are known, those are offered that can be completed with what the place gives; any other, which
    is the user's own, may have any ``init_args``.

    Args:
        modules: whose classes are known beside Upright's, torch's optimisers, kornia's augmentations and Lightning's
            callbacks and loggers.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = dict(_classes(modules))

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        """Of a place for an instance."""
        return self._one_of([path for path, known in self.known.items() if issubclass(known, class_type)], action)

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        """Of a place for a class that is completed with the types in ``typehint``."""
        made: Any = get_callable_return_type(typehint)  # type: ignore[no-untyped-call]
        if not inspect.isclass(made) or made.__module__ == "builtins":
            return {"type": "string"}
        given = typehint.__args__[:-1]
        name = f"{made.__name__}_of_{'_'.join(getattr(kind, '__name__', 'any') for kind in given) or 'nothing'}"
        if name not in self.defs:
            self.defs[name] = {}  # a transformer's network is a network again
            completed = copy(action)
            completed.sub_add_kwargs = {**action.sub_add_kwargs, "skip": {len(given)}}
            fitting = [path for path, known in self.known.items() if issubclass(known, made) and _fits(known, given)]
            self.defs[name].update(self._one_of(fitting, completed))
        return {"$ref": f"#/$defs/{name}"}

    def _one_of(self, paths: list[str], action: Any) -> dict[str, Any]:
        other = self.unknown_class_path_schema()
        other["properties"]["class_path"]["not"] = {"enum": paths}
        named = {"type": "string", "examples": paths}
        described: dict[str, Any] = anyof_schema(
            [named, *(self.class_path_schema(path, action) for path in paths), other]
        )
        return described


def _classes(modules: Sequence[str]) -> Iterator[tuple[str, type]]:
    for package in (*OURS, *modules):
        for module in _modules(package):
            for name, found in vars(module).items():
                if _offered(name, found) and found.__module__ == module.__name__:
                    yield f"{module.__name__}.{name}", found
    for package in OTHERS:
        for name, found in vars(importlib.import_module(package)).items():
            if _offered(name, found):
                yield f"{package}.{name}", found


def _offered(name: str, found: Any) -> bool:
    abstract = inspect.isabstract(found) or found in (Callback, Checkpoint, Optimizer)
    return inspect.isclass(found) and not name.startswith("_") and not abstract


def _modules(package: str) -> Iterator[ModuleType]:
    try:
        root = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"no module named '{error.name}'. Is the file in the working directory, or the package installed?"
        ) from None
    yield root
    for info in pkgutil.iter_modules(getattr(root, "__path__", []), f"{package}."):
        try:
            yield importlib.import_module(info.name)
        except ModuleNotFoundError:
            continue  # of an extra that is not installed


def _fits(found: type, given: Sequence[Any]) -> bool:
    """Whether a class takes first what a place gives: by annotation where the class is a module of ours or a user's."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [parameter for parameter in inspect.signature(found).parameters.values() if parameter.kind in positional]
    if found.__module__.startswith("kornia."):
        return not given
    if issubclass(found, nn.Module) and not any(isinstance(one.annotation, str) for one in first):
        return [one.annotation for one in first] == [*given]
    return len(first) >= len(given)
