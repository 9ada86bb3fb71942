"""Convert a class with its arguments to plain data (``class_path``, ``init_args``), and back.

Networks, losses, optimizers, schedules and augmentations are passed as callables: a class, or ``functools.partial`` of
a class. `recipe` converts both to plain data, and also the callables that the command line builds from a YAML. A
checkpoint stores these data, so it loads with ``weights_only=True``. `build` rebuilds the callables.
"""

import importlib
import inspect
import sys
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

from upright.errors import UserError, nearest

Recipe = dict[str, Any]


def recipe(part: Any) -> Any:
    """Convert ``part`` to plain data. A class, or a partial of a class, becomes ``class_path`` and ``init_args``.

    A lambda, a function or another object is refused: it cannot be rebuilt from a checkpoint.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, Path):
        return str(part)
    if isinstance(part, list | tuple):
        # Some classes distinguish the two, for example kornia's.
        return (tuple if isinstance(part, tuple) else list)(recipe(item) for item in part)
    if isinstance(part, dict):
        return {str(key): recipe(value) for key, value in part.items()}
    if isinstance(part, type):
        module, name = part.__module__, part.__qualname__
        if module != "__main__" and vars(sys.modules[module]).get(name) is part:
            return {"class_path": f"{module}.{name}"}
    elif isinstance(part, partial):
        # Users write partial(cls, **arguments); jsonargparse injects partial(instantiator, cls, **arguments).
        *others, cls = part.func, *part.args
        if isinstance(cls, type) and not any(isinstance(other, type) for other in others):
            return recipe(cls) | {"init_args": recipe(part.keywords)}
    raise UserError(
        f"{shorten(repr(part), 80)} cannot be written into a checkpoint, so the model could not be rebuilt from it: "
        "give a class of an importable module (not of a script or a function), or functools.partial(Class, name=value)."
        " For a network of a function, give partial(upright.architectures.factory.Factory, path='module.function')."
    )


def load_class(class_path: str) -> type:
    """Import the class ``package.module.Class``."""
    module_name, _, name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"class_path '{class_path}': cannot import module '{module_name}' ({error}). "
            "Is the file in the working directory, or the package installed?"
        ) from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(
            f"class_path '{class_path}': module '{module_name}' has no class '{name}'.{nearest(name, classes)}"
        )
    return cls


def build(data: Any) -> Any:
    """Replace every recipe inside ``data`` by ``partial(Class, **arguments)``: the inverse of `recipe`."""
    if isinstance(data, list | tuple):
        return type(data)(build(item) for item in data)
    if isinstance(data, dict) and "class_path" in data:
        return partial(load_class(data["class_path"]), **build(data.get("init_args", {})))
    if isinstance(data, dict):
        return {key: build(value) for key, value in data.items()}
    return data


class Recorded:
    """Base of classes that record the arguments of their construction, by name, in ``self.arguments``."""

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # In __new__, so that `arguments` exists before the __init__ of any subclass.
        instance = super().__new__(cls)
        names = list(inspect.signature(cls).parameters)
        object.__setattr__(instance, "arguments", dict(zip(names, args, strict=False)) | kwargs)
        return instance
