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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from upright.cores import count_cores
from upright.errors import BundleError, UserError
from upright.files import file_hash, replacing_file, write_text
from upright.image_paths import describe_others, find_images, list_files
from upright.options import Straighten
from upright.runtime.bundle import SUMS, Bundle
from upright.runtime.infer import Progress, read_names
from upright.runtime.predictor import OrientationPredictor
from upright.runtime.rotation import Resampling, parse_colour, rotate
from upright.runtime.task import Orientation

CSV = "straighten.csv"
RECORD = "straighten.json"
"""Name of the file with the settings of a run. Only a run with the same settings may resume."""
ACTIONS = ("rotated", "upright", "unsure", "error")


class Row(NamedTuple):
    """A row of the CSV.

    Args:
        path: absolute path of the source.
        copy: path of the copy, relative to the folder of the CSV.
        angle: estimated rotation in degrees anticlockwise; empty after an error.
        confidence: its confidence from 0 to 1; empty after an error.
        action: one of `ACTIONS`.
        how: ``lossless``, ``exif`` or ``resampled``; ``copied`` for a copy with the same bytes; empty without a copy.
        error: reason of an error.
    """

    path: str
    copy: str
    angle: str = ""
    confidence: str = ""
    action: str = "error"
    how: str = ""
    error: str = ""


class Group(NamedTuple):
    """Images whose copies have their paths relative to ``base``."""

    paths: list[Path]
    base: Path


class State:
    """The rows of this run and of the runs that it resumes.

    Args:
        rows: rows of earlier runs.
        replace: True to replace existing files.
        file: the open CSV.
    """

    def __init__(self, rows: Iterator[Row], replace: bool, file: IO[str]) -> None:
        self.replace, self.file = replace, file
        self.sources: set[str] = set()
        self.copies = {CSV, RECORD}
        self.counts: Counter[str] = Counter()
        for row in rows:
            self.write(row)
        file.flush()
        self.earlier = self.counts.total()

    def write(self, row: Row) -> None:
        csv.writer(self.file, lineterminator="\n").writerow(row)
        self.sources.add(row.path)
        self.copies.add(row.copy)
        self.counts[row.action] += 1


def straighten(options: Straighten) -> int:
    """Write an upright copy of each image, and one row per image.

    Returns:
        0, or 2 if any image has the action ``error``; 130 after Ctrl-C.

    Raises:
        BundleError: see `OrientationPredictor`.
        UserError: if an option is wrong, or the folder holds the copies of another run.
        EngineError: if onnxruntime fails.
        OSError: if a copy cannot be written.
    """
    straightener = Straightener(options)
    groups = _find(options)
    total = None
    if "-" not in options.inputs:
        groups = iter(all_groups := list(groups))  # report a wrong argument before anything is written
        total = sum(len(group.paths) for group in all_groups if isinstance(group, Group))
    progress = Progress(total)
    progress.visible = sys.stderr.isatty()
    stopped = False
    with _open_state(straightener) as state:

        def finish(row: Row) -> None:
            state.write(row)
            state.file.flush()
            progress.step()
            if row.error:
                progress.clear()
                print(f"upright: error: '{row.path}': {row.error}", file=sys.stderr)

        try:
            _run(straightener, groups, state, finish, progress.step)
        except KeyboardInterrupt:
            stopped = True
        finally:
            progress.clear()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name may have other bytes
    counts = ", ".join(f"{state.counts[action]:,} {action}" for action in ACTIONS)
    earlier = f" ({state.earlier:,} of them in earlier runs)" if state.earlier else ""
    print(f"{state.counts.total():,} images: {counts}{earlier}\n{straightener.to / CSV}")
    if stopped:
        print("upright: stopped. The same command resumes.", file=sys.stderr)
        return 130
    return 2 if state.counts["error"] else 0


