"""``upright sweep``: a search over options of ``upright fit`` with Optuna, each trial a run in its own folder.

A trial is a process: whatever becomes of it, the sweep goes on. What is known of the trials is in Optuna's storage, so
that a sweep goes on where it was stopped, and several processes, or machines, work on one.
"""

import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
import yaml
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from upright.data.configs import read_yaml
from upright.errors import UprightError, UserError
from upright.files import check_name, write_text
from upright.runs.folder import ROOT, SWEEP, locked
from upright.runs.sweeping.search import Search, try_again
from upright.runs.sweeping.space import Space, differences, read_space, refuse_reserved
from upright.runs.sweeping.trial import COMMAND

HEARTBEAT = 30  # seconds; a trial of another machine is given up after four of them


def sweep(
    space: str,
    trials: int | None = None,
    name: str | None = None,
    storage: str | None = None,
    timeout: float | None = None,
    prune: bool = True,
    options: Sequence[str] = (),
    command: Sequence[str] = COMMAND,
) -> int:
    """Search, in ``checkpoints/NAME``; a sweep that is there goes on.

    Args:
        space: the YAML that `space.read_space` reads.
        trials: how many there shall be in the end, those of before included; as the file says by default.
        name: of the sweep; the file's by default.
        storage: an Optuna storage URL; ``sweep.db`` in the sweep's folder by default.
        timeout: minutes after which no trial is started.
        prune: whether a trial is stopped when it is worse than the median of those before at the same epoch.
        options: of ``upright fit``, for every trial.
        command: what a trial runs, before its options.

    Returns:
        The exit code: 0, or 130 when it was stopped.

    Raises:
        UserError: for a mistake in the file, one that the first trial makes, a sweep of another space under this
            name, or when no trial has a score.
    """
    plan = read_space(space)
    given = [option.lstrip("-").partition("=")[0] for option in options if option.startswith("-")]
    refuse_reserved(given)
    for option in given:
        if option in plan.searched:
            raise UserError(f"'{option}' is searched by '{space}' and cannot be fixed too; change it there.")
    # What is typed wins over what the file fixes.
    plan = plan._replace(options={key: value for key, value in plan.options.items() if key not in given})
    name = Path(space).stem if name is None else name
    check_name(name)
    total = plan.trials if trials is None else trials
    if total is None or total < 1:
        raise UserError(f"How many trials? --trials 20, or `trials: 20` in '{space}', got {total}.")
    identity = json.loads(json.dumps(plan.identity() | ({"options": [*options]} if options else {}), default=str))
    folder = ROOT / name
    new = not folder.exists()
    _claim(folder, identity)
    with _study(folder, storage, plan, prune) as (study, database):
        _check_same(study.user_attrs.get("space"), identity, name)
        study.set_user_attr("space", identity)
        search = Search(study, plan, folder, total, [*command], [*options])
        try:
            search.run(math.inf if timeout is None else time.monotonic() + 60 * timeout)
        except UprightError:
            if new and len(study.get_trials(deepcopy=False)) == 1:
                # Nothing has happened but a mistake.
                optuna.delete_study(study_name=name, storage=database)
                shutil.rmtree(folder)
            raise
        except KeyboardInterrupt:
            done = sum(trial.state.is_finished() for trial in search.planned())
            print(f"\nStopped after {done} of {total} trials; the same command goes on.", file=sys.stderr)
            return 130
        finally:
            if folder.exists():
                search.write()
        search.report()
    return 0


class SeededTPE(BaseSampler):
    """Optuna's TPE, whose randomness is f(seed, number of the trial).

    TPE's own generator starts anew with its process: a sweep that goes on would propose again what it began with, and
    so would a second process.

    Args:
        seed: of the sweep.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tpe = TPESampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start the trial's own randomness."""
        seed = np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0]
        self.tpe = TPESampler(seed=int(seed))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """TPE's."""
        return self.tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """TPE's."""
        return self.tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """TPE's."""
        return self.tpe.sample_independent(study, trial, param_name, param_distribution)


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make the sweep's folder, with ``sweep.yaml``, or see that it is this sweep's."""
    path = folder / SWEEP
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two that start at once: one makes it, and the other must not come between folder and file.
    with locked(folder.with_name(f".{folder.name}.claim")):
        if path.is_file():
            _check_same(read_yaml(path), identity, folder.name)
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"'{folder}' is there and not of a sweep; give the sweep another --name.")
        folder.mkdir(exist_ok=True)
        write_text(path, yaml.safe_dump(identity, sort_keys=False))


def _check_same(before: Any, identity: dict[str, Any], name: str) -> None:
    if before is not None and (found := differences(before, identity)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"Sweep '{name}' is of another space: {found[0]}{more}; give this one another --name.")


@contextmanager
def _study(folder: Path, url: str | None, space: Space, prune: bool) -> Iterator[tuple[Study, RDBStorage]]:
    """The study of that name, made if it is not there, and where it is.

    Raises:
        UserError: if its storage cannot be had.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = url or f"sqlite:///{folder.resolve() / 'sweep.db'}"
    # Two processes may write at once: SQLite lets one of them wait so many seconds.
    connection: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        # The tables are made by one process.
        with warnings.catch_warnings(), FileLock(folder / ".sweep.lock"):
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                url,
                connection,
                heartbeat_interval=HEARTBEAT,
                grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=try_again,
            )
            study = optuna.create_study(
                study_name=folder.name,
                storage=storage,
                sampler=SeededTPE(space.seed),
                # The first epoch says little.
                pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=1) if prune else NopPruner(),
                direction=space.direction,
                load_if_exists=True,
            )
    except (ImportError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--storage cannot be opened: {reason} It is a URL, for example postgresql://user@host/database."
        ) from None
    try:
        yield study, storage
    finally:
        storage.engine.dispose()
