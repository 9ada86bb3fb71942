"""``upright describe``: print the layers of a network."""

import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

from upright.anatomy import ELSEWHERE, MAX_REDUCTION, Description, describe
from upright.architectures.factory import wrap_foreign
from upright.checkpoint import KEY, output_count, read_checkpoint
from upright.data.configs import read_data, read_yaml
from upright.errors import UserError
from upright.examples import find_config
from upright.files import check_exists
from upright.images import ImageSpec
from upright.recipes import build
from upright.tables import markdown
from upright.training.orientation import TURNS

TABLE_WIDTH = 120
"""Width of the table in characters."""


def run(source: str, format: str = "table", data: str | None = None) -> int:
    """Print the layers of the network of a config or a checkpoint.

    Args:
        source: a YAML like those in ``configs/``, a checkpoint, or the folder of a run.
        format: ``table``, ``json`` or ``markdown``.
        data: a YAML of data that replaces the data of ``source``. The data set the input shape and the number of
            classes.
    """
    recipe, spec, outputs = network_and_spec(find_config(source), data)
    network = build(recipe)
    try:
        try:
            with torch.device("meta"):
                description = describe(network(spec.input_shape, outputs), spec.input_shape)
        except Exception:  # a network that depends on its values cannot run on meta tensors
            description = describe(network(spec.input_shape, outputs), spec.input_shape)
    except ValueError as error:
        raise UserError(str(error)) from error
    except TypeError as error:
        raise UserError(f"'{source}': {error}.") from error
    except (RuntimeError, LookupError) as error:
        raise UserError(
            f"The network of '{source}' cannot be built for images of {spec.input_shape}: {error}"
        ) from error
    print(FORMATS[format](description))
    return 0


def network_and_spec(path: Path, data: str | None = None) -> tuple[Any, ImageSpec, int]:
    """Return the recipe of the network, the spec of its images, and the number of its outputs."""
    check_exists(path, "a YAML like configs/lenet.yaml, a checkpoint, or the folder of a run")
    if path.suffix not in (".yaml", ".yml"):
        ours = read_checkpoint(path)[KEY]
        spec = read_data(data).spec if data else ImageSpec.from_dict(ours["spec"])
        return ours["model"]["init_args"]["network"], spec, len(spec.classes) or output_count(ours)
    config = read_yaml(path)
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict):
        wrap_foreign(model)
    # Another class than ImageClassifier is a class_path and init_args.
    arguments = model.get("init_args", model) if isinstance(model, dict) else {}
    recipe = arguments.get("network")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("class_path"), str):
        raise UserError(f"'{path}' needs a model.network with class_path and init_args, like configs/lenet.yaml.")
    if not data and config.get("data") is None:
        raise UserError(f"'{path}' does not name its data; give a YAML of data with --data.")
    spec = read_data(data or path, model).spec
    return recipe, spec, len(spec.classes) or arguments.get("turns", TURNS)


TEXT = ("layer", "type")
NUMBERS = ("f", "s", "p", "output", "field", "jump", "parameters", "multiply-adds", "activations", "dense %")
LEGEND = (
    "output: floor((n - f + 2p) / s) + 1 by kernel f (with its dilation), stride s, padding p; (ceil) rounds up",
    "field: receptive field of one output position, in pixels of the image; all: the complete image",
    "jump: distance between neighbouring output positions, in pixels of the image",
    "parameters: shared parameters, and parameters of a layer that runs twice, are counted once",
    "multiply-adds: convolutions and matrix products, without biases, for one image",
    "activations: number of output values for one image",
    "dense %: multiply-adds in percent of a dense layer between the same input and output",
    f"warning: a layer keeps more than one position, but fewer than 1 in {MAX_REDUCTION} positions (height x width)",
)


def _cells(description: Description) -> list[list[str]]:
    image, totals = description.input[1:], description.totals
    rows = [[*TEXT, *NUMBERS]]
    for layer in description.layers:
        shape = " x ".join(map(str, layer.output))
        field = "all" if layer.receptive_field == image else _short(layer.receptive_field or ())
        jump = _short(layer.jump or ()) if any(layer.jump or ()) else ""
        numbers = (layer.parameters, layer.multiply_adds, layer.activations)
        share = "" if layer.connections is None else f"{100 * layer.connections:.3g}"
        window = [_short(values) for values in astuple(layer.window)] if layer.window else [""] * 3
        rows.append([layer.name, layer.kind, *window, shape, field, jump, *map(_count, numbers), share])
    numbers = (totals.parameters, totals.multiply_adds, totals.activations)
    return [*rows, ["total", *[""] * 7, *map(_count, numbers), ""]]


def _short(values: tuple[float, ...]) -> str:
    """Return ``3`` for 3 x 3, and ``3x1`` for 3 x 1."""
    return "x".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _notes(description: Description) -> list[str]:
    totals = description.totals
    summary = (
        f"input {' x '.join(map(str, description.input))}; {totals.trainable:,} of {totals.parameters:,} parameters "
        f"are trained; {totals.megabytes:,.2f} MB as float32"
    )
    return [*(f"warning: {text}" for text in description.warnings), summary]


def _table(description: Description) -> str:
    rows = _cells(description)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Long names are shortened at their beginning, because their end distinguishes them better.
    widths[0] = max(len(ELSEWHERE), min(widths[0], TABLE_WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for name, *others in rows:
        cells = [name if len(name) <= widths[0] else "…" + name[1 - widths[0] :], *others]
        sides = "<" * len(TEXT) + ">" * len(NUMBERS)
        lines.append("  ".join(f"{c:{side}{width}}" for c, side, width in zip(cells, sides, widths, strict=True)))
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(-1, lines[1])
    return "\n".join(line.rstrip() for line in [*lines, "", *_notes(description), "", *LEGEND])


def _markdown(description: Description) -> str:
    notes = (f"- {note}" for note in [*_notes(description), *LEGEND])
    return "\n".join([markdown(_cells(description), numbers=len(NUMBERS)), *notes])


def _json(description: Description) -> str:
    return json.dumps(asdict(description), indent=2)


FORMATS = {"table": _table, "json": _json, "markdown": _markdown}