class Straightener:
    """Straighten single images. Threads may share it.

    Args:
        options: options of the command.

    Raises:
        BundleError: see `OrientationPredictor`.
        UserError: if an option is wrong.
    """

    def __init__(self, options: Straighten) -> None:
        self.options, self.to = options, Path(str(options.to))
        self.resampling = Resampling(options.fit, parse_colour(options.background), options.quality)
        bundle = Bundle.open(options.bundle)
        if bundle.spec.classes:
            raise UserError(
                f"Bundle '{options.bundle}' classifies images; `straighten` needs a bundle without classes, which "
                "estimates the orientation."
            )
        # The threads of this command work on several images at a time.
        self.predictor = OrientationPredictor(bundle, options.precision, threads=1, max_pixels=options.max_pixels)
        self.threshold = _threshold(bundle) if options.threshold is None else options.threshold
        names = ("precision", "turns", "min_angle", "fit", "background", "quality", "max_pixels", "dry_run", "force")
        values = asdict(options)
        self.settings = {name: values[name] for name in names}
        self.settings |= {"bundle": file_hash(bundle.files / SUMS), "threshold": self.threshold}

    def __call__(self, path: Path, copy: Path, replace: bool) -> Row:
        """Write the copy of an image, at a path relative to the folder of the copies. Return its row."""
        row = Row(os.path.abspath(path), str(copy))
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.to)):
            return row._replace(error=f"It lies in --to '{self.to}'.")
        try:
            content = path.read_bytes()
        except OSError as error:
            return row._replace(error=f"{error.strerror}.")
        row, new = self._straighten(content, row)
        problem = "" if self.options.dry_run else self._write(path, self.to / copy, new, replace)
        return row._replace(action="error", how="", error=problem) if problem else row

    def _straighten(self, content: bytes, row: Row) -> tuple[Row, bytes]:
        row = row._replace(how="copied")
        try:
            orientation = self.predictor(content)
            row = row._replace(angle=f"{orientation.angle:.2f}", confidence=f"{orientation.confidence:.4f}")
            if not self.is_sure(orientation):
                return row._replace(action="unsure"), content
            turns, degrees = self.rotation(orientation.angle)
            if not turns and not degrees:
                return row._replace(action="upright"), content
            new, how = rotate(content, turns, degrees, self.resampling)
            return row._replace(action="rotated", how=how), new
        except UserError as error:
            return row._replace(error=str(error)), content

    def is_sure(self, orientation: Orientation) -> bool:
        return math.isfinite(orientation.angle) and orientation.confidence >= self.threshold

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


def _threshold(bundle: Bundle) -> float:
    """Return the threshold of the confidence in the manifest."""
    threshold = bundle.manifest.get("orientation", {}).get("threshold")
    if threshold is None:
        raise UserError(
            f"Bundle '{bundle.folder}' has no threshold of the confidence; give one by --threshold, from 0 to 1. "
            "`--threshold 0 --dry-run` lists the confidence of each image."
        )
    if not isinstance(threshold, int | float):
        raise BundleError(f"The threshold of bundle '{bundle.folder}' must be a number, got {threshold!r}.")
    return threshold


def _run(
    straightener: Straightener,
    groups: Iterator[Group | Row],
    state: State,
    finish: Callable[[Row], None],
    skip: Callable[[], None],
) -> None:
    """Straighten all images in threads, and pass their rows to ``finish`` in the order of the images.

    Threads suffice, because Pillow and onnxruntime compute without the interpreter lock. Other processes would go on
    writing after a kill of this one.
    """
    threads = straightener.options.threads or count_cores()
    waiting: deque[Future[Row]] = deque()

    def finish_first() -> None:
        waiting[0].result()  # Ctrl-C usually interrupts this line, and then the row is not lost
        finish(waiting.popleft().result())

    with ThreadPoolExecutor(threads) as executor:
        try:
            for path, copy in _flat(groups, finish):
                source = os.path.abspath(path)
                if source in state.sources:
                    skip()
                    continue
                if str(copy) in state.copies:
                    finish(Row(source, str(copy), error=f"'{copy}' in --to is the copy of another image."))
                    continue
                state.sources.add(source)
                state.copies.add(str(copy))
                if len(waiting) > 2 * threads:
                    finish_first()
                waiting.append(executor.submit(straightener, path, copy, state.replace))
            while waiting:
                finish_first()
        except KeyboardInterrupt:
            executor.shutdown(cancel_futures=True)  # and wait for the images in work
            while waiting and not waiting[0].cancelled():
                finish_first()
            raise
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _flat(groups: Iterator[Group | Row], finish: Callable[[Row], None]) -> Iterator[tuple[Path, Path]]:
    """Yield each source with the relative path of its copy."""
    for group in groups:
        if isinstance(group, Row):
            finish(group)
            continue
        for path in group.paths:
            yield path, Path(os.path.abspath(path)).relative_to(group.base)


