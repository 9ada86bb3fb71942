"""``upright sweep``: a search over options of ``upright fit`` with Optuna.

Each trial is a process and a run in its own folder. Optuna's storage lies in the folder of the sweep, so the same
command resumes a sweep that was stopped or killed, and its unfinished trial resumes from its last checkpoint.
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from upright.checkpoint import KEY, read_checkpoint
from upright.data.configs import read_yaml
from upright.errors import UserError, nearest
from upright.files import check_name, write_text
from upright.runs.folder import ROOT, SWEEP, is_sweep, locked
from upright.runs.sweeping.space import Space, as_arguments, check_free, read_space
from upright.runs.sweeping.trial import COMMAND, failure, running
from upright.tables import read_rows

POLL_SECONDS = 0.2


class TrialFailed(Exception):
    """A trial without a score. The sweep continues."""


def sweep(
    space: str,
    trials: int | None = None,
    name: str | None = None,
    options: Sequence[str] = (),
    command: Sequence[str] = COMMAND,
) -> int:
    """Search in ``checkpoints/NAME``, or resume the sweep there. Return the exit code: 0, or 130 if it was stopped.

    Args:
        space: path of the YAML; see `read_space`.
        trials: total number of trials, earlier ones included; that of the YAML by default.
        name: name of the sweep; that of the YAML by default.
        options: options of ``upright fit``, for every trial.
        command: the command that a trial runs, without its options.
    """
    plan = read_space(space)
    names = [option.lstrip("-").partition("=")[0] for option in options if option.startswith("-")]
    check_free(names)
    for option in names:
        if option in plan.searched:
            raise UserError(f"'{option}' is searched by '{space}' and cannot be fixed too; change it there.")
    name = Path(space).stem if name is None else name
    check_name(name)
    total = plan.trials if trials is None else trials
    if total is None or total < 1:
        raise UserError(
            f"The number of trials must be at least 1, got {total}: --trials 20, or `trials: 20` in '{space}'."
        )
    folder = ROOT / name
    identity = read_yaml(space) | {"config": [read_yaml(path) for path in plan.configs], "options": [*options]}
    with _locked_sweep(folder, identity), _study(folder, plan) as study:
        search = Search(study, plan, folder, [*command], [*options])
        # SIGTERM, which schedulers send, stops a sweep as Ctrl-C does.
        handlers = {number: signal.signal(number, search.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            search.run(total)
        except KeyboardInterrupt:
            print("\nStopped; the same command resumes the sweep.", file=sys.stderr)
            return 130
        except UserError:
            if not _scored(study):
                shutil.rmtree(folder)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


class Search:
    """The trials of a study, one after the other. For ``command`` and ``options``, see `sweep`."""

    def __init__(self, study: Study, space: Space, folder: Path, command: list[str], options: list[str]) -> None:
        self.study, self.space, self.folder, self.command, self.options = study, space, folder, command, options
        self.stopped = False

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal. Python may discard the exception, as in a finaliser, so trials check ``stopped`` too."""
        self.stopped = True
        raise KeyboardInterrupt

    def run(self, total: int) -> None:
        """Resume unfinished trials, start new ones until there are ``total``, and print the best."""
        for unfinished in self.study.get_trials(states=(TrialState.RUNNING,)):
            self._run(unfinished)
        while (number := len(self.study.trials)) < total:
            # A sampler's own generator restarts in each process. With a seed per trial, a resumed sweep proposes the
            # same values as an uninterrupted one.
            seed = np.random.SeedSequence((self.space.seed, number)).generate_state(1)[0]
            self.study.sampler = TPESampler(seed=int(seed))
            self._run(self.study.ask(self.space.searched))
        if not self.study.get_trials(states=(TrialState.COMPLETE,)):
            raise UserError(f"No trial of '{self.folder}' has a score; the logs are '{self.folder}/trial-*.log'.")
        best = self.study.best_trial
        folder = self._folder(best.number)
        print(f"\nBest: {self.space.metric} {best.value:.6g}\nRun:  {folder}")
        print(f"Next: upright test --ckpt_path {folder}/best.ckpt")

    def _folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def _run(self, trial: Trial | FrozenTrial) -> None:
        """Train one trial, and record the result in Optuna's storage and in the folder of the trial."""
        folder, score = self._folder(trial.number), None
        values = "  ".join(f"{option.rpartition('.')[2]} {value}" for option, value in trial.params.items())
        print(f"trial {trial.number}  {values}", flush=True)
        try:
            score = self._score(trial, folder)
            state, result = TrialState.COMPLETE, f"{self.space.metric} {score:.4f}"
        except optuna.TrialPruned:
            state, result = TrialState.PRUNED, "pruned"
        except TrialFailed as error:
            state, result = TrialState.FAIL, f"failed: {error} ({_log(folder)})"
        self.study.tell(trial.number, score, state)
        print(f"trial {trial.number}  {result}", flush=True)
        if folder.is_dir():
            record = {"trial": trial.number, "state": "failed" if state == TrialState.FAIL else state.name.lower()}
            record |= {self.space.metric: score, "options": self.space.fixed | trial.params}
            write_text(folder / "trial.json", json.dumps(record, indent=2) + "\n")

    def _score(self, trial: Trial | FrozenTrial, folder: Path) -> float:
        """Run a trial to its end, or until it is pruned. A resumed one, a `FrozenTrial`, is never pruned."""
        own = {"name": folder.name, "trainer.default_root_dir": str(self.folder), "ckpt_path": "auto"}
        configs = [f"--config={path}" for path in self.space.configs]
        values = as_arguments(self.space.fixed | trial.params)
        command = [*self.command, *configs, *values, *self.options, *as_arguments(own)]
        metric, reported = self.space.metric, -1
        with running(command, _log(folder), self.folder.name) as process:
            ended = False
            while not ended:
                if self.stopped:
                    raise KeyboardInterrupt
                # Every epoch is evaluated, also after the trial has ended: a fast machine prunes the same trials.
                ended = process.poll() is not None
                for row in read_rows(folder / "metrics.csv"):
                    if row.get(metric) and int(row["epoch"]) > reported:
                        reported = int(row["epoch"])
                        trial.report(float(row[metric]), reported)
                        if trial.should_prune():
                            raise optuna.TrialPruned
                time.sleep(0 if ended else POLL_SECONDS)
        if process.returncode:
            reason = failure(process.returncode, _log(folder))
            if process.returncode == UserError.exit_code and not _scored(self.study):
                raise UserError(f"The first trial failed: {reason}")
            raise TrialFailed(reason)
        metrics = read_checkpoint(folder / "best.ckpt")[KEY]["metrics"]
        if metric not in metrics:
            raise UserError(f"There is no metric '{metric}'.{nearest(metric, metrics)} Metrics: {', '.join(metrics)}.")
        if not math.isfinite(metrics[metric]):
            raise TrialFailed(f"{metric} of its best.ckpt is {metrics[metric]}")
        return float(metrics[metric])


