"""``upright infer``: classify pictures with a bundle."""

import csv
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from upright.errors import UprightError
from upright.images import Pixels, find_images
from upright.runtime.predictor import Prediction, Predictor


def infer(bundle: str, images: list[str], format: str = "table", top: int = 1, precision: str = "fp32") -> int:
    """Print a line per picture; a bad one is reported on standard error, and the rest goes on.

    Args:
        bundle: the folder of a bundle.
        images: pictures, and folders of pictures.
        format: ``table``, ``jsonl`` or ``csv``.
        top: how many classes per picture.
        precision: which of the bundle's models.

    Returns:
        0, or 2 if any picture could not be read.
    """
    predictor = Predictor(bundle, precision)
    if not 1 <= top <= len(predictor.spec.classes):
        raise UprightError(f"--top must be from 1 to {len(predictor.spec.classes)} (the number of classes), got {top}.")
    failed, read = False, []

    @contextmanager
    def reporting() -> Iterator[None]:
        nonlocal failed
        try:
            yield
        except (UprightError, OSError) as error:
            failed = True
            print(f"upright: error: {error}", file=sys.stderr)

    def pictures() -> Iterator[Pixels]:
        for name in images:
            paths: list[Path] = []
            with reporting():
                paths = list(find_images([name]))
            for path in paths:
                pixels = None
                with reporting():
                    pixels = predictor.decode(path)
                if pixels is not None:
                    read.append(path)
                    yield pixels

    write = WRITERS[format](top, predictor.spec.classes)
    with warnings.catch_warnings():
        # A picture over our own limit is reported by us.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for position, row in enumerate(predictor.probabilities(pictures())):
            write(read[position], predictor.answer(row))
    return 2 if failed else 0


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
