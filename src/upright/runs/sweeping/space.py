"""What a sweep searches: a YAML file of options of ``upright fit``, each with what it may be.

config: ../lenet.yaml                    # one or several, relative to this file
metric: val/loss                         # or {name: val/accuracy, direction: maximize}
trials: 20
space:
  model.optimizer.init_args.lr: {low: 0.0003, high: 0.03, log: true}
  data.batch_size: [32, 64, 128]         # a list is a choice, of anything
  trainer.max_epochs: 10                 # anything else is fixed
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optuna import Trial

from upright.data.configs import read_yaml
from upright.errors import UserError, nearest

KEYS = ("config", "metric", "trials", "seed", "space")
RESERVED = ("name", "force", "ckpt_path", "config", "trainer.default_root_dir")
"""Options of ``upright fit`` by which a sweep keeps its trials apart."""


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; whole ones if all that is given is whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 0))

    def suggest(self, trial: Trial, option: str) -> float:
        """What Optuna proposes."""
        if self.whole:
            return trial.suggest_int(option, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(option, self.low, self.high, log=self.log, step=self.step)


class Space(NamedTuple):
    """A sweep as its file describes it.

    Attributes:
        configs: the experiment, in the order in which ``upright fit`` reads them.
        metric: of the validation split.
        direction: what is better.
        trials: how many, if the file says.
        seed: of the search, not of the trials.
        options: option of ``upright fit`` -> a range, or the list of its choices.
    """

    configs: tuple[Path, ...]
    metric: str
    direction: Literal["minimize", "maximize"]
    trials: int | None
    seed: int
    options: dict[str, Range | list[Any]]

    @property
    def searched(self) -> list[str]:
        """The options that have more than one value."""
        return [option for option, allowed in self.options.items() if isinstance(allowed, Range) or len(allowed) > 1]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """What Optuna proposes for each option; what has one value only is not its business."""
        return {option: self._suggest(trial, option) for option in self.options}

    def _suggest(self, trial: Trial, option: str) -> Any:
        allowed = self.options[option]
        if isinstance(allowed, Range):
            return allowed.suggest(trial, option)
        if len(allowed) == 1:
            return allowed[0]
        # Optuna keeps numbers and strings only.
        labels = [value if isinstance(value, str | int | float) else json.dumps(value) for value in allowed]
        chosen: Any = trial.suggest_categorical(option, labels)
        return allowed[labels.index(chosen)]

    def identity(self) -> dict[str, Any]:
        """What must not change while a sweep goes on, as plain data: key -> value."""
        ranges = {
            f"space.{option}": allowed._asdict() if isinstance(allowed, Range) else allowed
            for option, allowed in self.options.items()
        }
        configs = {f"config {path.name}": read_yaml(path) for path in self.configs}
        return {"metric": self.metric, "direction": self.direction, "seed": self.seed} | ranges | configs


def read_space(path: str | Path) -> Space:
    """Read a sweep's file.

    Raises:
        UserError: for anything in it that is not understood, or a config that is not there.
    """
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise UserError(f"'{path}' must hold {', '.join(KEYS)}, like configs/sweeps/lenet_sweep.yaml.")
    for key in found:
        if key not in KEYS:
            raise UserError(f"'{path}': unknown key '{key}'.{nearest(str(key), KEYS)} Allowed: {', '.join(KEYS)}.")
    for key in ("config", "metric", "space"):
        if not found.get(key):
            raise UserError(f"'{path}' needs '{key}', like configs/sweeps/lenet_sweep.yaml.")
    configs = tuple(Path(path).parent / str(config) for config in _as_list(found["config"]))
    for config in configs:
        if not config.is_file():
            raise UserError(f"'{path}': there is no config '{config}' (it is looked for beside this file).")
    if not isinstance(found["space"], dict):
        raise UserError(f"'{path}': 'space' must be options of `upright fit`, each with what it may be.")
    options = {str(option): _allowed(str(option), value) for option, value in found["space"].items()}
    refuse_reserved(options)
    metric, direction = _metric(found["metric"])
    trials, seed = found.get("trials"), found.get("seed", 0)
    for key, number, least in (("trials", trials, 1), ("seed", seed, 0)):
        if number is not None and not (_is_integer(number) and number >= least):
            raise UserError(f"'{path}': {key} must be a whole number of at least {least}, got {number!r}.")
    return Space(configs, metric, direction, trials, seed, options)


def refuse_reserved(options: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse options that would lead trials into each other's folders.

    Raises:
        UserError: naming the option.
    """
    for option in options:
        if option in RESERVED:
            raise UserError(f"'{option}' is the sweep's own: each trial has its folder, checkpoints/NAME/trial-003.")


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Options as ``upright fit`` takes them: ``--model.optimizer.init_args.lr=0.003``."""
    return [f"--{option}={v if isinstance(v, str) else json.dumps(v)}" for option, v in values.items()]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `Space.identity`, a line each."""
    left, right = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key} was {left.get(key, 'not there')} and is {right.get(key, 'not there')}"
        for key in dict.fromkeys([*left, *right])
        if key not in left or key not in right or left[key] != right[key]
    ]


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _metric(given: Any) -> tuple[str, Literal["minimize", "maximize"]]:
    if isinstance(given, str):
        given = {"name": given} | ({"direction": "minimize"} if given.endswith(("loss", "error")) else {})
    if not isinstance(given, dict) or not set(given) <= {"name", "direction"} or not isinstance(given.get("name"), str):
        raise UserError(f"metric must be a name or {{name: val/accuracy, direction: maximize}}, got {given!r}.")
    name, direction = given["name"], given.get("direction")
    if not name.startswith("val/"):
        raise UserError(f"metric '{name}' is not of the validation split (val/...), and a sweep judges by no other.")
    if direction not in ("minimize", "maximize"):
        what = "does not say what is better" if direction is None else f"has direction '{direction}'"
        raise UserError(f"metric '{name}' {what}: {{name: {name}, direction: maximize}}, or minimize.")
    return name, direction


