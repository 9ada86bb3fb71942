"""Answers from a bundle in Python."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from upright.errors import UprightError
from upright.images import MAX_PIXELS, Pixels, batches_of_one_size, decode
from upright.runtime.bundle import Bundle

Probabilities = npt.NDArray[np.float32]


class Prediction(NamedTuple):
    """The answer for one image.

    Args:
        label: the most probable class.
        probability: of that class.
        probabilities: of all classes, in the order of the spec.
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def top(self, count: int) -> list[tuple[str, float]]:
        """The ``count`` most probable classes, best first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


class Predictor:
    """Classify pictures with a bundle. Threads may share one.

    Args:
        bundle: the folder of a bundle, or one that is open.
        precision: which of its models; `Bundle.precisions` are there.
        threads: how many one run may use; as many as there are cores by default.

    Raises:
        UprightError: if the bundle is damaged (see `Bundle.open`), or has no model of that precision.
    """

    def __init__(self, bundle: str | Path | Bundle, precision: str = "fp32", threads: int = 0) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.spec = self.bundle.spec
        self.session = open_session(self.bundle.model(precision), threads)

    def __call__(self, image: str | Path | bytes | Image.Image | npt.ArrayLike) -> Prediction:
        """The answer for one path, bytes of a file, PIL image, or uint8 array ``(H, W)`` or ``(H, W, C)``."""
        return self.predict([image])[0]

    def predict(self, images: Sequence[Any], batch_size: int = 64) -> list[Prediction]:
        """Answers for many, in their order."""
        pixels = map(self.decode, images)
        return [self.answer(row) for row in self.probabilities(pixels, batch_size)]

    def decode(self, image: str | Path | bytes | Image.Image | npt.ArrayLike, max_pixels: int = MAX_PIXELS) -> Pixels:
        """See `images.decode`.

        Raises:
            UprightError: for what is no picture, and for one of another size, if the model takes one size alone.
        """
        pixels = decode(image, self.spec, max_pixels)
        _, *takes, _ = self.session.get_inputs()[0].shape
        if all(isinstance(n, int) for n in takes) and pixels.shape[:2] != tuple(takes):
            name = f"'{image}'" if isinstance(image, str | Path) else "The image"
            given, size = ("x".join(map(str, shape)) for shape in (pixels.shape[:2], takes))
            raise UprightError(
                f"{name} has {given} pixels, and this model was exported for {size} alone; resize it, or export "
                "without --size."
            )
        return pixels

    def answer(self, probabilities: Probabilities) -> Prediction:
        """Names for one row ``(K,)``."""
        named = dict(zip(self.spec.classes, map(float, probabilities), strict=True))
        label = max(named, key=named.__getitem__)
        return Prediction(label, named[label], named)

    def probabilities(self, pixels: Iterable[Pixels], batch_size: int = 64) -> Iterator[Probabilities]:
        """One row ``(K,)`` per decoded image; neighbours of one size go through the model together."""
        return run_session(self.session, pixels, batch_size)


def open_session(model: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """Onnxruntime on the CPU for an ONNX file.

    Args:
        model: its path, or its content.
        threads: how many one run may use; as many as there are cores by default.

    Raises:
        UprightError: if onnxruntime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Warnings about what the optimiser could not fold are not the user's business.
    options.log_severity_level = 3
    given = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        name = "the model" if isinstance(model, bytes) else f"'{model}'"
        raise UprightError(f"onnxruntime {onnxruntime.__version__} cannot load {name}: {error}") from error


def run_session(
    session: onnxruntime.InferenceSession, pixels: Iterable[Pixels], batch_size: int
) -> Iterator[Probabilities]:
    """See `Predictor.probabilities`."""
    fixed = session.get_inputs()[0].shape[0]
    most = min(batch_size, fixed) if isinstance(fixed, int) else batch_size
    for batch in batches_of_one_size(pixels, lambda image: image, most):
        (probabilities,) = run_batch(session, np.stack(batch))
        yield from probabilities


def run_batch(
    session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
) -> list[npt.NDArray[Any]]:
    """What a model says of ``images`` ``(B, H, W, C)``; one that takes a fixed number of them is given copies more.

    Raises:
        UprightError: for images of a size that it does not take.
    """
    fixed, count = session.get_inputs()[0].shape[0], len(images)
    if isinstance(fixed, int):
        images = images[np.arange(fixed) % count]
    try:
        return [output[:count] for output in session.run(list(outputs), {"images": images})]
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        size = "x".join(map(str, images.shape[1:]))
        raise UprightError(f"The model cannot take images of (H, W, C) {size}: {error}") from error
