"""A search over options of ``upright fit``: its trials, one after the other, each a process and a run."""

import csv
import io
import json
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import Timeout
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from upright.checkpoint import KEY, read_checkpoint
from upright.errors import UprightError, UserError, nearest
from upright.files import write_text
from upright.runs.folder import locked
from upright.runs.sweeping.space import Space, as_arguments
from upright.runs.sweeping.trial import keep_log, last_words, log_of, started
from upright.tables import read_rows

POLL = 0.2  # seconds between two looks at a trial
ATTEMPTS = 3  # of a trial whose sweep was killed; it may be what killed it


class TrialFailed(Exception):
    """A trial has no score; the sweep goes on."""


class Search:
    """The trials of one study, one after the other in this process.

    Args:
        study: Optuna's.
        space: what is searched.
        folder: of the sweep.
        total: how many trials there shall be in the end.
        command: what a trial runs.
        options: of ``upright fit``, for every trial.
    """

    def __init__(
        self, study: Study, space: Space, folder: Path, total: int, command: list[str], options: list[str]
    ) -> None:
        self.study, self.space, self.folder, self.total = study, space, folder, total
        self.command, self.options = command, options

    def planned(self) -> list[FrozenTrial]:
        """The trials that count: not those that are tried again under another number, nor one too many."""
        trials = self.study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("again") for trial in trials}
        return [trial for trial in trials if trial.number not in again and "surplus" not in trial.user_attrs]

    def run(self, deadline: float) -> None:
        """Run trials until there are enough, or it is late.

        Raises:
            UserError: for a mistake that every trial would make.
        """
        self._give_up_abandoned()
        with _terminated_is_interrupted():
            while time.monotonic() < deadline:
                planned = self.planned()
                waiting = any(trial.state == TrialState.WAITING for trial in planned)
                if not waiting and len(planned) >= self.total:
                    return
                self.study.optimize(self._objective, n_trials=1, catch=(TrialFailed,))
        print(f"Time is up after {len(self.planned())} of {self.total} trials; the same command goes on.")

    def _objective(self, trial: Trial) -> float:
        # The storage gives every number once: of two processes that start the last trial, one is told so here.
        if sum(before.number < trial.number for before in self.planned()) >= self.total:
            trial.set_user_attr("surplus", True)
            raise TrialFailed
        with _lock(self.folder, trial.number):
            trial.set_user_attr("host", platform.node())
            values = self.space.suggest(trial)
            if (twin := self._twin(trial)) is not None:
                trial.set_user_attr("same_as", twin.number)
                self._say(trial, f"the same as trial {twin.number}")
                return float(twin.values[0])
            folder = self._folder(trial.number)
            if folder.exists():
                raise UserError(f"'{folder}' is there and not of this sweep; give the sweep another --name.")
            try:
                score = self._train(trial, values, folder)
            except optuna.TrialPruned:
                self._settle(trial, values, "pruned")
                raise
            except (TrialFailed, UprightError) as error:
                trial.set_user_attr("error", str(error))
                self._settle(trial, values, "failed", error=str(error))
                raise
            except KeyboardInterrupt:
                self._settle(trial, values, "stopped")
                # Whoever stops a sweep means no harm to the trial that happened to run.
                try_again(self.study, self.study.trials[trial.number], attempts=0)
                raise
            self._settle(trial, values, "complete", score=score)
            return score

    def _train(self, trial: Trial, values: dict[str, Any], folder: Path) -> float:
        """Run a trial to its end, or to where it is pruned."""
        own = {"name": folder.name, "trainer.default_root_dir": str(self.folder)}
        configs = [part for path in self.space.configs for part in ("--config", str(path))]
        command = [*self.command, *configs, *as_arguments(values), *self.options, *as_arguments(own)]
        log = log_of(folder)
        print(f"trial {trial.number}  {self._shown(values)}", flush=True)
        with started(command, log, self.folder.name) as process:
            reported = -1
            while True:
                # Asked before its metrics are read, so that the last of them are not missed.
                ended = process.poll() is not None
                for epoch, value in self._metrics(folder):
                    if epoch > reported:
                        trial.report(value, epoch)
                        reported = epoch
                if ended:
                    break
                if trial.should_prune():
                    raise optuna.TrialPruned
                time.sleep(POLL)
        if process.returncode:
            error = last_words(process.returncode, log)
            if process.returncode == UprightError.exit_code and not self._any_has_run():
                raise UserError(f"The first trial made a mistake: {error}")
            raise TrialFailed(error)
        score = float(read_checkpoint(folder / "best.ckpt")[KEY]["metrics"].get(self.space.metric, math.nan))
        if not math.isfinite(score):
            raise TrialFailed(f"{self.space.metric} of its best.ckpt is {score}")
        return score

    def _metrics(self, folder: Path) -> Iterator[tuple[int, float]]:
        """The metric after every epoch so far that was validated."""
        for row in read_rows(folder / "metrics.csv"):
            names = [name for name in row if name.startswith("val/")]
            if names and self.space.metric not in names:
                raise UserError(
                    f"A trial has no metric '{self.space.metric}'.{nearest(self.space.metric, names)} "
                    f"It has {', '.join(names)}."
                )
            if row.get(self.space.metric):
                yield int(row["epoch"]), float(row[self.space.metric])

    def _any_has_run(self) -> bool:
        return any(trial.values or trial.intermediate_values for trial in self.study.get_trials(deepcopy=False))

    def _twin(self, trial: Trial) -> FrozenTrial | None:
        """An earlier trial of the same parameters: it would be the same again, to the last bit."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return next((before for before in complete if before.params == trial.params), None)

    def _give_up_abandoned(self) -> None:
        """Try again what killed processes left: here, whose lock is free; elsewhere, whose heart does not beat."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not _lock_path(self.folder, trial.number).exists():
                continue
            with suppress(Timeout), _lock(self.folder, trial.number, wait=False):
                # Another process may have been quicker.
                with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    try_again(self.study, trial)
                keep_log(self._folder(trial.number))

    def _folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def _settle(
        self, trial: Trial, values: dict[str, Any], state: str, *, score: float | None = None, error: str | None = None
    ) -> None:
        """Leave in the trial's folder what became of it, and say so."""
        folder = self._folder(trial.number)
        keep_log(folder)
        record = {"sweep": self.folder.name, "trial": trial.number, "state": state, "options": values}
        record |= {self.space.metric: score} if score is not None else {}
        record |= {"error": error} if error else {}
        write_text(folder / "trial.json", json.dumps(record, indent=2) + "\n")
        self._say(
            trial, f"{self.space.metric} {score:.4f}" if score is not None else f"{state}: {error}" if error else state
        )

    def _say(self, trial: Trial, what: str) -> None:
        print(f"trial {trial.number}  {what}", flush=True)

    def _shown(self, values: dict[str, Any]) -> str:
        return "  ".join(f"{self._short(option)} {_cell(values[option])}" for option in self.space.searched)

    def _short(self, option: str) -> str:
        last = option.rpartition(".")[2]
        return last if sum(other.rpartition(".")[2] == last for other in self.space.searched) == 1 else option

    def rows(self) -> list[dict[str, str]]:
        """A row per trial, the best first."""
        sign = -1 if self.space.direction == "maximize" else 1
        order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
        planned = self.planned()
        planned.sort(key=lambda t: (order.index(t.state), sign * t.values[0] if t.values else 0, t.number))
        return [
            {
                "trial": str(trial.number),
                "state": _state(trial),
                self.space.metric: f"{trial.values[0]:.6g}" if trial.values else "",
                **{option: str(trial.params.get(option, "")) for option in self.space.searched},
                "folder": str(self._folder(trial.user_attrs.get("same_as", trial.number))),
                "host": str(trial.user_attrs.get("host", "")),
                "error": str(trial.user_attrs.get("error", "")),
            }
            for trial in planned
        ]

    def write(self) -> None:
        """Write ``trials.csv``."""
        if rows := self.rows():
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.folder / "trials.csv", text.getvalue())

    def report(self) -> None:
        """Print the trials, the best run and what to type next.

        Raises:
            UserError: if none has a score.
        """
        rows = self.rows()
        shown = ["trial", "state", self.space.metric, *self.space.searched]
        table = [[self._short(column) if "." in column else column for column in shown]]
        table += [[_cell(row[column]) for column in shown] for row in rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        best = rows[0] if rows and rows[0]["state"] == "complete" else None
        if best is None:
            error = next((row["error"] for row in rows if row["error"]), "none has ended")
            raise UserError(f"No trial of '{self.folder}' has a score: {error}")
        elsewhere = "" if Path(best["folder"]).exists() else f" (on {best['host']})"
        print(f"\nTrials: {self.folder / 'trials.csv'}\nBest:   {self.space.metric} {best[self.space.metric]}")
        print(f"Run:    {best['folder']}{elsewhere}\nNext:   upright test --ckpt_path {best['folder']}/best.ckpt")


def try_again(study: Study, trial: FrozenTrial, attempts: int = 1) -> None:
    """Put a trial that did not end by itself in the queue again, with its parameters; not without end."""
    attempts += int(trial.user_attrs.get("attempts", 0))
    if attempts < ATTEMPTS:
        study.enqueue_trial(trial.params, {"again": trial.number, "attempts": attempts})


def _lock_path(folder: Path, number: int) -> Path:
    return folder / f".trial-{number:03d}.lock"


def _lock(folder: Path, number: int, wait: bool = True) -> AbstractContextManager[None]:
    """Held while a trial runs."""
    return locked(_lock_path(folder, number), wait)


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end what they run, stop the sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _state(trial: FrozenTrial) -> str:
    if "same_as" in trial.user_attrs:
        return f"same as {trial.user_attrs['same_as']}"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def _cell(value: Any) -> str:
    """Numbers to four digits, as they come or as a CSV has them."""
    if not isinstance(value, float | str):
        return json.dumps(value)
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return str(value)