def _allowed(option: str, given: Any) -> Range | list[Any]:
    if isinstance(given, dict):
        return _range(option, given)
    if not isinstance(given, list):
        return [given]
    if not given:
        raise UserError(f"{option}: a choice of nothing; give at least one value.")
    twice = [value for position, value in enumerate(given) if value in given[:position]]
    if twice:
        raise UserError(f"{option}: {twice[0]!r} is there twice.")
    return given


def _range(option: str, given: Mapping[str, Any]) -> Range:
    for key in given:
        if key not in Range._fields:
            raise UserError(
                f"{option}: unknown key '{key}' of a range.{nearest(str(key), Range._fields)} Allowed: "
                f"{', '.join(Range._fields)} (a mapping that is a value is a choice of one: [{{...}}])."
            )
    low, high, step = (_number(given.get(key)) for key in ("low", "high", "step"))
    log = given.get("log", False)
    if low is None or high is None or not low < high or (step is None) != ("step" not in given):
        raise UserError(f"{option}: a range is {{low: 0.1, high: 1}}, low below high, got {dict(given)}.")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise UserError(f"{option}: log is true or false, and with it low is above 0 and no step, got {dict(given)}.")
    if step is not None and not (step > 0 and math.isclose((high - low) / step, round((high - low) / step))):
        raise UserError(f"{option}: steps of {step} do not lead from {low} to {high}.")
    found = Range(low, high, log, step)
    if found.whole and (low, high) == (0, 1):
        raise UserError(f"{option}: whole numbers from 0 to 1 are these two: [0, 1], or low: 0.0 for all between.")
    return found


def _number(given: Any) -> float | int | None:
    if isinstance(given, str):
        # YAML 1.1 reads 1e-4, without a point, as a string.
        try:
            return float(given)
        except ValueError:
            return None
    return given if isinstance(given, int | float) and not isinstance(given, bool) else None


def _is_integer(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
