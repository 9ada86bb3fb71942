"""Sheets of images, confusion matrices and curves.

Pillow draws all but the curves, because matplotlib is ten times as slow.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.Image import Resampling, Transpose
from torch import Tensor

from upright.files import replacing_file
from upright.images import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, GREY, RED, BLUE = "black", "#666666", "#b3123a", (8, 64, 129)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
"""Colours of lines, which the colour-blind can distinguish too (Okabe and Ito 2008; grey in place of their black)."""
GAP, MARGIN, LINE, TITLE = 6, 10, 15, 26
"""Pixels between tiles, pixels around them, height of a line of text, and height of a title."""
MAX_TILE = 112
"""Maximum side of a tile in pixels."""
MAX_WIDTH = 1240
"""Maximum width of blocks of images in pixels, as long as a tile has a quarter of its maximum side."""
MAX_MATRIX = 720
"""Maximum side of a confusion matrix in pixels, as long as each class has at least one pixel."""
MAX_COLUMNS = 12
"""Maximum number of a transformer's epochs in a figure; of more epochs, this many are drawn, evenly spread."""


def save_png(plot: "Image.Image | Figure", path: Path) -> None:
    """Write a PNG, completely or not at all."""
    with replacing_file(path) as aside:
        if isinstance(plot, Image.Image):
            plot.save(aside, format="png", compress_level=3)
        else:
            plot.savefig(aside, format="png")


def pixels_of(images: Tensor) -> list[Pixels]:
    """Return images ``(B, C, H, W)`` with values 0 to 255 as uint8 arrays ``(H, W, C)``."""
    pixels: Pixels = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return list(pixels)


def evenly_spread(total: int, count: int) -> list[int]:
    """Return at most ``count`` evenly spread indices below ``total``, the first and the last included."""
    indices: list[int] = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    return indices


class Line(NamedTuple):
    """A line of text below an image."""

    text: str
    colour: str = BLACK


def caption(classes: Sequence[str], guess: int, confidence: float, label: int) -> list[Line]:
    """Return the lines of a prediction: the class with its confidence and, if it is wrong, the true class in red."""
    lines = [Line(f"{confidence:.0%} · {classes[guess]}")]
    return lines if guess == label else [*lines, Line(f"is {classes[label]}", RED)]


def draw_tiles(
    title: str, images: Sequence[Pixels], captions: Sequence[Sequence[Line]], columns: int = 8
) -> Image.Image:
    """Draw a sheet of images of any sizes, with lines of text below each, in at most ``columns`` columns."""
    rows = range(0, len(images), columns)
    blocks = [([images[start : start + columns]], captions[start : start + columns]) for start in rows]
    return draw_blocks(title, [""] * min(columns, len(images)), blocks, across=1)


