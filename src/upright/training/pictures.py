"""Pictures of a run: its curves, what it confuses, and the mistakes it is surest of."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upright.files import replacing_file

MOST_NUMBERED = 20
"""A confusion matrix of more classes has no numbers in its cells, and no room for all names."""


@contextmanager
def _drawn(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw into; the PNG is there when all is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield axes
        with replacing_file(path) as aside:
            figure.savefig(aside, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def draw_curves(metrics: Path, path: Path) -> None:
    """Every metric of ``metrics.csv`` against the epoch: one panel per name, training and validation together.

    Args:
        metrics: the file, one row per epoch.
        path: of the PNG.
    """
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    panels: dict[str, list[str]] = {}
    for name in (name for name in rows[-1] if name not in ("epoch", "step", "seconds")):
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with _drawn(path, lines, columns, (4 * columns, 2.8 * lines)) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
            for name in names:
                points = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend(fontsize=8)


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Rows are the true classes; colours are shares of the row, numbers are counts.

    Args:
        counts: ``(K, K)``, true class by predicted class.
        classes: names.
        path: of the PNG.
    """
    number = len(classes)
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = max(3.5, min(0.45 * number + 1.5, 12))
    with _drawn(path, 1, 1, (side, side)) as axes:
        axis = axes[0, 0]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        every = max(1, -(-number // (2 * MOST_NUMBERED)))
        ticks = range(0, number, every)
        names = [classes[tick][:14] for tick in ticks]
        axis.set_xticks(ticks, names, rotation=90, fontsize=8)
        axis.set_yticks(ticks, names, fontsize=8)
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title(f"{int(counts.diagonal().sum()):,} of {int(counts.sum()):,} right", fontsize=9)
        if number <= MOST_NUMBERED:
            for row, column in np.argwhere(counts.numpy() > 0).tolist():
                colour = "white" if shares[row, column] > 0.6 else "black"
                text = f"{int(counts[row, column])}"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def draw_mistakes(
    images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], path: Path, columns: int = 8
) -> None:
    """Images with the true class, and the predicted one with its probability, surest first.

    Args:
        images: uint8 ``(N, C, H, W)``.
        labels: ``(N,)``.
        probabilities: ``(N, K)``.
        classes: names.
        path: of the PNG.
        columns: pictures in a row.
    """
    sure, predicted = probabilities.max(dim=1)
    lines = max(1, -(-len(images) // columns))
    with _drawn(path, lines, columns, (1.25 * columns, 1.65 * lines + 0.3)) as axes:
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False)
        axes[0, 0].figure.suptitle("Mistakes, surest first: true class, below it the prediction", fontsize=9)
        for axis, place in zip(axes.flat, torch.argsort(sure, descending=True).tolist(), strict=False):
            axis.imshow(images[place].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(classes[int(labels[place])][:14], fontsize=8, pad=2)
            text = f"{classes[int(predicted[place])][:14]} {sure[place]:.0%}"
            axis.set_xlabel(text, fontsize=8, labelpad=2, color="crimson")
