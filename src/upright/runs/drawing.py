"""Sheets of images, confusion matrices and curves.

Pillow draws all but the curves, because matplotlib is ten times as slow.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.Image import Resampling, Transpose
from torch import Tensor

from upright.files import replacing_file
from upright.images import Pixels
from upright.runtime.task import QUARTER, deviation

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


class Line(NamedTuple):
    """A line of text below an image."""

    text: str
    colour: str = BLACK


def draw_tiles(
    title: str, images: Sequence[Pixels], captions: Sequence[Sequence[Line]], columns: int = 8
) -> Image.Image:
    """Draw a sheet of images with lines of text below each.

    Args:
        title: the title of the sheet.
        images: the images, of any sizes.
        captions: the lines of each image; all images have the same number of lines.
        columns: maximum number of columns.
    """
    side = _tile_side(images)
    columns = min(columns, max(len(images), 1))
    rows = -(-len(images) // columns)
    lines = max(map(len, captions), default=0)
    step, high = side + GAP, side + lines * LINE + GAP
    sheet, pen = _sheet(title, columns * step - GAP, rows * high - GAP)
    for place, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + place % columns * step, TITLE + place // columns * high
        _paste(sheet, pixels, x, y, side)
        for number, line in enumerate(caption):
            pen.text(
                (x + side // 2, y + side + 2 + number * LINE),
                _truncate(line.text, side),
                line.colour,
                _font(),
                anchor="ma",
            )
    return sheet


def draw_blocks(
    title: str, headings: Sequence[str], blocks: Sequence[tuple[Sequence[Sequence[Pixels]], Sequence[Line]]]
) -> Image.Image:
    """Draw blocks of images, two side by side, or one if two are wider than `MAX_WIDTH`.

    Args:
        title: the title of the sheet.
        headings: headings of the columns, the same for all blocks.
        blocks: for each block its rows of images, one image per heading, and a line of text below each column.
    """
    room = min(MAX_TILE, max(MAX_TILE // 4, MAX_WIDTH // len(headings) - GAP))
    side = _tile_side([pixels for rows, _ in blocks for row in rows for pixels in row], room)
    step = side + GAP
    width, height = len(headings) * step + 2 * GAP, len(blocks[0][0]) * step + LINE + 2 * GAP
    across = min(2, len(blocks), max(1, MAX_WIDTH // width))
    sheet, pen = _sheet(title, across * width - 3 * GAP, LINE + 2 + -(-len(blocks) // across) * height - GAP)
    for number, (rows, lines) in enumerate(blocks):
        corner, top = MARGIN + number % across * width, TITLE + LINE + 2 + number // across * height
        for column, (heading, line) in enumerate(zip(headings, lines, strict=True)):
            x = corner + column * step
            if number < across:
                pen.text((x + side // 2, TITLE), _truncate(heading, side), GREY, _font(), anchor="ma")
            stack = draw_column([row[column] for row in rows], side)
            sheet.paste(stack, (x, top))
            below = top + stack.height + 2
            pen.text((x + side // 2, below), _truncate(line.text, side), line.colour, _font(), anchor="ma")
    return sheet


def draw_turns(
    title: str, degrees: Sequence[int], blocks: Sequence[tuple[Tensor, Tensor, npt.NDArray[np.floating[Any]]]]
) -> Image.Image:
    """Draw images at several angles, and below each the image rotated back by its estimated angle.

    Args:
        title: the title of the sheet.
        degrees: the angles, anticlockwise, the same for all blocks.
        blocks: for each image its rotations, the results ``(A, C, H, W)``, and the answers ``(A, 2)``: angles and
            confidences. The line below has both; it is red for a wrong side.
    """
    drawn = []
    for before, after, answers in blocks:
        errors = deviation(answers[:, 0] - np.array(degrees))
        lines = [
            Line(f"{round(angle)}°/{sure:.0%}", RED if error >= QUARTER else BLACK)
            for (angle, sure), error in zip(answers.tolist(), errors.tolist(), strict=True)
        ]
        drawn.append(([pixels_of(before), pixels_of(after)], lines))
    return draw_blocks(title, [f"{angle}°" for angle in degrees], drawn)


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
    """Draw a transformer's inputs and outputs side by side, one column per epoch or per angle.

    Args:
        title: the title of the sheet.
        labels: labels of the rows, names of classes.
        columns: the columns, from `draw_column`, by their headings.
        first_apart: whether a gap separates the first column from the others.
    """
    indices = np.unique(np.linspace(0, len(columns) - 1, min(len(columns), MAX_COLUMNS + 1)).round().astype(int))
    selected = [list(columns.items())[place] for place in indices]
    side, height = selected[0][1].size
    row = (height + GAP) // max(len(labels), 1)
    names = [_truncate(label, MAX_TILE) for label in labels]
    indent = MARGIN + int(max(map(_font().getlength, names), default=0)) + GAP
    sheet, pen = _sheet(title, indent - MARGIN + len(selected) * (side + GAP), height + LINE + 2)
    top = TITLE + LINE + 2
    for number, name in enumerate(names):
        pen.text((indent - GAP, top + number * row + row // 2), name, BLACK, _font(), anchor="rm")
    for number, (name, column) in enumerate(selected):
        x = indent + number * (side + GAP) + (GAP if number and first_apart else 0)
        pen.text((x + side // 2, TITLE), name, GREY, _font(), anchor="ma")
        sheet.paste(column, (x, top))
    return sheet


def draw_confusion(title: str, counts: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: rows are true classes, columns are predictions.

    Colours are shares of the row; numbers are counts.

    Args:
        title: the title, to which the number of correct predictions is added.
        counts: images of the row's class that were predicted as the column's class, ``(K, K)``.
        classes: the names of the classes.
    """
    counts = counts.cpu()
    number = len(classes)
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    number_width = int(_font().getlength(f"{int(counts.max())}")) + 8
    cell = max(1, min(36, MAX_MATRIX // number))
    numbered = max(cell, number_width, 18) * number <= MAX_MATRIX
    if numbered:
        cell = max(cell, number_width, 18)
    every = -(-LINE // cell)
    labelled = list(range(0, number, every))
    names = [_truncate(classes[place], MAX_TILE) for place in labelled]
    room = int(max(map(_font().getlength, names))) + GAP
    side = cell * number
    title = f"{title}: {int(counts.diagonal().sum()):,} of {int(counts.sum()):,} correct"
    beside = LINE + GAP + room
    sheet, pen = _sheet(title, side + beside, side + beside)
    x, y = MARGIN + beside, TITLE
    shade = 255 - shares[..., None] * (255 - np.array(BLUE))
    sheet.paste(Image.fromarray(shade.round().astype(np.uint8)).resize((side, side), Resampling.NEAREST), (x, y))
    pen.rectangle((x - 1, y - 1, x + side, y + side), outline=GREY)
    for place, name in zip(labelled, names, strict=True):
        middle = place * cell + cell // 2
        pen.text((x - GAP, y + middle), name, BLACK, _font(), anchor="rm")
        _write_upwards(sheet, name, x + middle, y + side + GAP)
    _write_upwards(sheet, "true", MARGIN + LINE // 2, y + side // 2 - 12, GREY)
    pen.text((x + side // 2, y + side + beside), "predicted", GREY, _font(), anchor="mb")
    if numbered:
        for row, column in np.argwhere(counts.numpy() > 0).tolist():
            where = (x + column * cell + cell // 2, y + row * cell + cell // 2)
            colour = "white" if shares[row, column] > 0.5 else BLACK
            pen.text(where, str(int(counts[row, column])), colour, _font(), anchor="mm")
    return sheet


def _sheet(title: str, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a white sheet with a title, and ``width`` x ``height`` pixels of room below it."""
    width = max(width, int(_font(13).getlength(title))) + 2 * MARGIN
    sheet = Image.new("RGB", (width, TITLE + height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 5), title, BLACK, _font(13))
    return sheet, pen


def _tile_side(images: Sequence[Pixels], room: int = MAX_TILE) -> int:
    """Return the side of a square of at most ``room`` pixels; small images are enlarged by whole numbers."""
    largest = max((max(pixels.shape[:2]) for pixels in images), default=room)
    return largest * (room // largest) or room


def flat(pixels: Pixels) -> Pixels:
    """Return an image ``(H, W, C)`` as drawing libraries take it: ``(H, W)`` if C is 1."""
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def _paste(sheet: Image.Image, pixels: Pixels, x: int, y: int, side: int) -> None:
    image = Image.fromarray(flat(pixels))
    method = Resampling.LANCZOS if max(image.size) > side else Resampling.NEAREST
    image = ImageOps.contain(image, (side, side), method)
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


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
    """Draw the losses, the main metrics, gradient norm and learning rates over the epochs, as far as they are recorded.

    Args:
        title: the title of the figure.
        rows: the rows of ``metrics.csv``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in rows for name in row))
    rates = {tuple(row.get(name) for row in rows): name for name in reversed(names) if name.split("/")[0] == "lr"}
    panels = {
        "loss": ["train/loss", "val/loss", "train/upright_loss", "train/prior_loss"],
        "accuracy": ["val/accuracy"],
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
