"""``upright preview``: print statistics of a dataset, and draw its images before and after augmentation."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from upright.checkpoint import KEY, read_checkpoint
from upright.data.augmentation import Augmentation, Distortion
from upright.data.configs import build_data, read_data, set_arguments
from upright.data.datamodule import ImageDataModule
from upright.data.image_transforms import SEEDS
from upright.data.resized import ResizedImages
from upright.data.split import SPLITS, label_text
from upright.errors import UserError
from upright.examples import find_config
from upright.files import check_exists
from upright.images import Pixels
from upright.runs.drawing import Line, draw_tiles, pixels_of, save_png
from upright.training.model import Model

COLUMNS = 12
AUGMENTED_ROWS = 3
MAX_VIEW_ROWS = 6
MAX_CLASS_ROWS = 40
MAX_STATISTICS_IMAGES = 10_000
STATISTICS_CHUNK = 64


def preview(
    source: str,
    root: str | None = None,
    output: str = "preview.png",
    seed: int = 0,
    write_statistics: bool = False,
) -> int:
    """Print counts, sizes, mean and standard deviation, and draw images of every split.

    Args:
        source: a YAML of data or of an experiment, a checkpoint, or the folder of a run.
        root: folder of the data; it replaces the one in ``source``.
        output: path of the PNG.
        seed: seed of the augmentation.
        write_statistics: write mean and standard deviation into the YAML ``source``.

    Raises:
        UserError: if the data do not exist or cannot be read, or the YAML has no place for the statistics.
    """
    data = _data(find_config(source), root)
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output '{output}': there is no folder '{Path(output).parent}'; create it first.")
    if write_statistics and not isinstance(data, ResizedImages):
        raise UserError(f"--write-statistics: {type(data).__name__} has no options mean and std.")
    if write_statistics and not (Path(source).is_file() and Path(source).suffix in (".yaml", ".yml")):
        raise UserError(f"--write-statistics needs the path of a YAML of data, got '{source}'.")
    mean, std, count = _statistics(data)
    print(_table(data, mean, std, count), flush=True)
    for remark in data.remarks:
        print(f"Note: {remark}")
    draw(data, Path(output), seed)
    print(f"Plot: {output}")
    if write_statistics:
        set_arguments(Path(source), mean=_numbers(mean), std=_numbers(std))
        print(f"Statistics: mean and std in '{source}'")
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
        raise UserError(f"'{path}' does not record its training data; give a YAML of data.")
    return build_data(recipe, path, **options)


def _table(data: ImageDataModule, mean: list[float], std: list[float], count: int) -> str:
    spec, facts, manifest = data.spec, data.images.facts, data.manifest

    def row(title: str, cells: Iterable[str]) -> str:
        return f"{title if len(title) < 24 else title[:22] + '…':<24}{''.join(f'{cell:>10}' for cell in cells)}"

    classes = spec.classes[:MAX_CLASS_ROWS]
    lines = [row("class", SPLITS)]
    lines += [row(name, (f"{manifest.counts[split].get(name, 0):,}" for split in SPLITS)) for name in classes]
    if (more := len(spec.classes) - MAX_CLASS_ROWS) > 0:
        lines.append(f"... and {more} more")
    lines.append(row("all", (f"{len(data.splits[split]):,}" for split in SPLITS)))
    lines.append(row("views per image", (str(len(data.views(split).names)) for split in SPLITS)))
    used = facts[np.concatenate([data.splits[split] for split in SPLITS])]
    sizes = np.stack([used["height"], used["width"]])
    low, middle, high = (f"{h:.0f}x{w:.0f}" for h, w in (sizes.min(1), np.median(sizes, axis=1), sizes.max(1)))
    size = low if low == high else f"{low} to {high} (median height and width: {middle})"
    lines += [
        "",
        f"Image size: {size}. Network input: {spec.channels} x {spec.height} x {spec.width} ({spec.resize}).",
        f"Mean and standard deviation of {count:,} training images, before augmentation:",
        f"  measured  mean {_numbers(mean)}  std {_numbers(std)}",
        f"  declared  mean {_numbers(spec.mean)}  std {_numbers(spec.std)}",
    ]
    if spec.mask != "none":
        lines.append(f"The network sees every image through a mask: {spec.mask}.")
    return "\n".join(lines)


def _numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _statistics(data: ImageDataModule) -> tuple[list[float], list[float], int]:
    """Return mean and deviation of each channel of evenly spaced training images, from 0 to 1, and their number.

    A dataset with a distortion as its task distorts the images first.
    """
    samples = data.samples("train")
    task = Augmentation(part for part in data.augmentation.parts if isinstance(part, Distortion))
    chosen = torch.linspace(0, len(samples) - 1, min(len(samples), MAX_STATISTICS_IMAGES)).long()
    total = squares = torch.zeros(data.spec.channels, dtype=torch.float64)
    pixels = 0
    for part in torch.split(chosen, STATISTICS_CHUNK):
        images = task(samples[part].images).images.double() / 255
        total, squares = total + images.sum(dim=(0, 2, 3)), squares + images.square().sum(dim=(0, 2, 3))
        pixels += images[:, 0].numel()
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), std.tolist(), len(chosen)


def draw(data: ImageDataModule, path: Path, seed: int = 0) -> None:
    """Draw images of as many classes as possible for each split.

    The caption of an original is the name of its split. Augmented versions follow below the training images; the other
    splits are followed by their views. Both are drawn as the network sees them.
    """
    columns = min(COLUMNS, min(len(data.splits[split]) for split in SPLITS))
    images: list[Pixels] = []
    captions: list[list[Line]] = []
    model = Model(data.spec, nn.Identity())

    def add(title: str, row: list[Pixels], labels: list[str]) -> None:
        images.extend(row)
        captions.extend([Line(title), Line(label)] for label in labels)

    def inputs(batch: Tensor) -> list[Pixels]:
        return pixels_of(model.denormalise(model.normalise(batch)))

    for split in SPLITS:
        places = _of_many_classes(data, split, columns)
        indices = [int(data.splits[split][place]) for place in places]
        labels = [label_text(data.source.labels[index], data.kinds) for index in indices]
        add(split, [data.source.images[index] for index in indices], labels)
        views, samples = data.views(split), data.samples(split)
        if split == "train":
            batch = samples[torch.tensor(places)]
            torch.manual_seed(seed)
            for number in range(1, AUGMENTED_ROWS + 1):
                seeds = [hash((seed, number, place)) % SEEDS for place in places]
                transformed = data.image_transforms(batch.images, seeds)
                add(f"augmented {number}", inputs(data.augmentation(transformed).images), labels)
        else:
            for number, view in enumerate(views.names[:MAX_VIEW_ROWS]):
                batch = samples[torch.tensor(places) * len(views.names) + number]
                add(f"input, {view}{views.unit}" if view else "input", inputs(batch.images), labels)
    save_png(draw_tiles(type(data).__name__, images, captions, columns), path)


def _of_many_classes(data: ImageDataModule, split: str, count: int) -> list[int]:
    """Return positions in the split: the first image of every class, then the second, and so on."""
    labels = np.asarray(data.source.labels)[data.splits[split]]
    if labels.ndim == 2:
        labels = labels.argmax(axis=1)  # the first class of each image
    by_class = np.argsort(labels, kind="stable")
    rank = np.empty_like(by_class)
    rank[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    places: list[int] = np.lexsort((labels, rank))[:count].tolist()
    return places
