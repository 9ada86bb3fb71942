"""Answers from a bundle in Python."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from upright.errors import UprightError
from upright.images import Pixels, batches_of_one_size, decode
from upright.runtime.bundle import MODEL, Bundle

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
        bundle: the folder of a bundle.

    Raises:
        UprightError: if the bundle is damaged, see `Bundle.open`.
    """

    def __init__(self, bundle: str | Path) -> None:
        self.bundle = Bundle.open(bundle)
        self.spec = self.bundle.spec
        self.session = open_session(self.bundle.folder / MODEL)

    def __call__(self, image: str | Path | bytes | Image.Image | npt.ArrayLike) -> Prediction:
        """The answer for one path, bytes of a file, PIL image, or uint8 array ``(H, W)`` or ``(H, W, C)``."""
        return self.predict([image])[0]

    def predict(self, images: Sequence[Any], batch_size: int = 64) -> list[Prediction]:
        """Answers for many, in their order."""
        pixels = (decode(image, self.spec) for image in images)
        return [self.answer(row) for row in self.probabilities(pixels, batch_size)]

    def answer(self, probabilities: Probabilities) -> Prediction:
        """Names for one row ``(K,)``."""
        named = dict(zip(self.spec.classes, map(float, probabilities), strict=True))
        label = max(named, key=named.__getitem__)
        return Prediction(label, named[label], named)

    def probabilities(self, pixels: Iterable[Pixels], batch_size: int = 64) -> Iterator[Probabilities]:
        """One row ``(K,)`` per decoded image; neighbours of one size go through the model together."""
        return run_session(self.session, pixels, batch_size)


def open_session(model: Path) -> onnxruntime.InferenceSession:
    """Onnxruntime on the CPU for an ONNX file.

    Raises:
        UprightError: if onnxruntime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    # Warnings about what the optimiser could not fold are not the user's business.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise UprightError(f"onnxruntime {onnxruntime.__version__} cannot load '{model}': {error}") from error


def run_session(
    session: onnxruntime.InferenceSession, pixels: Iterable[Pixels], batch_size: int
) -> Iterator[Probabilities]:
    """See `Predictor.probabilities`."""
    for batch in batches_of_one_size(pixels, lambda image: image, batch_size):
        try:
            (probabilities,) = session.run(["probabilities"], {"images": np.stack(batch)})
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            shape = "x".join(map(str, batch[0].shape))
            raise UprightError(f"The model cannot take images of (H, W, C) {shape}: {error}") from error
        yield from probabilities
