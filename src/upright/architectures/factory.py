"""Networks of other packages: any importable class or function that returns a module."""

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from upright.errors import UserError, one_line

CLASSES = ("num_classes", "n_classes", "classes")
CHANNELS = ("in_chans", "in_channels", "input_channels", "num_channels", "channels")
SIZES = ("img_size", "image_size", "input_size")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
PRETRAINED = ("pretrained", "weights")
"""Options of other packages that load weights."""


class Factory(nn.Module):
    """A network of another package, such as ``torchvision.models.resnet18``.

    The parameters of the class or function are matched by name: ``num_classes``, ``in_chans`` or ``in_channels``,
    ``img_size`` or ``image_size``, and ``input_shape``. A config that names such a class or function as the network's
    ``class_path`` gets this class around it.

    Args:
        path: import path of a class or a function.
        options: its other arguments, by name.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        path: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.path, self.num_classes = path, num_classes
        function, options = resolve(path), dict(options or {})
        if loading := [name for name in PRETRAINED if options.get(name)]:
            raise ValueError(
                f"{path}: `{loading[0]}` would load weights each time a checkpoint is restored. Leave it out, and give "
                "the file of the weights with --start_from."
            )
        arguments = _arguments(path, function, input_shape, num_classes, options)
        try:
            network = function(**arguments)
        except (TypeError, AttributeError, LookupError, AssertionError) as error:
            raise ValueError(
                f"{path} cannot be built with {', '.join(arguments)}: {one_line(error, 200)}. Give further arguments "
                "in `options` of upright.architectures.factory.Factory."
            ) from None
        if not isinstance(network, nn.Module):
            raise ValueError(f"{path} returns a {type(network).__name__}; a network is a torch.nn.Module.")
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        if not isinstance(logits, Tensor) or logits.shape[1:] != (self.num_classes,):
            result = f"a {type(logits).__name__}"
            if isinstance(logits, Tensor):
                result = f"a tensor (B, {', '.join(map(str, logits.shape[1:]))})"
            raise UserError(f"{self.path} returns {result} in forward, not logits (B, {self.num_classes}).")
        return logits


def resolve(path: str) -> Callable[..., Any]:
    """Import a class or a function. Raise a `ValueError` if there is none with this path."""
    try:
        part = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be imported ({one_line(error, 200)}): give package.module.Name.") from None
    if not callable(part):
        raise ValueError(f"'{path}' is a {type(part).__name__}, not a class or a function.")
    function: Callable[..., Any] = part
    return function


def wrap_foreign(config: Any) -> None:
    """Put a `Factory` around each network of a config, in place, that ``(input_shape, num_classes)`` cannot build.

    Args:
        config: a config of a model with ``network`` in it at any depth: a dictionary, or jsonargparse's Namespace.
    """
    entries: dict[str, Any] = config if isinstance(config, dict) else vars(config)
    make = type(config)
    for key, value in entries.items():
        if key == "network":
            part, arguments = _parse(value)
            if part is not None and _is_foreign(part):
                parameters = inspect.signature(part).parameters
                # jsonargparse fills in the defaults, also those of a class that gets the keyword arguments.
                options = {k: v for k, v in arguments.items() if k not in parameters or v != parameters[k].default}
                own = make(path=f"{part.__module__}.{part.__qualname__}", options=options)
                entries[key] = make(class_path=f"{Factory.__module__}.{Factory.__qualname__}", init_args=own)
                continue
        if isinstance(value, make):
            wrap_foreign(value)


def _parse(network: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class or function of a config of a network, and its arguments; None if it cannot be imported."""
    if inspect.isfunction(network):
        return network, {}
    if isinstance(network, str):
        network = {"class_path": network}
    entries = network if isinstance(network, dict) else vars(network)
    try:
        part = resolve(entries["class_path"])
    except (ValueError, KeyError, TypeError):
        return None, {}
    arguments = entries.get("init_args") or {}
    return part, arguments if isinstance(arguments, dict) else arguments.as_dict()


def _is_foreign(part: Any) -> bool:
    if not isinstance(part, type):
        return True
    parameters = [each for each in inspect.signature(part).parameters.values() if each.kind in POSITIONAL]
    if len(parameters) > 1 and parameters[1].name in CLASSES and parameters[0].default is inspect.Parameter.empty:
        return parameters[0].name in (*CHANNELS, *SIZES)
    return any(name in CLASSES for name in inspect.signature(part).parameters)


def _arguments(
    path: str, function: Any, input_shape: tuple[int, int, int], num_classes: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of ``function`` by name; those that come from the data replace ``options``."""
    parameters = inspect.signature(function).parameters
    channels, *size = input_shape
    values = {CLASSES: num_classes, CHANNELS: channels, SIZES: size[0] if size[0] == size[1] else tuple(size)}
    arguments: dict[str, Any] = {"input_shape": input_shape} if "input_shape" in {*parameters, *options} else {}
    for names, value in values.items():
        if name := next((name for name in names if name in {*parameters, *options}), None):
            arguments[name] = value
        elif names is CLASSES:
            if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
                raise ValueError(
                    f"{path} has no parameter for the number of classes; it needs one named {' or '.join(CLASSES)}."
                )
            arguments[CLASSES[0]] = value  # torchvision's functions pass their keyword arguments on to the class
        elif names is CHANNELS and channels != 3 and "input_shape" not in arguments:
            raise ValueError(
                f"{path} has no parameter for the {channels} channel(s) of these images ({', '.join(CHANNELS)}): use "
                "RGB images (--data.channels 3), or name it in `options`."
            )
    return {**options, **arguments}
