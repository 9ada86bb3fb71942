"""``upright straighten``: write upright copies of images. The sources are never changed.

The CSV of the copies is also the state of a run. A row is written after its copy is complete. If the process is killed
in between, the next run computes the copy again, and accepts the existing one only if it has the same bytes.
"""

import csv
import fcntl
import json
import math
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from upright.cores import count_cores
from upright.errors import UserError
from upright.files import replacing_file, write_text
from upright.image_paths import describe_others, find_images, list_files
from upright.options import Straighten
from upright.runtime.bundle import Bundle
from upright.runtime.infer import Progress, read_names
from upright.runtime.predictor import OrientationPredictor
from upright.runtime.rotation import Resampling, parse_colour, rotate

CSV = "straighten.csv"
RECORD = "straighten.json"  # Name of the file with the settings of a run. Only a run with the same settings may resume.
ACTIONS = ("rotated", "upright", "unsure", "error")


class Row(NamedTuple):
    """A row of the CSV."""

    path: str  # absolute path of the source
    copy: str  # path of the copy, relative to the folder of the CSV
    angle: str = ""  # estimated rotation in degrees anticlockwise; empty after an error
    confidence: str = ""  # its confidence from 0 to 1; empty after an error
    action: str = "error"  # one of `ACTIONS`
    how: str = ""  # `lossless`, `exif` or `resampled`; `copied` for a copy with the same bytes; empty without a copy
    error: str = ""  # reason of an error


class Table:
    """The CSV with the rows of this run and of the runs that it resumes."""

    def __init__(self, rows: Iterable[Row], replace: bool, file: IO[str]) -> None:
        self.replace, self.file = replace, file
        self.sources: set[str] = set()
        self.copies = {CSV, RECORD}
        self.counts: Counter[str] = Counter()
        for row in rows:
            self.write(row)
        self.earlier = self.counts.total()

    def write(self, row: Row) -> None:
        csv.writer(self.file, lineterminator="\n").writerow(row)
        self.file.flush()
        self.sources.add(row.path)
        self.copies.add(row.copy)
        self.counts[row.action] += 1


def straighten(options: Straighten) -> int:
    """Write an upright copy of each image, and one row per image.

    Returns:
        0, or 2 if any image has the action ``error``; 130 after Ctrl-C.
    """
    straightener = Straightener(options)
    rows: Iterable[Row] = _find(options)
    progress = Progress(None)
    if "-" not in options.inputs:
        rows = list(rows)  # report a wrong argument before anything is written
        progress = Progress(len(rows))
    progress.visible = sys.stderr.isatty()
    stopped = False
    with _open_table(straightener) as table:
        try:
            _run(straightener, rows, table, progress)
        except KeyboardInterrupt:
            stopped = True
        finally:
            progress.clear()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name may have other bytes
    counts = ", ".join(f"{table.counts[action]:,} {action}" for action in ACTIONS)
    earlier = f" ({table.earlier:,} of them in earlier runs)" if table.earlier else ""
    print(f"{table.counts.total():,} images: {counts}{earlier}\n{straightener.to / CSV}")
    if stopped:
        print("upright: stopped. The same command resumes.", file=sys.stderr)
        return 130
    return 2 if table.counts["error"] else 0