def draw_blocks(
    title: str,
    headings: Sequence[str],
    blocks: Sequence[tuple[Sequence[Sequence[Pixels]], Sequence[Sequence[Line]]]],
    across: int = 2,
) -> Image.Image:
    """Draw blocks of images, at most ``across`` side by side, or one if they are wider than `MAX_WIDTH`.

    Args:
        title: the title of the sheet.
        headings: headings of the columns, the same for all blocks.
        blocks: for each block its rows, at most one image per heading, and the lines of text below each column.
        across: maximum number of blocks side by side.
    """
    room = min(MAX_TILE, max(MAX_TILE // 4, MAX_WIDTH // max(len(headings), 1) - GAP))
    side = _tile_side([pixels for rows, _ in blocks for row in rows for pixels in row], room)
    step, head = side + GAP, LINE + 2 if any(headings) else 0
    lines = max((len(caption) for _, captions in blocks for caption in captions), default=0)
    width = len(headings) * step + 2 * GAP
    height = max((len(rows) for rows, _ in blocks), default=0) * step + lines * LINE + 2 * GAP
    across = min(across, max(len(blocks), 1), max(1, MAX_WIDTH // width))
    sheet = _sheet(title, across * width - 3 * GAP, head + -(-len(blocks) // across) * height - GAP)
    for number, (rows, captions) in enumerate(blocks):
        corner, top = MARGIN + number % across * width, TITLE + head + number // across * height
        for column, lines_below in enumerate(captions):
            x = corner + column * step
            if number < across:
                _write(sheet, x + side // 2, TITLE, _truncate(headings[column], side), GREY)
            stack = draw_column([row[column] for row in rows], side)
            sheet.paste(stack, (x, top))
            for place, line in enumerate(lines_below):
                y = top + stack.height + 2 + place * LINE
                _write(sheet, x + side // 2, y, _truncate(line.text, side), line.colour)
    return sheet


def draw_column(images: Sequence[Pixels | None], side: int) -> Image.Image:
    """Draw images below each other, as a column for `draw_columns`; None leaves a gap."""
    column = Image.new("RGB", (side, len(images) * (side + GAP) - GAP), "white")
    for row, pixels in enumerate(images):
        if pixels is not None:
            _paste(column, pixels, 0, row * (side + GAP), side)
    return column


def draw_columns(
    title: str, labels: Sequence[str], columns: Mapping[str, Image.Image], *, first_apart: bool = True
) -> Image.Image:
    """Draw a transformer's inputs and outputs side by side, one column from `draw_column` per epoch or per angle.

    ``labels`` are those of the rows. With ``first_apart``, a gap follows the first column.
    """
    selected = [list(columns.items())[place] for place in evenly_spread(len(columns), MAX_COLUMNS + 1)]
    side, height = selected[0][1].size
    row = (height + GAP) // max(len(labels), 1)
    names = [_truncate(label, MAX_TILE) for label in labels]
    indent = MARGIN + int(max(map(_font().getlength, names), default=0)) + GAP
    sheet = _sheet(title, indent - MARGIN + len(selected) * (side + GAP), height + LINE + 2)
    top = TITLE + LINE + 2
    for number, name in enumerate(names):
        _write(sheet, indent - GAP, top + number * row + row // 2, name, anchor="rm")
    for number, (name, column) in enumerate(selected):
        x = indent + number * (side + GAP) + (GAP if number and first_apart else 0)
        _write(sheet, x + side // 2, TITLE, name, GREY)
        sheet.paste(column, (x, top))
    return sheet


def draw_confusion(title: str, counts: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix ``(K, K)``: rows are true classes, columns are predictions.

    Colours are shares of the row; numbers are counts. The number of correct predictions is added to the title.
    """
    counts, number = counts.cpu(), len(classes)
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    cell = max(1, min(36, MAX_MATRIX // number))
    numbered_cell = max(cell, int(_font().getlength(f"{int(counts.max())}")) + 8, 18)
    if numbered := numbered_cell * number <= MAX_MATRIX:
        cell = numbered_cell
    every = -(-LINE // cell)
    labelled = list(range(0, number, every))
    names = [_truncate(classes[place], MAX_TILE) for place in labelled]
    room = int(max(map(_font().getlength, names))) + GAP
    side = cell * number
    title = f"{title}: {int(counts.diagonal().sum()):,} of {int(counts.sum()):,} correct"
    beside = LINE + GAP + room
    sheet = _sheet(title, side + beside, side + beside)
    x, y = MARGIN + beside, TITLE
    shade = 255 - shares[..., None] * (255 - np.array(BLUE))
    sheet.paste(Image.fromarray(shade.round().astype(np.uint8)).resize((side, side), Resampling.NEAREST), (x, y))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + side, y + side), outline=GREY)
    for place, name in zip(labelled, names, strict=True):
        middle = place * cell + cell // 2
        _write(sheet, x - GAP, y + middle, name, anchor="rm")
        _write_upwards(sheet, name, x + middle, y + side + GAP)
    _write_upwards(sheet, "true", MARGIN + LINE // 2, y + side // 2 - 12, GREY)
    _write(sheet, x + side // 2, y + side + beside, "predicted", GREY, anchor="mb")
    if numbered:
        for row, column in np.argwhere(counts.numpy() > 0).tolist():
            colour = "white" if shares[row, column] > 0.5 else BLACK
            where = (x + column * cell + cell // 2, y + row * cell + cell // 2)
            _write(sheet, *where, str(int(counts[row, column])), colour, anchor="mm")
    return sheet


def _sheet(title: str, width: int, height: int) -> Image.Image:
    """Return a white sheet with a title, and ``width`` x ``height`` pixels of room below it."""
    width = max(width, int(_font(13).getlength(title))) + 2 * MARGIN
    sheet = Image.new("RGB", (width, TITLE + height + MARGIN), "white")
    _write(sheet, MARGIN, 5, title, anchor="la", size=13)
    return sheet


def _tile_side(images: Sequence[Pixels], room: int) -> int:
    """Return the side of a square of at most ``room`` pixels; small images are enlarged by whole numbers."""
    largest = max((max(pixels.shape[:2]) for pixels in images), default=room)
    return largest * (room // largest) or room


def _paste(sheet: Image.Image, pixels: Pixels, x: int, y: int, side: int) -> None:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    method = Resampling.LANCZOS if max(image.size) > side else Resampling.NEAREST
    image = ImageOps.contain(image, (side, side), method)
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


def _write(
    sheet: Image.Image, x: int, y: int, text: str, colour: str = BLACK, *, anchor: str = "ma", size: int = 11
) -> None:
    """Write a line of text. By default, the point is the middle of its upper edge."""
    ImageDraw.Draw(sheet).text((x, y), text, colour, _font(size), anchor=anchor)


def _write_upwards(sheet: Image.Image, text: str, middle: int, top: int, colour: str = BLACK) -> None:
    mask = Image.new("L", (int(_font().getlength(text)) + 2, LINE))
    ImageDraw.Draw(mask).text((1, LINE // 2), text, 255, _font(), anchor="lm")
    mask = mask.transpose(Transpose.ROTATE_90)
    sheet.paste(colour, (middle - LINE // 2, top), mask)


@cache
def _font(size: int = 11) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has no accents.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _truncate(text: str, width: int) -> str:
    """Return as much of the text as fits into ``width`` pixels."""
    start = text
    while start and _font().getlength(start if start == text else f"{start}…") > width:
        start = start[:-1]
    return start if start == text else f"{start}…"


def draw_curves(title: str, rows: Sequence[Mapping[str, str]]) -> "Figure":
    """Draw losses, main metrics, gradient norm and learning rates over the epochs, as recorded in ``metrics.csv``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in rows for name in row))
    rates = {tuple(row.get(name) for row in rows): name for name in reversed(names) if name.split("/")[0] == "lr"}
    panels = {
        "loss": ["train/loss", "val/loss", "train/upright_loss", "train/prior_loss"],
        "accuracy": ["val/accuracy", "val/map", "val/subset_accuracy"],
        "uprightness": ["val/uprightness"],
        "median deviation (degrees)": ["val/relative_degrees_median", "val/absolute_degrees_median"],
        "gradient norm": ["grad_norm/mean", "grad_norm/max"],
        # Groups that always had the same rate share one line.
        "learning rate": sorted(rates.values()),
    }
    panels = {panel: [name for name in lines if name in names] for panel, lines in panels.items()}
    panels = {panel: lines for panel, lines in panels.items() if lines}
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines_of_panels = -(-len(panels) // columns)
    wide, high = 3.5, 2.4
    figure = Figure(figsize=((wide + 0.7) * columns, (high + 0.6) * lines_of_panels + 0.3), dpi=100)
    figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(lines_of_panels, columns, squeeze=False).flat)
    # Room for labels and titles, in inches. An automatic layout draws everything twice.
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.6 / width, 0.3 / height, 1 - 0.15 / width, 1 - 0.6 / height, 0.7 / wide, 0.6 / high)
    for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
        for name in lines:
            points = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker="." if len(points) < 15 else "")
        axis.set_title(panel, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", scilimits=(-2, 4))
        axis.yaxis.get_offset_text().set_size(8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure
