"""``upright infer``: classify images with a bundle, or estimate their orientation."""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import ImageError, UserError
from upright.files import replacing_file
from upright.image_paths import find_images
from upright.images import Pixels
from upright.options import Infer
from upright.runtime.predictor import OrientationPredictor, Predictor, open_predictor, session_batches
from upright.runtime.task import Orientation, Prediction

BATCH = 64


def infer(options: Infer) -> int:
    """Print one line per image. Report images that cannot be read on standard error.

    Returns:
        0, or 2 if any image could not be read.

    Raises:
        BundleError: see `Predictor`.
        EngineError: if onnxruntime fails.
    """
    predictor = open_predictor(
        options.bundle,
        options.precision,
        threads=options.threads,
        providers=options.providers,
        max_pixels=options.max_pixels,
    )
    text = _text(predictor, options.top)
    predictor.check_outputs(options.outputs)
    main = predictor.task.output
    names = list(dict.fromkeys([main, *options.outputs]))
    table = Table(names) if options.npz else None
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
    if options.format == "csv":
        print(_csv_line("path", *text.columns))
    try:
        for batch in session_batches(predictor.session, images(), lambda image: image[1], BATCH):
            try:
                outputs = predictor.run_outputs(np.stack([pixels for _, pixels in batch]), names)
            except ImageError as error:
                for path, _ in batch:
                    report(ImageError(f"'{path}': {error}"))
                continue
            if table:
                table.add([path for path, _ in batch], outputs)
            for number, (path, _) in enumerate(batch):
                result: Any = predictor.task.result(outputs[main][number])
                if options.format == "csv":
                    print(_csv_line(path, *text.cells(result)))
                elif options.format == "jsonl":
                    extra = {name: outputs[name][number].tolist() for name in options.outputs}
                    record = {"path": str(path)} | text.record(result) | ({"outputs": extra} if extra else {})
                    print(json.dumps(record, ensure_ascii=False))
                else:
                    # The path comes last, so that its length does not shift the columns.
                    print(f"{text.line(result)}  {path}")
                progress.step()
            sys.stdout.flush()
    finally:
        progress.clear()
    if options.npz and table:
        table.write(Path(options.npz), predictor.spec.classes)
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


class Table:
    """Outputs of all images, in the order of their paths. They stay in memory until they are written.

    Args:
        names: names of the outputs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.paths: list[str] = []
        self.parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}

    def add(self, paths: Sequence[Path], outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        self.paths += map(str, paths)
        for name, parts in self.parts.items():
            parts.append(outputs[name])

    def write(self, target: Path, classes: Sequence[str]) -> None:
        """Write ``paths``, ``classes`` if there are any, and an array with one row per image for each output.

        Raises:
            UserError: if no image could be read.
        """
        if not self.paths:
            raise UserError(f"No image could be read, so '{target}' is not written.")
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        if classes:
            arrays["classes"] = list(classes)
        with replacing_file(target) as new, open(new, "wb") as file:
            np.savez_compressed(file, paths=self.paths, **arrays)


class Progress:
    """A progress bar on standard error. It is visible if standard error is a terminal and standard output is not.

    Args:
        total: number of images; None if it is unknown.
    """

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


class PredictionText:
    """Texts with the ``top`` most probable classes."""

    def __init__(self, classes: Sequence[str], top: int) -> None:
        self.top, self.width = top, max(map(len, classes))
        numbers = [""] if top == 1 else [f"_{rank}" for rank in range(1, top + 1)]
        self.columns = [f"{name}{number}" for number in numbers for name in ("label", "probability")]

    def line(self, result: Prediction) -> str:
        return "  ".join(f"{label:<{self.width}} {probability:.4f}" for label, probability in result.top(self.top))

    def cells(self, result: Prediction) -> list[str]:
        return [cell for label, probability in result.top(self.top) for cell in (label, f"{probability:.6f}")]

    def record(self, result: Prediction) -> dict[str, Any]:
        record: dict[str, Any] = {"label": result.label, "probability": result.probability}
        if self.top > 1:
            record["top"] = [{"label": label, "probability": p} for label, p in result.top(self.top)]
        return record


class OrientationText:
    """Texts with the angle in degrees anticlockwise, and its confidence."""

    columns = Orientation._fields

    def line(self, result: Orientation) -> str:
        return f"{result.angle:z7.2f}\N{DEGREE SIGN}  {result.confidence:.4f}"

    def cells(self, result: Orientation) -> list[str]:
        return [f"{result.angle:z.4f}", f"{result.confidence:.6f}"]

    def record(self, result: Orientation) -> dict[str, Any]:
        return result._asdict()


def _text(predictor: Predictor | OrientationPredictor, top: int | None) -> PredictionText | OrientationText:
    classes = predictor.spec.classes
    if classes:
        if top is not None and not 1 <= top <= len(classes):
            raise UserError(f"--top must be from 1 to {len(classes)} (the number of classes), got {top}.")
        return PredictionText(classes, top or 1)
    if top is not None:
        raise UserError(
            f"--top is for bundles with classes, and '{predictor.bundle.folder}' estimates the orientation; omit --top."
        )
    return OrientationText()


def _csv_line(*cells: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().removesuffix("\n")