class Straightener:
    """Straighten single images. Threads may share it."""

    def __init__(self, options: Straighten) -> None:
        self.options, self.to = options, Path(options.to)
        self.resampling = Resampling(options.fit, parse_colour(options.background), options.quality)
        bundle = Bundle.open(options.bundle, options.key, options.expect)
        # The threads of this command work on several images at a time.
        self.predictor = OrientationPredictor(bundle, options.precision, threads=1, max_pixels=options.max_pixels)
        threshold = bundle.threshold if options.threshold is None else options.threshold
        if threshold is None:
            raise UserError(
                f"Bundle '{bundle.folder}' has no threshold of the confidence; give one by --threshold, from 0 to 1. "
                "`--threshold 0 --dry-run` lists the confidence of each image."
            )
        self.threshold = threshold
        names = ("precision", "turns", "min_angle", "fit", "background", "quality", "max_pixels", "dry_run", "force")
        self.settings = {name: getattr(options, name) for name in names}
        self.settings |= {"bundle": bundle.digest, "threshold": threshold}

    def __call__(self, row: Row, replace: bool) -> Row:
        """Write the copy of an image. Complete the row, unless it has an error."""
        if row.error:
            return row
        path, target = Path(row.path), self.to / row.copy
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.to)):
            return row._replace(error=f"It lies in --to '{self.to}'.")
        try:
            content = path.read_bytes()
        except OSError as error:
            return row._replace(error=f"{error.strerror}.")
        row, new = self._straighten(content, row)
        problem = "" if self.options.dry_run else self._write(path, target, new, replace)
        return row._replace(action="error", how="", error=problem) if problem else row

    def _straighten(self, content: bytes, row: Row) -> tuple[Row, bytes]:
        row = row._replace(how="copied")
        try:
            orientation = self.predictor(content)
            row = row._replace(angle=f"{orientation.angle:.2f}", confidence=f"{orientation.confidence:.4f}")
            if not (math.isfinite(orientation.angle) and orientation.confidence >= self.threshold):
                return row._replace(action="unsure"), content
            turns, degrees = self.rotation(orientation.angle)
            if not turns and not degrees:
                return row._replace(action="upright"), content
            new, how = rotate(content, turns, degrees, self.resampling)
            return row._replace(action="rotated", how=how), new
        except UserError as error:
            return row._replace(error=str(error)), content

    def rotation(self, angle: float) -> tuple[int, float]:
        """Return the quarter turns clockwise, 0 to 3, and the further degrees that make an image upright."""
        turns = round(angle / 90)
        degrees = angle - 90 * turns
        if self.options.turns == "4" or abs(degrees) < self.options.min_angle:
            degrees = 0.0
        return turns % 4, degrees

    def _write(self, path: Path, target: Path, content: bytes, replace: bool) -> str:
        """Write a copy with the times and permissions of its source. Return a reason if its place is taken."""
        if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(self.to)):
            return f"A link leads from '{target.parent}' out of --to."
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not replace:
            # A process that was killed wrote the copy, but not its row.
            same = target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content
            return "" if same else f"'{target}' exists with another content; --force replaces it."
        with replacing_file(target) as new:
            new.write_bytes(content)
            with suppress(OSError):  # not all file systems store times and permissions
                shutil.copystat(path, new)
        return ""


def _run(straightener: Straightener, rows: Iterable[Row], table: Table, progress: Progress) -> None:
    """Straighten all images in threads, and write their rows in the order of the images.

    Threads suffice, because Pillow and onnxruntime compute without the interpreter lock. Other processes would go on
    writing after a kill of this one.
    """
    threads = straightener.options.threads or count_cores()
    waiting: deque[Future[Row]] = deque()

    def finish_first() -> None:
        waiting[0].result()  # Ctrl-C usually interrupts this line, and then the row is not lost
        row = waiting.popleft().result()
        table.write(row)
        progress.step()
        if row.error:
            progress.clear()
            print(f"upright: error: '{row.path}': {row.error}", file=sys.stderr)

    with ThreadPoolExecutor(threads) as executor:
        try:
            for row in rows:
                if row.path in table.sources:
                    progress.step()
                    continue
                if row.copy in table.copies and not row.error:
                    row = row._replace(error=f"'{row.copy}' in --to is the copy of another image.")
                table.sources.add(row.path)
                table.copies.add(row.copy)
                if len(waiting) > 2 * threads:
                    finish_first()
                waiting.append(executor.submit(straightener, row, table.replace))
            while waiting:
                finish_first()
        except BaseException as error:
            executor.shutdown(cancel_futures=True)  # and wait for the images in work
            while isinstance(error, KeyboardInterrupt) and waiting and not waiting[0].cancelled():
                finish_first()
            raise