def _find(options: Straighten) -> Iterator[Group | Row]:
    """Yield the images of each argument, and a row for each line of standard input without images.

    Raises:
        UserError: if an argument stands for no images, or lies in the folder of the copies or around it.
    """
    to = Path(os.path.realpath(str(options.to)))
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
        if Path(name).is_dir():
            if others := list_files(Path(name)).others:
                print(f"upright: warning: {describe_others(others)} They are not copied.", file=sys.stderr)
            yield Group(paths, Path(os.path.abspath(name)))
            continue
        for path in paths:
            absolute, here = Path(os.path.abspath(path)), Path.cwd()
            yield Group([path], here if absolute.is_relative_to(here) else Path(absolute.anchor))


@contextmanager
def _open_state(straightener: Straightener) -> Iterator[State]:
    """Open the CSV in the folder of the copies, for one process at a time.

    Raises:
        UserError: if another process writes to the folder, or if it holds the copies of another run.
    """
    to, settings = straightener.to, straightener.settings
    if to.exists() and not to.is_dir():
        raise UserError(f"--to '{to}' is a file; give a folder.")
    to.mkdir(parents=True, exist_ok=True)
    table, record = to / CSV, to / RECORD
    folder = os.open(to, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process writes to '{to}'; wait until it ends.") from None
        except OSError:
            pass  # a network folder without locks
        earlier = _read_record(table, record)
        resumes = earlier is not None and _resumes(to, earlier, settings)
        if not resumes:
            table.unlink(missing_ok=True)
            write_text(record, json.dumps(settings, indent=2) + "\n")
        replace = bool(earlier["force"] if resumes and earlier else settings["force"])
        with replacing_file(table) as new, open(new, "w", newline="", **ENCODING) as file:
            file.write(f"{','.join(Row._fields)}\n")
            state = State(_read_rows(table, settings["dry_run"]), replace, file)
        with open(table, "a", newline="", **ENCODING) as state.file:
            yield state
            os.fsync(state.file.fileno())
    finally:
        os.close(folder)


ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
"""File names may have bytes that are not text."""


def _read_record(table: Path, record: Path) -> dict[str, Any] | None:
    """Return the settings of the earlier run in a folder, or None without one."""
    if not record.exists() and not table.exists():
        return None
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and {"dry_run", "force"} <= settings.keys():
            return settings
    except (OSError, ValueError):
        pass
    raise UserError(f"'{record}' is missing or was changed, so '{table}' cannot be resumed; give another --to.")


def _resumes(to: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether a run resumes the earlier one in its folder. Otherwise it starts from scratch.

    Raises:
        UserError: if the settings differ, or if a dry run would replace the CSV of copies.
    """
    differing = [name for name in settings if name != "force" and earlier.get(name) != settings[name]]
    if settings["dry_run"] and not earlier["dry_run"]:
        raise UserError(f"'{to}' holds copies, and a dry run would replace their CSV; give another --to.")
    if settings["force"] or (differing and earlier["dry_run"]):
        return False
    if differing:
        changes = ", ".join(f"{name} {earlier.get(name)}, not {settings[name]}" for name in differing)
        raise UserError(
            f"'{to}' holds copies by other settings ({changes}); give another --to, or --force to replace the copies."
        )
    return True


def _read_rows(table: Path, dry_run: bool) -> Iterator[Row]:
    """Yield the rows of images whose copies exist. The other images are straightened again."""
    if not table.exists():
        return
    with open(table, newline="", **ENCODING) as file:
        for cells in csv.reader(file):
            # The header has no such action. A process that was killed may leave a part of a row.
            complete = len(cells) == len(Row._fields) and (row := Row(*cells)).action in ACTIONS and row.how
            if complete and (dry_run or (table.parent / row.copy).exists()):
                yield row
