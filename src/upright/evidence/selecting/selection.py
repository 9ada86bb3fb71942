"""``upright select``: which of several runs is the best on their validation split, and what that says.

Whoever chooses by a validation split fits it: the best score is best by merit and by luck.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from upright.data.configs import read_data
from upright.errors import UserError
from upright.evidence.selecting.candidates import Answers, Run, answers_of, find_runs
from upright.evidence.selecting.optimism import (
    DELTA,
    empirical_bernstein,
    hoeffding,
    interval,
    may_be_best,
    optimism,
    resampled,
)
from upright.files import check_replaceable, write_text
from upright.runs.drawing import save_picture
from upright.runs.folder import is_sweep, locked
from upright.runs.process import leave_a_core
from upright.runs.seal import count
from upright.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "selection.json"
MOST_DRAWN = 40
WIDTH = 110
STATES = {
    "complete": "ended",
    "pruned": "pruned",
    "failed": "failed",
    "elsewhere": "not here, and not ranked",
}
BOUNDS = {"hoeffding": "Hoeffding, any variance", "empirical_bernstein": "Maurer and Pontil, this variance"}


def select(runs: Sequence[str], to: str | None = None, data: str | None = None) -> int:
    """Print the ranking, and write it as ``selection.md``, ``.json`` and ``.png``.

    Args:
        runs: folders of runs, or of a sweep.
        to: the folder to write to; the sweep's by default, if one is given and nothing else.
        data: a YAML of the data, if they are not where they were.

    Raises:
        UserError: if there is nothing to choose among, or the runs were not validated alike.
    """
    leave_a_core()
    found = find_runs(runs)
    sweeps = [Path(path) for path in runs if is_sweep(Path(path))]
    folder = Path(to) if to else sweeps[0] if len(sweeps) == len(runs) == 1 else None
    if folder and folder not in sweeps:
        check_replaceable(folder, "a selection", RECORD)
    complete = [run for run in found if run.state == "complete"]
    answers = answers_of(complete, read_data(data) if data else None)
    selection = Selection.of(complete, answers, found)
    notes = _notes(selection, found, sweeps)
    text = _markdown(selection, notes)
    print(f"\n{text}", end="")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        record = asdict(selection) | {"sentence": selection.sentence, "notes": notes}
        figure = _draw(selection)
        with locked(folder / ".selection.lock"):
            # First what the folder is known by: were this stopped here, the same command would go on.
            write_text(folder / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
            write_text(folder / "selection.md", text)
            save_picture(figure, folder / "selection.png")
        print(f"\nWritten: {folder}/selection.md, .json, .png")
    else:
        print("\nNothing is written without --to FOLDER.")
    return 0


@dataclass(frozen=True)
class Ranked:
    """One of the candidates.

    Args:
        name: of its run.
        folder: of its run.
        accuracy: on the validation split.
        interval: of 95 %, if it had not been chosen.
        loss: mean negative logarithm of the true class's probability.
        p: of "no other one is truly better", see `may_be_best`.
        epochs: that it is the best of.
    """

    name: str
    folder: str
    accuracy: float
    interval: tuple[float, float]
    loss: float
    p: float
    epochs: int

    @property
    def may_be_best(self) -> bool:
        """Whether it cannot be told from the best."""
        return self.p > DELTA


@dataclass(frozen=True)
class Bounds:
    """How far the true accuracy of the first one may be from the measured one, with 95 %.

    Args:
        models: that it was chosen from.
        hoeffding: see there.
        empirical_bernstein: see there.
    """

    models: int
    hoeffding: float
    empirical_bernstein: float


@dataclass(frozen=True)
class Selection:
    """What came of it.

    Args:
        images: N, of the validation split; several views of one count once.
        views: of each.
        candidates: M, all runs that were looked at.
        ranking: of those that ended, the best first.
        optimism: of the first one's accuracy.
        bounds: from M runs, and from every epoch of theirs.
        test_openings: how often the test split was opened, by run, where it was.
    """

    images: int
    views: int
    candidates: int
    ranking: list[Ranked]
    optimism: float
    bounds: tuple[Bounds, Bounds]
    test_openings: dict[str, int]

    @classmethod
    def of(cls, complete: Sequence[Run], answers: Sequence[Answers], looked_at: Sequence[Run]) -> "Selection":
        """From the candidates that ended, their answers, and all that were looked at.

        Raises:
            UserError: if there is only one image to choose by, or answers are no probabilities.
        """
        scores = np.stack([each.scores for each in answers])
        if scores.shape[1] < 2:
            raise UserError("The validation split has one image; to choose by it, it must have at least 2.")
        for run, each in zip(complete, answers, strict=True):
            if not np.isfinite(each.losses).all():
                raise UserError(f"'{run.name}' answers with NaN or infinity: leave it out.")
        means, noise = scores.mean(axis=1), resampled(scores)
        rows = [
            Ranked(
                run.name,
                str(run.folder),
                float(mean),
                interval(score),
                float(each.losses.mean()),
                float(p),
                run.epochs,
            )
            for run, each, score, mean, p in zip(
                complete, answers, scores, means, may_be_best(scores, noise), strict=True
            )
        ]
        order = sorted(range(len(rows)), key=lambda i: (-rows[i].accuracy, rows[i].loss))
        images, first = scores.shape[1], scores[order[0]]
        runs, epochs = (
            Bounds(models, hoeffding(models, images), empirical_bernstein(first, models))
            for models in (len(looked_at), sum(run.epochs for run in looked_at))
        )
        return cls(
            images,
            answers[0].views,
            len(looked_at),
            [rows[i] for i in order],
            optimism(means, noise),
            (runs, epochs),
            {run.name: times for run in looked_at if (times := count(run.folder, answers[0].test_split))},
        )

    @property
    def first(self) -> Ranked:
        """The one of the highest accuracy, by its loss among equals."""
        return self.ranking[0]

    @property
    def sentence(self) -> str:
        """All of it in one."""
        first, others = self.first, sum(each.may_be_best for each in self.ranking[1:])
        where = f"{first.accuracy:.4f} on N={self.images:,}"
        least = max(0.0, first.accuracy - self.bounds[1].empirical_bernstein)
        bound = f"by the variance-aware bound its true accuracy is at least {least:.4f} with 95 % confidence."
        if self.candidates == 1:
            return f"{first.name} is the only candidate given, with {where}, so no choice among runs counts; {bound}"
        ranked = len(self.ranking)
        if ranked == 1:
            return (
                f"{first.name} alone can be ranked, of M={self.candidates} that were looked at, with {where}; {bound}"
            )
        of = (
            f"M={self.candidates}"
            if ranked == self.candidates
            else f"{ranked} that are ranked, of M={self.candidates},"
        )
        worse = "the other is worse" if ranked == 2 else "all others of these are worse"
        told = f"{others} other{'s' * (others > 1)} cannot be told from it" if others else worse
        return (
            f"{first.name} is first of {of} with {where}; having been chosen it is worth about "
            f"{first.accuracy - self.optimism:.4f} (optimism {self.optimism:.4f}); {told}; {bound}"
        )


def _notes(selection: Selection, looked_at: Sequence[Run], sweeps: Sequence[Path]) -> list[str]:
    states = [run.state for run in looked_at]
    told = ", ".join(f"{states.count(state)} {text}" for state, text in STATES.items() if state in states)
    # A trial on another machine has left no table of its epochs here.
    least = "at least " if "elsewhere" in states else ""
    notes = [
        f"M counts every run that was looked at: {told}. With each epoch that was validated these are "
        f"{least}{selection.bounds[1].models:,} models, and by them the bound goes: a run's best.ckpt is the best of "
        "its epochs on these very images. The optimism is of the choice among those that ended, and of no other."
    ]
    if sweeps:
        notes.append("A search that goes by these scores adapts to them, and no count of models covers that.")
    for folder in sorted({run.folder.resolve().parent for run in looked_at} - {sweep.resolve() for sweep in sweeps}):
        if is_sweep(folder):
            notes.append(f"Some are trials of the sweep '{folder.name}': give its folder, and M counts all of them.")
    by_loss = min(selection.ranking, key=lambda each: each.loss)
    if by_loss is not selection.first:
        notes.append(f"By loss {by_loss.name} is first ({by_loss.loss:.4f}, accuracy {by_loss.accuracy:.4f}).")
    if selection.views > 1:
        notes.append(f"N counts source images; each is shown {selection.views} times.")
    opened = selection.test_openings
    if opened:
        told = ", ".join(f"{name} {times}" for name, times in opened.items())
        notes.append(f"The test split was opened {sum(opened.values())} times ({told}).")
    else:
        notes.append("The test split was not opened for any of them.")
    if sum(opened.values()) > 1:
        notes.append(
            "Whoever chooses by the test split makes a second validation split of it: the best score there is too good "
            "in the same way, and no image is left to say by how much."
        )
    return notes


def _markdown(selection: Selection, notes: Sequence[str]) -> str:
    table = [["run", "accuracy", "95 %", "loss", "p", "may be the best"]]
    for each in selection.ranking:
        low, high = each.interval
        cells = [each.name, f"{each.accuracy:.4f}", f"{low:.4f} to {high:.4f}", f"{each.loss:.4f}"]
        cells.append(f"{each.p:.3f}" if each.p >= 0.001 else "<0.001")
        table.append([*cells, "yes" if each.may_be_best else "no"])
    runs, epochs = selection.bounds
    bounds = [["bound", f"runs: {runs.models}", f"models: {epochs.models:,}"]]
    bounds += [
        [title, *(f"{getattr(bound, name):.4f}" for bound in selection.bounds)] for name, title in BOUNDS.items()
    ]
    legend = [
        "95 %: of a run that nobody has chosen. loss: mean negative logarithm of the true class's probability. p: of "
        '"no other one is truly better", from paired differences on the same images; above 0.05 a run may be the best.',
        "bound: how far accuracy may be from the true one with 95 %, were the runs, or all their epochs, fixed before "
        "the images were drawn.",
    ]
    points = [fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ") for note in [*notes, *legend]]
    return "\n".join([fill(selection.sentence, WIDTH), "", markdown(table), markdown(bounds), *points]) + "\n"


def _draw(selection: Selection) -> "Figure":
    """Accuracies with their intervals, the best on top; in colour those that cannot be told from it."""
    from matplotlib.figure import Figure

    shown = selection.ranking[:MOST_DRAWN]
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(shown)), dpi=120, layout="constrained")
    axis = figure.subplots()
    for place, each in enumerate(shown):
        low, high = each.interval
        colour = "#084081" if each.may_be_best else "#999999"
        axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axis.plot(each.accuracy, place, "o", color=colour, markersize=5)
    axis.axvline(selection.first.accuracy - selection.optimism, color="#b3123a", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(shown)), labels=[each.name for each in shown], fontsize=8, parse_math=False)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel(f"accuracy on {selection.images:,} validation images, with 95 %", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    more = f"; the first {len(shown)} of {len(selection.ranking)}" if len(shown) < len(selection.ranking) else ""
    axis.set_title(
        f"Blue: cannot be told from the best. Dashed: what it is worth, having been chosen{more}", fontsize=8
    )
    return figure