def _find(options: Straighten) -> Iterator[Row]:
    """Yield a row for each image, and one with an error for each line of standard input without images."""
    to = Path(os.path.realpath(options.to))
    for name in read_names(options.inputs):
        try:
            real = Path(os.path.realpath(name))
            if real.is_relative_to(to) or (real.is_dir() and to.is_relative_to(real)):
                raise UserError(f"--to '{options.to}' and the input '{name}' overlap; give a folder outside of it.")
            paths = list(find_images([name]))
        except UserError as error:
            if "-" not in options.inputs:
                raise
            yield Row(os.path.abspath(name), "", error=str(error))
            continue
        folder = Path(name) if Path(name).is_dir() else None
        if folder and (others := list_files(folder).others):
            print(f"upright: warning: {describe_others(others)} They are not copied.", file=sys.stderr)
        base = Path(os.path.abspath(folder or "."))
        for path in (Path(os.path.abspath(path)) for path in paths):
            yield Row(str(path), str(path.relative_to(base if path.is_relative_to(base) else path.anchor)))


@contextmanager
def _open_table(straightener: Straightener) -> Iterator[Table]:
    """Open the CSV in the folder of the copies, for one process at a time."""
    to, settings = straightener.to, straightener.settings
    if to.exists() and not to.is_dir():
        raise UserError(f"--to '{to}' is a file; give a folder.")
    to.mkdir(parents=True, exist_ok=True)
    folder = os.open(to, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process writes to '{to}'; wait until it ends.") from None
        except OSError:
            pass  # a network folder without locks
        earlier = _earlier_settings(to, settings)
        if earlier is None:
            (to / CSV).unlink(missing_ok=True)
            write_text(to / RECORD, json.dumps(settings, indent=2) + "\n")
        with replacing_file(to / CSV) as new, open(new, "w", newline="", **ENCODING) as file:
            file.write(f"{','.join(Row._fields)}\n")
            table = Table(_read_rows(to, settings["dry_run"]), (earlier or settings)["force"], file)
        with open(to / CSV, "a", newline="", **ENCODING) as table.file:
            yield table
            os.fsync(table.file.fileno())
    finally:
        os.close(folder)


ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
"""File names may have bytes that are not text."""


def _earlier_settings(to: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the run in the folder that this one resumes, or None if this run starts from scratch."""
    if not (to / RECORD).exists() and not (to / CSV).exists():
        return None
    try:
        earlier: dict[str, Any] = json.loads((to / RECORD).read_text(encoding="utf-8"))
        was_dry_run, _ = earlier["dry_run"], earlier["force"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"'{to / RECORD}' is missing or was changed, so '{to / CSV}' cannot be resumed; give another --to."
        ) from None
    differing = [name for name in settings if name != "force" and earlier.get(name) != settings[name]]
    if settings["dry_run"] and not was_dry_run:
        raise UserError(f"'{to}' holds copies, and a dry run would replace their CSV; give another --to.")
    if settings["force"] or (differing and was_dry_run):
        return None
    if differing:
        changes = ", ".join(f"{name} {earlier.get(name)}, not {settings[name]}" for name in differing)
        raise UserError(
            f"'{to}' holds copies by other settings ({changes}); give another --to, or --force to replace the copies."
        )
    return earlier


def _read_rows(to: Path, dry_run: bool) -> Iterator[Row]:
    """Yield the rows of images whose copies exist. The other images are straightened again."""
    if not (to / CSV).exists():
        return
    with open(to / CSV, newline="", **ENCODING) as file:
        for cells in csv.reader(file):
            # The header has no such action. A process that was killed may leave a part of a row.
            complete = len(cells) == len(Row._fields) and (row := Row(*cells)).action in ACTIONS and row.how
            if complete and (dry_run or (to / row.copy).exists()):
                yield row
