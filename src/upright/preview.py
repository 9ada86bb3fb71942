"""``upright preview``: what a network will be fed, as one picture and in figures."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling

from upright.checkpoint import KEY, read_checkpoint
from upright.data.augmentation import Augmentation, Distortion
from upright.data.configs import build_data, read_data
from upright.data.datamodule import ImageDataModule
from upright.data.split import SPLITS
from upright.errors import UserError
from upright.files import check_exists
from upright.images import Pixels
from upright.runs.drawing import pixels_of, save_picture

COLUMNS = 10
COPIES = 3
MOST_VIEWS = 6
CELL, GAP = 96, 4
STEP = CELL + GAP
"""Pixels of a picture in the sheet, between two, and from one to the next."""
MOST_CLASSES = 40
"""So many rows the table of classes has at most."""
MOST_MEASURED = 10_000
"""So many images mean and deviation are taken of at most."""


def preview(source: str, root: str | None = None, output: str = "preview.png", seed: int = 0) -> int:
    """Print counts, sizes, mean and deviation, and draw images of every split as they come and as they are fed.

    Args:
        source: a YAML of data or of an experiment, a checkpoint, or the folder of a run.
        root: where the data are, in place of what ``source`` says.
        output: the PNG.
        seed: of the augmented copies.

    Raises:
        UserError: if there are no such data, or they cannot be read.
    """
    data = _data(Path(source), root)
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output '{output}': there is no folder '{Path(output).parent}'.")
    print(_table(data), flush=True)
    for remark in data.remarks:
        print(f"Note: {remark}")
    draw(data, Path(output), seed)
    print(f"Picture: {output}")
    return 0


def _data(path: Path, root: str | None) -> ImageDataModule:
    check_exists(
        path, "a YAML like configs/data/digits.yaml or configs/lenet.yaml, a checkpoint, or the folder of a run"
    )
    options = {"root": root} if root else {}
    if path.suffix in (".yaml", ".yml"):
        return read_data(path, **options)
    recipe = read_checkpoint(path)[KEY]["data"]
    if recipe is None:
        raise UserError(f"'{path}' does not say what data it was trained with.")
    return build_data(recipe, path, **options)


def _table(data: ImageDataModule) -> str:
    spec, facts, manifest = data.spec, data.images.facts, data.manifest
    lines = [f"{'class':<24}{''.join(f'{split:>10}' for split in SPLITS)}"]
    for name in spec.classes[:MOST_CLASSES]:
        counts = (manifest.counts[split].get(name, 0) for split in SPLITS)
        lines.append(f"{_short(name, 23):<24}{''.join(f'{count:>10,}' for count in counts)}")
    if (more := len(spec.classes) - MOST_CLASSES) > 0:
        lines.append(f"... and {more} more")
    lines.append(f"{'all':<24}{''.join(f'{len(data.splits[split]):>10,}' for split in SPLITS)}")
    lines.append(f"{'views of each':<24}{''.join(f'{len(data.views(split).names):>10}' for split in SPLITS)}")
    used = facts[np.concatenate([data.splits[split] for split in SPLITS])]
    sizes = np.stack([used["height"], used["width"]])
    low, middle, high = (f"{h:.0f}x{w:.0f}" for h, w in (sizes.min(1), np.median(sizes, axis=1), sizes.max(1)))
    came = low if low == high else f"from {low} to {high} (median of each {middle})"
    mean, std, count = _measured(data)
    lines += [
        "",
        f"Images come as {came}; the network sees {spec.channels} x {spec.height} x {spec.width} ({spec.resize}).",
        f"Mean and deviation of {count:,} training images, before augmentation:",
        f"  measured  mean {_numbers(mean)}  std {_numbers(std)}",
        f"  declared  mean {_numbers(spec.mean)}  std {_numbers(spec.std)}",
    ]
    return "\n".join(lines)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _measured(data: ImageDataModule) -> tuple[list[float], list[float], int]:
    """Per channel, on the scale of 0 to 1, of evenly spaced training images, distorted if that is the task."""
    samples = data.samples("train")
    task = Augmentation(part for part in data.augmentation.parts if isinstance(part, Distortion))
    chosen = torch.linspace(0, len(samples) - 1, min(len(samples), MOST_MEASURED)).long()
    total = squares = torch.zeros(data.spec.channels, dtype=torch.float64)
    pixels = 0
    for part in torch.split(chosen, 64):
        images = task(samples[part].images).images.double() / 255
        total, squares = total + images.sum(dim=(0, 2, 3)), squares + images.square().sum(dim=(0, 2, 3))
        pixels += images[:, 0].numel()
    mean = total / pixels
    return mean.tolist(), (squares / pixels - mean.square()).clamp(min=0).sqrt().tolist(), len(chosen)


def draw(data: ImageDataModule, path: Path, seed: int = 0) -> None:
    """A contact sheet: images of as many classes as there is room for, per split.

    Training images as they came, and some augmented copies; of the others every view, as the network sees it.

    Args:
        data: what is drawn.
        path: of the PNG.
        seed: of the augmented copies.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, min(len(data.splits[split]) for split in SPLITS))
    rows: list[tuple[str, list[Pixels], list[str]]] = []
    for split in SPLITS:
        chosen = _of_many_classes(data, split, columns)
        indices = [int(data.splits[split][place]) for place in chosen]
        labels = [data.spec.classes[data.source.labels[index]] for index in indices]
        rows.append((f"{split}, as it came", [data.source.images[index] for index in indices], labels))
        views, samples = data.views(split), data.samples(split)
        if split == "train":
            batch = samples[torch.tensor(chosen)]
            torch.manual_seed(seed)
            for _ in range(COPIES):
                rows.append(("augmented", pixels_of(data.augmentation(batch.images).images), []))
        else:
            for number, view in enumerate(views.names[:MOST_VIEWS]):
                batch = samples[torch.tensor(chosen) * len(views.names) + number]
                rows.append((f"as fed, {view}{views.unit}" if view else "as fed", pixels_of(batch.images), []))
    sheet = Image.new("L" if data.spec.channels == 1 else "RGB", (columns * STEP, 0), "white")
    tops = []
    for _, pictures, labels in rows:
        # Room for the names of the classes.
        top = sheet.height + (GAP * 6 if labels else GAP)
        sheet = ImageOps.expand(sheet, (0, 0, 0, top + CELL - sheet.height), "white")
        tops.append(top)
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            smaller = max(picture.size) > CELL
            picture = ImageOps.contain(picture, (CELL, CELL), Resampling.LANCZOS if smaller else Resampling.NEAREST)
            left = column * STEP + (CELL - picture.width) // 2
            sheet.paste(picture, (left, top + (CELL - picture.height) // 2))
    margin, dpi = 140, 100
    width, height = sheet.width + margin, sheet.height + GAP
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    figure.figimage(np.asarray(sheet), margin, GAP, cmap="gray", vmin=0, vmax=255)
    for (title, _, labels), top in zip(rows, tops, strict=True):
        middle = 1 - (top + CELL / 2) / height
        figure.text((margin - 2 * GAP) / width, middle, title, ha="right", va="center", fontsize=9)
        for column, label in enumerate(labels):
            x, y = (margin + column * STEP + CELL / 2) / width, 1 - (top - GAP) / height
            figure.text(x, y, _short(label, 14), ha="center", va="bottom", fontsize=8)
    save_picture(figure, path)


def _of_many_classes(data: ImageDataModule, split: str, count: int) -> list[int]:
    """Places in the split: the first image of every class, then the second, and so on."""
    labels = np.asarray(data.source.labels)[data.splits[split]]
    seen: dict[int, int] = {}
    rank = []
    for label in labels.tolist():
        rank.append(seen.get(label, 0))
        seen[label] = rank[-1] + 1
    order: list[int] = np.lexsort((labels, np.array(rank)))[:count].tolist()
    return order
