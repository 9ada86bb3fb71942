"""The search space of a sweep: a YAML with options of ``upright fit`` and the values that each may take.

config: ../lenet.yaml                    # one or several, relative to this file
metric: val/loss                         # or {name: val/accuracy, direction: maximize}
trials: 20
space:
  model.optimizer.init_args.lr: {low: 0.0003, high: 0.03, log: true}
  data.batch_size: [32, 64, 128]         # a list is a choice, of any values
  trainer.max_epochs: 10                 # any other value is fixed
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from upright.data.configs import read_yaml
from upright.errors import UserError, nearest

REQUIRED = ("config", "metric", "space")
KEYS = (*REQUIRED, "trials", "seed", "prune")
Direction = Literal["minimize", "maximize"]
RESERVED = ("name", "force", "ckpt_path", "config", "trainer.default_root_dir")


class Space(NamedTuple):
    """A sweep as its YAML describes it: ``fixed`` options and Optuna's distributions of ``searched`` ones."""

    configs: list[Path]
    metric: str
    direction: Direction
    trials: int | None
    seed: int  # seed of the search, not of the trials
    prune: bool
    fixed: dict[str, Any]
    searched: dict[str, BaseDistribution]


def read_space(path: str | Path) -> Space:
    """Read the YAML of a sweep."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("space") or {}, dict):
        raise UserError(f"'{path}' must hold {', '.join(KEYS)}; 'space' must be options of `upright fit`.")
    for key in content:
        if key not in KEYS:
            raise UserError(f"'{path}': unknown key '{key}'.{nearest(str(key), KEYS)} Allowed: {', '.join(KEYS)}.")
    for key in REQUIRED:
        if not content.get(key):
            raise UserError(f"'{path}' needs '{key}', like configs/sweeps/lenet_sweep.yaml.")
    names = content["config"] if isinstance(content["config"], list) else [content["config"]]
    configs = [Path(path).parent / str(name) for name in names]
    for config in configs:
        if not config.is_file():
            raise UserError(f"'{path}': config '{config}' does not exist. Its path is relative to this file.")
    for key, least in (("trials", 1), ("seed", 0)):
        number = content.get(key, least)
        if type(number) is not int or number < least:
            raise UserError(f"'{path}': {key} must be a whole number of at least {least}, got {number!r}.")
    options = {str(option): value for option, value in content["space"].items()}
    check_free(options)
    values = {option: value if isinstance(value, list | dict) else [value] for option, value in options.items()}
    fixed = {option: value[0] for option, value in values.items() if isinstance(value, list) and len(value) == 1}
    searched = {option: _distribution(option, value) for option, value in values.items() if option not in fixed}
    trials, seed, prune = content.get("trials"), content.get("seed", 0), bool(content.get("prune", True))
    return Space(configs, *_metric(content["metric"]), trials, seed, prune, fixed, searched)


def check_free(options: Iterable[str]) -> None:
    """Refuse options that the sweep itself sets."""
    for option in options:
        if option in RESERVED:
            raise UserError(
                f"'{option}' is set by the sweep: each trial has its own folder, checkpoints/NAME/trial-003."
            )


def as_text(value: Any) -> str:
    """Return a value as ``upright fit`` takes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as ``upright fit`` takes them: ``--model.optimizer.init_args.lr=0.003``."""
    return [f"--{option}={as_text(value)}" for option, value in options.items()]


def _metric(value: Any) -> tuple[str, Direction]:
    if isinstance(value, str):
        value = {"name": value, "direction": "minimize" if value.endswith(("loss", "error")) else None}
    if not isinstance(value, dict) or not str(value.get("name")).startswith("val/"):
        raise UserError(f"metric must be one of the validation split, like val/loss, got {value!r}.")
    if value.get("direction") not in ("minimize", "maximize"):
        raise UserError(
            f"metric '{value['name']}' needs a direction, minimize or maximize: "
            f"{{name: {value['name']}, direction: maximize}}."
        )
    return value["name"], value["direction"]


def _distribution(option: str, value: Any) -> BaseDistribution:
    if isinstance(value, list):
        # Optuna stores numbers and strings only.
        choices = [as_text(choice) for choice in value]
        if not choices or len(set(choices)) < len(choices):
            raise UserError(f"{option}: a choice needs at least one value, and different ones, got {value}.")
        return CategoricalDistribution(choices)
    try:
        # YAML 1.1 reads 1e-4, without a point, as a string.
        numbers: dict[str, Any] = {
            key: float(number) if isinstance(number, str) else number for key, number in value.items()
        }
        kind = IntDistribution if all(isinstance(number, int) for number in numbers.values()) else FloatDistribution
        if kind is IntDistribution and (numbers.get("low"), numbers.get("high")) == (0, 1):
            raise ValueError("for the integers write [0, 1], for real numbers low: 0.0")
        return kind(**numbers)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{option}: a range is {{low: 0.1, high: 1}}, with `log: true` or a `step`, got {value}: {error}."
        ) from None
