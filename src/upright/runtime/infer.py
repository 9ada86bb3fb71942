"""``upright infer``: classify pictures with a bundle."""

import csv
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from upright.errors import UprightError, UserError
from upright.images import MAX_PIXELS, Pixels, find_images
from upright.runtime.predictor import CPU, Prediction, Predictor, run_batch, session_batches

BATCH = 64


def infer(
    bundle: str,
    images: Sequence[str],
    format: str = "table",
    top: int = 1,
    precision: str = "fp32",
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Print a line per picture; a bad one is reported on standard error, and the rest goes on.

    Args:
        bundle: the folder of a bundle.
        images: pictures, folders of pictures, patterns; ``-`` for paths on standard input, one per line.
        format: ``table``, ``jsonl`` or ``csv``.
        top: how many classes per picture.
        precision: which of the bundle's models.
        threads: see `Predictor`.
        providers: see `Predictor`.
        max_pixels: see `Predictor`.

    Returns:
        0, or 2 if any picture could not be read.
    """
    predictor = Predictor(bundle, precision, threads=threads, providers=providers, max_pixels=max_pixels)
    if not 1 <= top <= len(predictor.spec.classes):
        raise UserError(f"--top must be from 1 to {len(predictor.spec.classes)} (the number of classes), got {top}.")
    # What another process says comes when it comes.
    named = _find(images) if "-" in images else list(_find(images))
    progress = Progress(len(named) if isinstance(named, list) else None)
    failed = False

    def report(error: object) -> None:
        nonlocal failed
        failed = True
        progress.step()
        progress.clear()
        print(f"upright: error: {error}", file=sys.stderr)

    def pictures() -> Iterator[tuple[Path, Pixels]]:
        for path in named:
            try:
                if isinstance(path, UprightError):
                    raise path
                yield path, predictor.decode(path)
            except (UprightError, OSError) as error:
                report(error)

    # A name may be no text; JSON has its own sign for what is not.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    write = WRITERS[format](top, predictor.spec.classes)
    with warnings.catch_warnings():
        # What is wrong with a picture is said in a line of ours.
        warnings.filterwarnings("ignore", module="PIL")
        for batch in session_batches(predictor.session, pictures(), lambda picture: picture[1], BATCH):
            paths, pixels = zip(*batch, strict=True)
            try:
                (rows,) = run_batch(predictor.session, np.stack(pixels))
            except UprightError as error:
                for path in paths:
                    report(f"'{path}': {error}")
                continue
            for path, row in zip(paths, rows, strict=True):
                write(path, predictor.answer(row))
                progress.step()
            sys.stdout.flush()
    progress.clear()
    return 2 if failed else 0


def _find(images: Sequence[str]) -> Iterator[Path | UprightError]:
    """The pictures, and in their place what there is none for."""
    for given in images:
        lines = map(os.fsdecode, sys.stdin.buffer) if given == "-" else (given,)
        for name in filter(None, (line.rstrip("\r\n") for line in lines)):
            try:
                yield from find_images([name])
            except UprightError as error:
                yield error


class Progress:
    """A bar on standard error, where that is a terminal and the answers go elsewhere.

    Args:
        total: how many there will be, if that is known.
    """

    def __init__(self, total: int | None) -> None:
        self.shown = sys.stderr.isatty() and not sys.stdout.isatty()
        self.total, self.done = total, 0
        self.start = self.drawn = time.monotonic()

    def step(self) -> None:
        """One more; drawn ten times a second."""
        self.done += 1
        now = time.monotonic()
        if not self.shown or now - self.drawn < 0.1:
            return
        self.drawn, rate = now, self.done / (now - self.start)
        text = f"{self.done:,} images, {rate:,.0f} per second"
        if self.total:
            bar, left = "#" * (30 * self.done // self.total), (self.total - self.done) / rate
            text = f"[{bar:<30}] {self.done / self.total:.0%}, {text}, {left:.0f} s left"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the line to others."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


Writer = Callable[[Path, Prediction], None]


def _table(top: int, classes: Sequence[str]) -> Writer:
    widest = max(map(len, classes))

    def write(path: Path, prediction: Prediction) -> None:
        # The path last: whatever its length, the columns stay.
        answers = "  ".join(f"{label:<{widest}} {probability:.4f}" for label, probability in prediction.top(top))
        print(f"{answers}  {path}")

    return write


def _jsonl(top: int, classes: Sequence[str]) -> Writer:
    def write(path: Path, prediction: Prediction) -> None:
        record = {"path": str(path), "label": prediction.label, "probability": prediction.probability}
        if top > 1:
            record["top"] = [{"label": label, "probability": p} for label, p in prediction.top(top)]
        print(json.dumps(record, ensure_ascii=False))

    return write


def _csv(top: int, classes: Sequence[str]) -> Writer:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    numbers = [""] if top == 1 else [f"_{rank}" for rank in range(1, top + 1)]
    rows.writerow(["path", *(f"{column}{number}" for number in numbers for column in ("label", "probability"))])

    def write(path: Path, prediction: Prediction) -> None:
        answers = ((label, f"{probability:.6f}") for label, probability in prediction.top(top))
        rows.writerow([path, *(field for answer in answers for field in answer)])

    return write


WRITERS: dict[str, Callable[[int, Sequence[str]], Writer]] = {"table": _table, "jsonl": _jsonl, "csv": _csv}
