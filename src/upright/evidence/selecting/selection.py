"""``upright select``: rank runs on the validation split, and estimate the true accuracy of the best one.

The best of many scores is partly luck. The estimate subtracts this part, see `optimism`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from upright.data.configs import read_data
from upright.errors import UserError
from upright.evidence.selecting.candidates import Candidate, ValidationPredictions, find_candidates, predictions_of
from upright.evidence.selecting.optimism import optimism, resampled
from upright.files import check_replaceable, write_text
from upright.intervals import Share, clustered
from upright.runs.drawing import save_png
from upright.runs.folder import is_sweep, locked
from upright.runs.process import leave_a_core
from upright.runs.seal import count
from upright.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "selection.json"
DRAWN_RUNS = 40
LINE_WIDTH = 110


def select(runs: Sequence[str], to: str | None = None, data: str | None = None) -> int:
    """Print the ranking, and write it as ``selection.md``, ``.json`` and ``.png``.

    Args:
        runs: folders of runs, or the folder of a sweep.
        to: folder to write to; by default the folder of the sweep, if it is the only argument.
        data: a YAML of the data, if they have moved.

    Raises:
        UserError: if no run is complete, or the runs were validated on different images.
    """
    leave_a_core()
    candidates = find_candidates(runs)
    sweeps = [Path(path) for path in runs if is_sweep(Path(path))]
    folder = Path(to) if to else sweeps[0] if len(sweeps) == len(runs) == 1 else None
    if folder and folder not in sweeps:
        check_replaceable(folder, "a selection", RECORD)
    complete = [run for run in candidates if run.state == "complete"]
    selection = Selection.of(complete, predictions_of(complete, read_data(data) if data else None), candidates)
    notes = _notes(selection, candidates, sweeps)
    text = _markdown(selection, notes)
    print(f"\n{text}", end="")
    if folder is None:
        print("\nNo files were written; --to FOLDER writes them.")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    record = asdict(selection) | {"estimate": selection.estimate._asdict(), "sentence": selection.sentence}
    with locked(folder / ".selection.lock"):
        # Write the record first. It marks the folder as a selection, so that an interrupted command can run again.
        write_text(folder / RECORD, json.dumps(record | {"notes": notes}, indent=2, allow_nan=False) + "\n")
        write_text(folder / "selection.md", text)
        save_png(_draw(selection), folder / "selection.png")
    print(f"\nWritten: {folder}/selection.md, .json, .png")
    return 0


@dataclass(frozen=True)
class RankedRun:
    """A run in the ranking, with its accuracy on the validation split.

    Args:
        interval: 95 % interval, valid for a run that was not chosen on these images.
        loss: mean negative log-likelihood.
        epochs: number of validated epochs.
    """

    name: str
    folder: str
    accuracy: float
    interval: tuple[float, float]
    loss: float
    epochs: int


@dataclass(frozen=True)
class Selection:
    """A ranking of the complete runs, the best one first, and the estimate for the first one.

    Args:
        images: N, number of source images in the validation split.
        views: number of views of each image.
        candidates: number of all runs that the choice is made from, including incomplete ones.
        optimism: optimism of the accuracy of the first run, see `optimism.optimism`.
        test_openings: number of evaluations on the test split, for each run that has any.
    """

    images: int
    views: int
    candidates: int
    ranking: list[RankedRun]
    optimism: float
    test_openings: dict[str, int]

    @classmethod
    def of(
        cls,
        complete: Sequence[Candidate],
        predictions: Sequence[ValidationPredictions],
        candidates: Sequence[Candidate],
    ) -> "Selection":
        """Rank the complete runs by their predictions.

        Raises:
            UserError: if the split has one image, or a run predicts NaN.
        """
        scores = np.stack([each.scores for each in predictions])
        images, views = scores.shape[1], predictions[0].views
        if images < 2:
            raise UserError("The validation split has one image, but a selection needs at least 2.")
        source = np.repeat(np.arange(images), views)
        rows = []
        for run, each in zip(complete, predictions, strict=True):
            if not np.isfinite(each.losses).all():
                raise UserError(f"'{run.name}' predicts NaN or infinity; omit this run.")
            share = clustered(each.correct, source)
            rows.append(
                RankedRun(run.name, str(run.folder), share.value, share[1:], float(each.losses.mean()), run.epochs)
            )
        openings = {run.name: count(run.folder, predictions[0].test_split) for run in candidates}
        return cls(
            images,
            views,
            len(candidates),
            sorted(rows, key=lambda row: (-row.accuracy, row.loss)),
            optimism(scores.mean(axis=1), resampled(scores)),
            {name: times for name, times in openings.items() if times},
        )

    @property
    def first(self) -> RankedRun:
        """The run with the highest accuracy. Among runs of equal accuracy, it has the lowest loss."""
        return self.ranking[0]

    @property
    def estimate(self) -> Share:
        """The accuracy of the first run and its interval, both reduced by the optimism."""
        ends = (self.first.accuracy, *self.first.interval)
        return Share(*(max(0.0, end - self.optimism) for end in ends))

    @property
    def sentence(self) -> str:
        """The result in words."""
        first, estimate, ranked = self.first, self.estimate, len(self.ranking)
        accuracy = f"accuracy {first.accuracy:.4f} on {self.images:,} validation images"
        interval = f"(95 % interval {estimate.low:.4f} to {estimate.high:.4f})"
        if ranked == 1:
            of = f"the only complete run of {self.candidates}"
            return f"{first.name} is {of}, so its accuracy is not corrected: {accuracy} {interval}."
        of = f"{ranked} runs" if ranked == self.candidates else f"{ranked} complete runs ({self.candidates} in all)"
        return (
            f"{first.name} is the best of {of}: {accuracy}. Corrected for the choice of the best, its expected "
            f"accuracy is {estimate.value:.4f} {interval}. The correction of {self.optimism:.4f} is a bootstrap "
            "estimate over the validation images."
        )


def _notes(selection: Selection, candidates: Sequence[Candidate], sweeps: Sequence[Path]) -> list[str]:
    states = ", ".join(f"{number} {state}" for state, number in Counter(run.state for run in candidates).items())
    notes = [
        f"Runs: {states}. The correction covers the choice among the complete runs. It does not cover the choice of "
        "the best epoch of each run, which used the same images."
    ]
    if sweeps:
        notes.append("A search that adapts to these scores adds a bias that the correction does not cover.")
    for folder in sorted({run.folder.resolve().parent for run in candidates} - {sweep.resolve() for sweep in sweeps}):
        if is_sweep(folder):
            notes.append(f"Some runs are trials of the sweep '{folder.name}'. Give its folder to count all trials.")
    by_loss = min(selection.ranking, key=lambda row: row.loss)
    if by_loss is not selection.first:
        notes.append(
            f"{by_loss.name} has the lowest loss ({by_loss.loss:.4f}, with an accuracy of {by_loss.accuracy:.4f})."
        )
    if selection.views > 1:
        notes.append(f"Each image has {selection.views} views and counts once.")
    openings = selection.test_openings
    if openings:
        each = ", ".join(f"{name} {times}" for name, times in openings.items())
        notes.append(f"These runs were evaluated {sum(openings.values())} times on the test split ({each}).")
    else:
        notes.append("None of these runs was evaluated on the test split.")
    if sum(openings.values()) > 1:
        notes.append("Do not choose by the test split: it would be a second validation split, without unseen images.")
    return notes


def _markdown(selection: Selection, notes: Sequence[str]) -> str:
    table = [["run", "accuracy", "95 %", "loss"]]
    for row in selection.ranking:
        low, high = row.interval
        table.append([row.name, f"{row.accuracy:.4f}", f"{low:.4f} to {high:.4f}", f"{row.loss:.4f}"])
    legend = "95 %: interval of each single run, without correction. loss: mean negative log-likelihood."
    points = [fill(note, LINE_WIDTH, initial_indent="- ", subsequent_indent="  ") for note in [*notes, legend]]
    return "\n".join([fill(selection.sentence, LINE_WIDTH), "", markdown(table), *points]) + "\n"


def _draw(selection: Selection) -> "Figure":
    """Draw accuracies with their intervals, the best run on top, and the estimate as a line."""
    from matplotlib.figure import Figure

    rows = selection.ranking[:DRAWN_RUNS]
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(rows):
        axis.plot(row.interval, [index, index], color="#084081", linewidth=1.5)
        axis.plot(row.accuracy, index, "o", color="#084081", markersize=5)
    axis.axvline(selection.estimate.value, color="#b3123a", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), labels=[row.name for row in rows], fontsize=8, parse_math=False)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"accuracy on {selection.images:,} validation images, with intervals of 95 %", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    more = f"; the first {len(rows)} of {len(selection.ranking)} runs" if len(rows) < len(selection.ranking) else ""
    axis.set_title(f"Dashed line: expected accuracy of the first run, corrected for the choice{more}", fontsize=8)
    return figure
