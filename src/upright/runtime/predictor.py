"""Predictions from a bundle in Python."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt
import onnxruntime

from upright.errors import BundleError, EngineError, ImageError, UserError
from upright.images import MAX_PIXELS, ImageSource, Pixels, batches_of_one_size, decode
from upright.runtime.bundle import Bundle

Item = TypeVar("Item")
Probabilities = npt.NDArray[np.float32]
Errors = Literal["raise", "return"]
CPU = ("cpu",)


class Prediction(NamedTuple):
    """The prediction for one image.

    Args:
        label: the most probable class.
        probability: probability of that class.
        probabilities: probabilities of all classes, in the order of the spec.
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the ``count`` most probable classes with their probabilities, the most probable first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


class Predictor:
    """Classify images with a bundle. Threads may share a predictor, and another process can unpickle it.

    Args:
        bundle: the folder or the archive of a bundle, or an open one.
        precision: ``fp32``, or ``fp16`` or ``int8`` if the bundle has it.
        threads: threads per run; by default the number of cores.
        providers: execution providers of onnxruntime, best first: ``cpu``, ``cuda``, ``tensorrt``, ``openvino``, ...
        max_pixels: limit on the pixels of an image; a larger image is refused before it is decoded.

    Raises:
        BundleError: if the bundle is damaged, has no model of that precision, or its model does not fit its manifest.
        UserError: if a provider is not installed, or a number is out of range.
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
        self._settings: dict[str, Any] = {
            "precision": precision,
            "threads": threads,
            "providers": providers,
            "max_pixels": max_pixels,
        }
        model = self.bundle.model(precision)
        self.session = open_session(model, threads, providers)
        ends = [*self.session.get_inputs(), *self.session.get_outputs()][:2]
        expected = [
            ("images", "tensor(uint8)", 4, self.spec.channels),
            ("probabilities", "tensor(float)", 2, len(self.spec.classes)),
        ]
        if [(end.name, end.type, len(end.shape), end.shape[-1]) for end in ends] != expected:
            raise BundleError(f"The inputs and outputs of '{model}' do not match the manifest.")

    def __reduce__(self) -> tuple[Callable[[], "Predictor"], tuple[()]]:
        # A session cannot be pickled. The other process opens the bundle and checks it again.
        return partial(type(self), self.bundle.folder.absolute(), **self._settings), ()

    def __call__(self, image: ImageSource) -> Prediction:
        """Classify one image: a path, the content of a file, an open file, a PIL image, or a uint8 array."""
        return self.predict([image])[0]

    @overload
    def predict(self, images: Iterable[ImageSource], batch_size: int = 64) -> list[Prediction]: ...

    @overload
    def predict(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors
    ) -> list[Prediction | ImageError]: ...

    def predict(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors = "raise"
    ) -> Sequence[Prediction | ImageError]:
        """Classify many images, in their order. `stream` has the arguments."""
        return list(self.stream(images, batch_size, errors=errors))

    @overload
    def stream(self, images: Iterable[ImageSource], batch_size: int = 64) -> Iterator[Prediction]: ...

    @overload
    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors
    ) -> Iterator[Prediction | ImageError]: ...

    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors = "raise"
    ) -> Iterator[Prediction | ImageError]:
        """Yield the prediction for each image of an iterable, in their order. Only one batch is in memory.

        Args:
            images: the images, see `upright.images.decode`. They may come from a generator without an end.
            batch_size: largest batch; neighbours of the same size form one. With 1, each image is classified at once.
            errors: ``raise`` the error of an image that cannot be classified, or ``return`` it in the place of its
                prediction.

        Raises:
            ImageError: if an image cannot be classified, unless ``errors`` is ``return``.
            EngineError: if onnxruntime fails.
        """

        def decode_or_error(image: ImageSource) -> Pixels | ImageError:
            try:
                return self.decode(image)
            except ImageError as error:
                if errors == "raise":
                    raise
                return error

        for broken, group in groupby(map(decode_or_error, images), lambda item: isinstance(item, ImageError)):
            if broken:
                yield from cast(Iterator[ImageError], group)
                continue
            for batch in session_batches(self.session, cast(Iterator[Pixels], group), lambda image: image, batch_size):
                try:
                    rows = self.run(np.stack(batch))
                except ImageError as error:
                    if errors == "raise":
                        raise
                    yield from [error] * len(batch)
                else:
                    yield from map(self.prediction, rows)

    def decode(self, image: ImageSource) -> Pixels:
        """Decode an image to uint8 ``(H, W, C)`` at its own size.

        Raises:
            ImageError: if it cannot be decoded, or if the model accepts only images of another size.
        """
        pixels = decode(image, self.spec, self.max_pixels)
        _, *size, _ = self.session.get_inputs()[0].shape
        if all(isinstance(side, int) for side in size) and pixels.shape[:2] != tuple(size):
            name = f"'{image}'" if isinstance(image, str | Path) else "The image"
            raise ImageError(
                f"{name} has {_size(pixels.shape[:2])} pixels, but this model only accepts {_size(size)}; "
                "resize the image, or export without --size."
            )
        return pixels

    def prediction(self, probabilities: Probabilities) -> Prediction:
        """Return the prediction for one row of probabilities ``(K,)``."""
        by_class = dict(zip(self.spec.classes, map(float, probabilities), strict=True))
        label = max(by_class, key=by_class.__getitem__)
        return Prediction(label, by_class[label], by_class)

    def probabilities(self, pixels: Iterable[Pixels], batch_size: int = 64) -> Iterator[Probabilities]:
        """Yield one row ``(K,)`` per decoded image. Neighbours of the same size form a batch."""
        for batch in session_batches(self.session, pixels, lambda image: image, batch_size):
            yield from self.run(np.stack(batch))

    def run(self, images: npt.NDArray[np.uint8]) -> Probabilities:
        """Return probabilities ``(B, K)`` of decoded images ``(B, H, W, C)``.

        Raises:
            ImageError: if the network does not accept images of this size.
            EngineError: if onnxruntime fails.
        """
        try:
            return run_batch(self.session, images)[0]
        except EngineError as error:
            if self._accepts_training_size(images.shape):
                size = _size(images.shape[1:3])
                raise ImageError(f"The model does not accept images of {size} pixels: {error}") from error
            raise

    def _accepts_training_size(self, shape: tuple[int, ...]) -> bool:
        """Return whether the model runs on as many pixels at the size of its training images.

        This distinguishes a wrong size from a failure of the engine, because onnxruntime raises the same exception for
        both. Only a network without resizing can refuse a size.
        """
        batch, height, width, channels = shape
        spec = self.spec
        if spec.resize != "none" or (height, width) == (spec.height, spec.width):
            return False
        count = -(-batch * height * width // (spec.height * spec.width))
        try:
            run_batch(self.session, np.zeros((count, spec.height, spec.width, channels), np.uint8))
        except EngineError:
            return False
        return True


def open_session(
    model: Traversable | bytes, threads: int | None = None, providers: Sequence[str] = CPU
) -> onnxruntime.InferenceSession:
    """Open an ONNX file with onnxruntime.

    Args:
        model: path or content of the file, or a file in an archive.
        threads: number of threads per run; by default the number of cores.
        providers: execution providers, best first: ``cuda``, ``tensorrt``, ``coreml``, ``openvino``, ... The processor
            runs the operators that none of them supports.

    Raises:
        BundleError: if onnxruntime cannot load the file.
        UserError: if a provider is not installed or cannot start.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}; without it, there are as many as cores.")
    full_names = find_providers(providers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Do not log constants that the optimiser could not fold. Errors are also raised as exceptions.
    options.log_severity_level = 4
    try:
        content = model if isinstance(model, bytes) else str(model) if isinstance(model, Path) else model.read_bytes()
        session = onnxruntime.InferenceSession(content, options, providers=full_names)
    except Exception as error:  # onnxruntime's exceptions have no other common base
        name = "the model" if isinstance(model, bytes) else f"'{model}'"
        reason = " ".join(str(error).split())
        raise BundleError(f"onnxruntime {onnxruntime.__version__} cannot load {name}: {reason}") from error
    # onnxruntime only warns about a provider whose libraries are missing.
    if missing := set(full_names) - set(session.get_providers()):
        names = ", ".join(map(_short, missing))
        raise UserError(f"onnxruntime cannot start the provider {names}: its driver or libraries are missing.")
    return session


def find_providers(names: Sequence[str]) -> list[str]:
    """Return onnxruntime's names of execution providers: ``CUDAExecutionProvider`` for ``cuda``, in any case.

    Raises:
        UserError: if this build of onnxruntime does not have one.
    """
    available = {_short(name): name for name in onnxruntime.get_available_providers()}
    for name in names:
        if _short(name) not in available:
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} has no provider '{name}', only {', '.join(available)}; "
                "install another build of it in its place, such as onnxruntime-gpu or onnxruntime-openvino."
            )
    return [available[_short(name)] for name in names]


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def _size(lengths: Iterable[int]) -> str:
    return "x".join(map(str, lengths))


