"""Answers from a bundle in Python."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from upright.errors import UserError
from upright.images import MAX_PIXELS, Pixels, batches_of_one_size, decode
from upright.runtime.bundle import Bundle

Item = TypeVar("Item")
Probabilities = npt.NDArray[np.float32]
CPU = ("cpu",)


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
        threads: see `open_session`.
        providers: see `open_session`.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        UserError: if the bundle is damaged (see `Bundle.open`), has no model of that precision or one that does not
            take and give what the manifest says, or a provider is not there.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        precision: str = "fp32",
        *,
        threads: int | None = None,
        providers: Sequence[str] = CPU,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if max_pixels < 1:
            raise UserError(f"max_pixels must be at least 1, got {max_pixels}.")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.spec, self.max_pixels = self.bundle.spec, max_pixels
        self.session = open_session(self.bundle.model(precision), threads, providers)
        told = [
            (one.name, one.type, one.shape[-1:]) for one in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        takes, gives = (
            ("images", "tensor(uint8)", [self.spec.channels]),
            ("probabilities", "tensor(float)", [len(self.spec.classes)]),
        )
        if told[:2] != [takes, gives] or len(self.session.get_inputs()[0].shape) != 4:
            raise UserError(f"'{self.bundle.model(precision)}' is not the model of its manifest.")

    def __call__(self, image: str | Path | bytes | Image.Image | npt.ArrayLike) -> Prediction:
        """The answer for one path, bytes of a file, PIL image, or uint8 array ``(H, W)`` or ``(H, W, C)``."""
        return self.predict([image])[0]

    def predict(self, images: Sequence[Any], batch_size: int = 64) -> list[Prediction]:
        """Answers for many, in their order."""
        pixels = map(self.decode, images)
        return [self.answer(row) for row in self.probabilities(pixels, batch_size)]

    def decode(self, image: str | Path | bytes | Image.Image | npt.ArrayLike) -> Pixels:
        """See `images.decode`.

        Raises:
            UserError: for what is no picture, and for one of another size, if the model takes one size alone.
        """
        pixels = decode(image, self.spec, self.max_pixels)
        _, *takes, _ = self.session.get_inputs()[0].shape
        if all(isinstance(n, int) for n in takes) and pixels.shape[:2] != tuple(takes):
            name = f"'{image}'" if isinstance(image, str | Path) else "The image"
            given, size = ("x".join(map(str, shape)) for shape in (pixels.shape[:2], takes))
            raise UserError(
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


def find_providers(names: Sequence[str]) -> list[str]:
    """What onnxruntime calls its execution providers: ``CUDAExecutionProvider`` for ``cuda``, in any case.

    Raises:
        UserError: for one that this onnxruntime was not built with.
    """
    here = {_short(name): name for name in onnxruntime.get_available_providers()}
    for name in names:
        if _short(name) not in here:
            raise UserError(
                f"This onnxruntime ({onnxruntime.__version__}) has no provider '{name}', only {', '.join(here)}; other "
                "builds of it, like onnxruntime-gpu or onnxruntime-openvino, are installed in its place."
            )
    return [here[_short(name)] for name in names]


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def open_session(
    model: Path | bytes, threads: int | None = None, providers: Sequence[str] = CPU
) -> onnxruntime.InferenceSession:
    """Onnxruntime for an ONNX file.

    Args:
        model: its path, or its content.
        threads: how many one run may use; as many as there are cores by default.
        providers: of execution, best first: ``cuda``, ``tensorrt``, ``coreml``, ``openvino``, ... What none of them can
            do, the processor does.

    Raises:
        UserError: if onnxruntime refuses the file, or does not have a provider, or cannot start it.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}; without it, there are as many as cores.")
    wanted = find_providers(providers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Warnings about what the optimiser could not fold are not the user's business; errors are raised as well.
    options.log_severity_level = 4
    given = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(given, options, providers=wanted)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        name = "the model" if isinstance(model, bytes) else f"'{model}'"
        reason = " ".join(str(error).split())
        raise UserError(f"onnxruntime {onnxruntime.__version__} cannot load {name}: {reason}") from error
    # It goes on without one whose libraries are missing.
    if missing := set(wanted) - set(session.get_providers()):
        raise UserError(
            f"onnxruntime cannot start {', '.join(map(_short, missing))} here: its driver or libraries are missing."
        )
    return session


def session_batches(
    session: onnxruntime.InferenceSession, items: Iterable[Item], pixels: Callable[[Item], Pixels], batch_size: int
) -> Iterator[list[Item]]:
    """Neighbours that go through a model together: images of one size, no more than it takes."""
    fixed = session.get_inputs()[0].shape[0]
    return batches_of_one_size(items, pixels, min(batch_size, fixed) if isinstance(fixed, int) else batch_size)


def run_session(
    session: onnxruntime.InferenceSession, pixels: Iterable[Pixels], batch_size: int
) -> Iterator[Probabilities]:
    """See `Predictor.probabilities`."""
    for batch in session_batches(session, pixels, lambda image: image, batch_size):
        (probabilities,) = run_batch(session, np.stack(batch))
        yield from probabilities


def run_batch(
    session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
) -> list[npt.NDArray[Any]]:
    """What a model says of ``images`` ``(B, H, W, C)``; one that takes a fixed number of them is given copies more.

    Raises:
        UserError: for images of a size that it does not take.
    """
    fixed, count = session.get_inputs()[0].shape[0], len(images)
    if isinstance(fixed, int):
        images = images[np.arange(fixed) % count]
    try:
        return [output[:count] for output in session.run(list(outputs), {"images": images})]
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        size = "x".join(map(str, images.shape[1:]))
        reason = " ".join(str(error).split())
        raise UserError(f"The model cannot take images of (H, W, C) {size}: {reason}") from error