def _log(folder: Path) -> Path:
    """Return the path of the log, beside the trial's folder, which ``upright fit`` creates."""
    return folder.with_suffix(".log")


def _scored(study: Study) -> bool:
    return any(trial.values or trial.intermediate_values for trial in study.get_trials(deepcopy=False))


@contextmanager
def _locked_sweep(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of a sweep, in which ``sweep.yaml`` stores its identity; refuse another identity."""
    if folder.exists() and any(folder.iterdir()) and not is_sweep(folder):
        raise UserError(f"'{folder}' exists and is not a sweep; give the sweep another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.sweep"), f"Sweep '{folder}' is running in another process."):
        if not is_sweep(folder):
            write_text(folder / SWEEP, yaml.safe_dump(identity, sort_keys=False))
        before = read_yaml(folder / SWEEP)
        for key in ("config", "metric", "seed", "space", "options"):
            if before.get(key) != identity.get(key):
                raise UserError(f"Sweep '{folder.name}' has another {key}; give this one another --name.")
        yield


@contextmanager
def _study(folder: Path, space: Space) -> Iterator[Study]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RDBStorage(f"sqlite:///{folder.resolve() / 'sweep.db'}")
    # Metrics of the first epoch predict little.
    pruner = MedianPruner(n_startup_trials=5, n_warmup_steps=1) if space.prune else NopPruner()
    try:
        yield optuna.create_study(
            study_name=folder.name, storage=storage, pruner=pruner, direction=space.direction, load_if_exists=True
        )
    finally:
        storage.engine.dispose()