def fixed_batch(session: onnxruntime.InferenceSession) -> int | None:
    """Return the only batch size that a model accepts, or None if it accepts any."""
    batch = session.get_inputs()[0].shape[0]
    return batch if isinstance(batch, int) else None


def session_batches(
    session: onnxruntime.InferenceSession, items: Iterable[Item], pixels: Callable[[Item], Pixels], batch_size: int
) -> Iterator[list[Item]]:
    """Yield batches for a model: neighbours of the same size, at most as many as the model accepts."""
    return batches_of_one_size(items, pixels, min(batch_size, fixed_batch(session) or batch_size))


def run_session(
    session: onnxruntime.InferenceSession, pixels: Iterable[Pixels], batch_size: int
) -> Iterator[Probabilities]:
    """Yield one row of probabilities ``(K,)`` per decoded image, see `run_batch`."""
    for batch in session_batches(session, pixels, lambda image: image, batch_size):
        yield from run_batch(session, np.stack(batch))[0]


def run_batch(
    session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8], outputs: Sequence[str] = ("probabilities",)
) -> list[npt.NDArray[Any]]:
    """Run a model on ``images`` ``(B, H, W, C)``. Images are repeated to fill the batch of a fixed batch size.

    Raises:
        ImageError: if the model was exported for another size or another number of channels.
        EngineError: if onnxruntime fails.
    """
    count, shape = len(images), _size(images.shape[1:])
    allowed = session.get_inputs()[0].shape[1:]
    if any(isinstance(n, int) and n != m for n, m in zip(allowed, images.shape[1:], strict=True)):
        raise ImageError(f"The model does not accept images of (H, W, C) {shape}, only {_size(allowed)}.")
    if batch := fixed_batch(session):
        images = images[np.arange(batch) % count]
    try:
        return [output[:count] for output in session.run(list(outputs), {"images": images})]
    except Exception as error:  # onnxruntime's exceptions have no other common base
        reason = " ".join(str(error).split())
        raise EngineError(f"onnxruntime failed on {count} images of (H, W, C) {shape}: {reason}") from error
