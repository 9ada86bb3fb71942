"""What a model takes for what, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from upright.files import replacing_file

MOST_NUMBERED = 20
"""A confusion matrix of more classes has no numbers in its cells."""
MOST_NAMED = 40
"""Of more classes only so many names are written."""


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Rows are the true classes; colours are shares of the row, numbers are counts.

    Args:
        counts: images of row's class that were taken for column's, ``(K, K)``.
        classes: names.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    number = len(classes)
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = max(3.5, min(0.45 * number + 1.5, 12))
    figure, axis = pyplot.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(0, number, -(-number // MOST_NAMED))
    names = [classes[tick][:14] for tick in ticks]
    axis.set_xticks(ticks, names, rotation=90, fontsize=8)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(f"{int(counts.diagonal().sum()):,} of {int(counts.sum()):,} right", fontsize=9)
    if number <= MOST_NUMBERED:
        for row, column in np.argwhere(counts.numpy() > 0).tolist():
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = str(int(counts[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    with replacing_file(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)
