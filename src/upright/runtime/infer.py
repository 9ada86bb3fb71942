"""``upright infer``: classify images with a bundle, or estimate their orientation."""

import csv
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upright.errors import ImageError, UserError
from upright.files import replacing_file
from upright.image_paths import find_images
from upright.images import Pixels
from upright.options import Infer
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import AnyPredictor, open_predictor, session_batches
from upright.runtime.task import JOIN, LabelSet, Orientation, Prediction

BATCH = 64


def infer(options: Infer) -> int:
    """Print one line per image. Report images that cannot be read on standard error, and then return 2."""
    predictor = open_predictor(
        Bundle.open(options.bundle, options.key, options.expect),
        options.precision,
        threads=options.threads,
        providers=options.providers,
        engine=options.engine,
        max_pixels=options.max_pixels,
    )
    top, classes, main = _top(predictor, options.top), predictor.spec.classes, predictor.task.output
    width = max(map(len, classes), default=0)
    predictor.check_outputs(options.outputs)
    names = list(dict.fromkeys([main, *options.outputs]))
    stored: dict[str, list[Any]] = {name: [] for name in ("paths", *names)}  # for --npz
    # Paths on standard input may arrive one by one, so do not wait for all of them.
    paths = _find(options.images) if "-" in options.images else list(_find(options.images))
    progress = Progress(len(paths) if isinstance(paths, list) else None)
    failures = 0

    def report(error: Exception) -> None:
        nonlocal failures
        failures += 1
        progress.step()
        progress.clear()
        print(f"upright: error: {error}", file=sys.stderr)

    def images() -> Iterator[tuple[Path, Pixels]]:
        for path in paths:
            if isinstance(path, UserError):
                report(path)
                continue
            try:
                pixels = predictor.decode(path)
            except (UserError, OSError) as error:
                report(error)
            else:
                yield path, pixels

    # Escape bytes of file names that are not text.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    write_row = csv.writer(sys.stdout, lineterminator="\n").writerow
    if options.format == "csv":
        ranks = [""] if top == 1 else [f"_{rank}" for rank in range(1, top + 1)]
        columns = [f"{name}{rank}" for rank in ranks for name in ("label", "probability")]
        several = predictor.task.name == "multilabel"
        write_row(["path", *(["labels", *classes] if several else columns if classes else Orientation._fields)])
    try:
        for batch in session_batches(predictor.session, images(), lambda image: image[1], BATCH):
            try:
                outputs = predictor.run_outputs(np.stack([pixels for _, pixels in batch]), names)
            except ImageError as error:
                for path, _ in batch:
                    report(ImageError(f"'{path}': {error}"))
                continue
            if options.npz:
                stored["paths"] += [str(path) for path, _ in batch]
                for name in names:
                    stored[name].append(outputs[name])
            for number, (path, _) in enumerate(batch):
                line, cells, record = _texts(predictor.task.result(outputs[main][number]), top, width)
                if options.format == "csv":
                    write_row([path, *cells])
                elif options.format == "jsonl":
                    extra = {name: outputs[name][number].tolist() for name in options.outputs}
                    record = {"path": str(path)} | record | ({"outputs": extra} if extra else {})
                    print(json.dumps(record, ensure_ascii=False))
                else:
                    # The path comes last, so that its length does not shift the columns.
                    print(f"{line}  {path}")
                progress.step()
            sys.stdout.flush()
    finally:
        progress.clear()
    if options.npz:
        if not stored["paths"]:
            raise UserError(f"No image could be read, so '{options.npz}' is not written.")
        arrays: dict[str, Any] = {name: np.concatenate(stored[name]) for name in names} | (
            {"classes": classes} if classes else {}
        )
        with replacing_file(Path(options.npz)) as new, open(new, "wb") as file:
            np.savez_compressed(file, paths=stored["paths"], **arrays)
    return 2 if failures else 0


def read_names(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments. ``-`` stands for the lines of standard input."""
    for argument in arguments:
        lines = map(os.fsdecode, sys.stdin.buffer) if argument == "-" else (argument,)
        yield from filter(None, (line.rstrip("\r\n") for line in lines))


def _find(images: Sequence[str]) -> Iterator[Path | UserError]:
    """Yield the paths of images, and an error for each argument or line without images."""
    for name in read_names(images):
        try:
            yield from find_images([name])
        except UserError as error:
            yield error


class Progress:
    """A progress bar on standard error. It is visible if standard error is a terminal and standard output is not."""

    def __init__(self, total: int | None) -> None:
        self.visible = sys.stderr.isatty() and not sys.stdout.isatty()
        self.total, self.count = total, 0
        self.start = self.drawn = time.monotonic()

    def step(self) -> None:
        """Count one image, and draw the bar up to ten times a second."""
        self.count += 1
        now = time.monotonic()
        if not self.visible or now - self.drawn < 0.1:
            return
        self.drawn, rate = now, self.count / (now - self.start)
        text = f"{self.count:,} images, {rate:,.0f} per second"
        if self.total:
            bar, seconds = "#" * (30 * self.count // self.total), (self.total - self.count) / rate
            text = f"[{bar:<30}] {self.count / self.total:.0%}, {text}, {seconds:.0f} s left"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _texts(result: Prediction | LabelSet | Orientation, top: int, width: int) -> tuple[str, list[str], dict[str, Any]]:
    """Return a result, with its ``top`` classes, as a line of the table, as cells of CSV, and as an object of JSON."""
    if isinstance(result, Orientation):
        angle, confidence = result
        line = f"{angle:z7.2f}\N{DEGREE SIGN}  {confidence:.4f}"
        return line, [f"{angle:z.4f}", f"{confidence:.6f}"], result._asdict()
    if isinstance(result, LabelSet):
        line = "  ".join(f"{label} {probability:.4f}" for label, probability in result.labels.items()) or "-"
        cells = [JOIN.join(result.labels), *(f"{probability:.6f}" for probability in result.probabilities.values())]
        return line, cells, result._asdict()
    ranked = result.top(top)
    line = "  ".join(f"{label:<{width}} {probability:.4f}" for label, probability in ranked)
    record: dict[str, Any] = {"label": result.label, "probability": result.probability}
    if top > 1:
        record["top"] = [{"label": label, "probability": probability} for label, probability in ranked]
    return line, [cell for label, probability in ranked for cell in (label, f"{probability:.6f}")], record


def _top(predictor: AnyPredictor, top: int | None) -> int:
    """Check the option --top."""
    classes = len(predictor.spec.classes)
    if top is not None and predictor.task.name != "classification":
        other = "finds several classes per image" if classes else "estimates the orientation"
        raise UserError(
            f"--top is for bundles with one class per image, and '{predictor.bundle.folder}' {other}; omit --top."
        )
    if top is not None and not 1 <= top <= classes:
        raise UserError(f"--top must be from 1 to {classes} (the number of classes), got {top}.")
    return top or 1
