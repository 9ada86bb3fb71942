"""``upright select``: rank runs on the validation split, and estimate the true accuracy of the best one.

The best of many scores is partly luck. The estimate subtracts this part, see `optimism`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

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

    The arguments are the options of the command, see `upright.options.Select`.

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
    record = rank(complete, predictions_of(complete, read_data(data) if data else None), candidates)
    record["notes"] = _notes(record, candidates, sweeps)
    text = _markdown(record)
    print(f"\n{text}", end="")
    if folder is None:
        print("\nNo files were written; --to FOLDER writes them.")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".selection.lock"):
        # Write the record first. It marks the folder as a selection, so that an interrupted command can run again.
        write_text(folder / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
        write_text(folder / "selection.md", text)
        save_png(_draw(record), folder / "selection.png")
    print(f"\nWritten: {folder}/selection.md, .json, .png")
    return 0


def rank(
    complete: Sequence[Candidate], predictions: Sequence[ValidationPredictions], candidates: Sequence[Candidate]
) -> dict[str, Any]:
    """Rank the complete runs by their accuracy, then by their loss. Return the content of ``selection.json``.

    ``images`` are source images, and ``candidates`` all runs that the choice is made from. The ``interval`` of a run in
    the ``ranking`` is valid if the run was not chosen on these images. The ``estimate`` for the first run is its
    accuracy and interval, reduced by the ``optimism``. ``test_openings`` counts the evaluations on the test split.

    Raises:
        UserError: if the split has one image, or a run predicts NaN.
    """
    scores = np.stack([each.scores for each in predictions])
    images, views = scores.shape[1], predictions[0].views
    if images < 2:
        raise UserError("The validation split has one image, but a selection needs at least 2.")
    source = np.repeat(np.arange(images), views)
    rows: list[dict[str, Any]] = []
    for run, each in zip(complete, predictions, strict=True):
        if not np.isfinite(each.losses).all():
            raise UserError(f"'{run.name}' predicts NaN or infinity; omit this run.")
        accuracy, *interval = clustered(each.correct, source)
        row = {"name": run.name, "folder": str(run.folder), "accuracy": accuracy, "interval": interval}
        rows.append(row | {"loss": float(each.losses.mean()), "epochs": run.epochs})
    ranking = sorted(rows, key=lambda row: (-row["accuracy"], row["loss"]))
    excess = optimism(scores.mean(axis=1), resampled(scores))
    ends = (ranking[0]["accuracy"], *ranking[0]["interval"])
    openings = {run.name: count(run.folder, predictions[0].test_split) for run in candidates}
    record = {
        "images": images,
        "views": views,
        "candidates": len(candidates),
        "ranking": ranking,
        "optimism": excess,
        "test_openings": {name: times for name, times in openings.items() if times},
        "estimate": Share(*(max(0.0, end - excess) for end in ends))._asdict(),
    }
    return record | {"sentence": _sentence(record)}


def _sentence(record: Mapping[str, Any]) -> str:
    first, estimate, ranked, candidates = (
        record["ranking"][0],
        record["estimate"],
        len(record["ranking"]),
        record["candidates"],
    )
    accuracy = f"accuracy {first['accuracy']:.4f} on {record['images']:,} validation images"
    interval = f"(95 % interval {estimate['low']:.4f} to {estimate['high']:.4f})"
    if ranked == 1:
        of = f"the only complete run of {candidates}"
        return f"{first['name']} is {of}, so its accuracy is not corrected: {accuracy} {interval}."
    of = f"{ranked} runs" if ranked == candidates else f"{ranked} complete runs ({candidates} in all)"
    return (
        f"{first['name']} is the best of {of}: {accuracy}. Corrected for the choice of the best, its expected "
        f"accuracy is {estimate['value']:.4f} {interval}. The correction of {record['optimism']:.4f} is a bootstrap "
        "estimate over the validation images."
    )


def _notes(record: Mapping[str, Any], candidates: Sequence[Candidate], sweeps: Sequence[Path]) -> list[str]:
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
    by_loss = min(record["ranking"], key=lambda row: row["loss"])
    if by_loss is not record["ranking"][0]:
        loss, accuracy = by_loss["loss"], by_loss["accuracy"]
        notes.append(f"{by_loss['name']} has the lowest loss ({loss:.4f}, with an accuracy of {accuracy:.4f}).")
    if record["views"] > 1:
        notes.append(f"Each image has {record['views']} views and counts once.")
    if openings := record["test_openings"]:
        each = ", ".join(f"{name} {times}" for name, times in openings.items())
        notes.append(f"These runs were evaluated {sum(openings.values())} times on the test split ({each}).")
    else:
        notes.append("None of these runs was evaluated on the test split.")
    if sum(openings.values()) > 1:
        notes.append("Do not choose by the test split: it would be a second validation split, without unseen images.")
    return notes


def _markdown(record: Mapping[str, Any]) -> str:
    table = [["run", "accuracy", "95 %", "loss"]]
    for row in record["ranking"]:
        low, high = row["interval"]
        table.append([row["name"], f"{row['accuracy']:.4f}", f"{low:.4f} to {high:.4f}", f"{row['loss']:.4f}"])
    legend = "95 %: interval of each single run, without correction. loss: mean negative log-likelihood."
    points = [
        fill(note, LINE_WIDTH, initial_indent="- ", subsequent_indent="  ") for note in [*record["notes"], legend]
    ]
    return "\n".join([fill(record["sentence"], LINE_WIDTH), "", markdown(table), *points]) + "\n"


def _draw(record: Mapping[str, Any]) -> "Figure":
    """Draw accuracies with their intervals, the best run on top, and the estimate as a line."""
    from matplotlib.figure import Figure

    ranking = record["ranking"]
    rows = ranking[:DRAWN_RUNS]
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(rows):
        axis.plot(row["interval"], [index, index], color="#084081", linewidth=1.5)
        axis.plot(row["accuracy"], index, "o", color="#084081", markersize=5)
    axis.axvline(record["estimate"]["value"], color="#b3123a", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), labels=[row["name"] for row in rows], fontsize=8, parse_math=False)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"accuracy on {record['images']:,} validation images, with intervals of 95 %", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    more = f"; the first {len(rows)} of {len(ranking)} runs" if len(rows) < len(ranking) else ""
    axis.set_title(f"Dashed line: expected accuracy of the first run, corrected for the choice{more}", fontsize=8)
    return figure
