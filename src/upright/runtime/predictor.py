"""Predictions from a bundle in Python."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import onnxruntime

from upright.cores import count_cores
from upright.errors import BundleError, EngineError, GateError, ImageError, UserError, one_line
from upright.images import MAX_BATCH_PIXELS, MAX_PIXELS, ImageSource, Pixels, TaskName, batches_of_one_size, decode
from upright.options import Engine
from upright.runtime.bundle import Bundle
from upright.runtime.openvino import OpenVINOSession
from upright.runtime.task import LabelSet, Orientation, Prediction, Rows

Item = TypeVar("Item")
Result = TypeVar("Result", bound=Prediction | LabelSet | Orientation)
Errors = Literal["raise", "return"]
ABILITY: dict[TaskName, str] = {
    "classification": "classifies images",
    "multilabel": "finds several classes per image",
    "orientation": "estimates the orientation",
}
INT8_HINT = (
    " On a processor without instructions for 8-bit products (VNNI), sums of full-range weights saturate: "
    "export without --full-range, or use another precision on this machine."
)
CPU = ("cpu",)
CPU_PROVIDER = "CPUExecutionProvider"


class BundlePredictor(Generic[Result]):
    """Predict with a bundle. Threads may share a predictor, and another process can unpickle it.

    Args:
        bundle: the folder or the archive of a bundle, or an open one.
        precision: ``fp32``, or ``fp16`` or ``int8`` if the bundle has it.
        threads: threads per run; by default the number of cores that this process may use.
        providers: execution providers of onnxruntime, best first: ``cpu``, ``cuda``, ``tensorrt``, ``openvino``, ...
        max_pixels: limit on the pixels of an image; a larger image is refused before it is decoded.
        engine: ``onnxruntime``, or ``openvino``, which first has to reproduce the predictions for the samples.

    Raises:
        BundleError: if the bundle is damaged, has no model of that precision, or its model does not fit its manifest.
        UserError: if the engine or a provider is not installed, a number is out of range, or the bundle is for another
            task.
        EngineError: if OpenVINO cannot load the model.
        GateError: if OpenVINO gives other predictions for the samples.
    """

    task_name: TaskName

    def __init__(
        self,
        bundle: str | Path | Bundle,
        precision: str = "fp32",
        *,
        threads: int | None = None,
        providers: Sequence[str] = CPU,
        max_pixels: int = MAX_PIXELS,
        engine: Engine = "onnxruntime",
    ) -> None:
        if max_pixels < 1:
            raise UserError(f"max_pixels must be at least 1, got {max_pixels}.")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.spec, self.max_pixels = self.bundle.spec, max_pixels
        self.precision, self.engine = precision, engine
        self.task = self.bundle.task
        if self.task.name != self.task_name:
            raise UserError(
                f"Bundle '{self.bundle.folder}' {ABILITY[self.task.name]}; give one that {ABILITY[self.task_name]}. In "
                "Python, upright.open_predictor opens any bundle."
            )
        options: dict[str, Any] = dict(threads=threads, providers=providers, max_pixels=max_pixels, engine=engine)
        place = self.bundle.folder.absolute(), self.bundle.digest
        self._reopen = partial(_reopen, type(self), *place, precision, **options)
        model = self.bundle.model(precision)
        self.session = open_session(model, threads, providers, engine)
        ends = [*self.session.get_inputs(), *self.session.get_outputs()][:2]
        expected = [
            ("images", "tensor(uint8)", 4, self.spec.channels),
            (self.task.output, "tensor(float)", 2, self.task.columns),
        ]
        if [(end.name, end.type, len(end.shape), end.shape[-1]) for end in ends] != expected:
            raise BundleError(f"The inputs and outputs of '{model}' do not match the manifest.")
        if engine != "onnxruntime":  # `export` has run onnxruntime on all validation images
            self.check_samples()

    def __reduce__(self) -> tuple[Callable[[], "BundlePredictor[Result]"], tuple[()]]:
        # A session cannot be pickled. The other process opens the bundle, and checks that it is the same one.
        return self._reopen, ()

    def __call__(self, image: ImageSource) -> Result:
        """Return the result for one image: a path, the content of a file, an open file, a PIL image, an array."""
        return self.predict([image])[0]

    @overload
    def predict(self, images: Iterable[ImageSource], batch_size: int = 64) -> list[Result]: ...

    @overload
    def predict(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors
    ) -> list[Result | ImageError]: ...

    def predict(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors = "raise"
    ) -> Sequence[Result | ImageError]:
        """Return the results for many images, in their order. `stream` has the arguments."""
        return list(self.stream(images, batch_size, errors=errors))

    @overload
    def stream(self, images: Iterable[ImageSource], batch_size: int = 64) -> Iterator[Result]: ...

    @overload
    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors
    ) -> Iterator[Result | ImageError]: ...

    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 64, *, errors: Errors = "raise"
    ) -> Iterator[Result | ImageError]:
        """Yield the result for each image of an iterable, in their order. Only one batch is in memory.

        Args:
            images: the images, see `upright.images.decode`. They may come from a generator without an end.
            batch_size: largest batch; neighbours of the same size form one. With 1, each image is answered at once.
            errors: ``raise`` the error of an image that cannot be used, or ``return`` it in the place of its
                result.

        Raises:
            ImageError: if an image cannot be used, unless ``errors`` is ``return``.
            EngineError: if the engine fails.
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
                    yield from cast(Iterator[Result], map(self.task.result, rows))

    def outputs(
        self, images: Sequence[Any], names: Sequence[str] | None = None, batch_size: int = 64
    ) -> dict[str, npt.NDArray[Any]]:
        """Return outputs of the graph for many images, each with one row per image.

        Args:
            images: at least one image, in the forms that a call takes.
            names: names of outputs, such as ``theta``; by default all of `output_names`.
            batch_size: images per run.

        Raises:
            ImageError: if an image cannot be decoded.
            UserError: if the graph does not have an output, or there are no images.
        """
        if not len(images):
            raise UserError("outputs needs at least one image, got none.")
        self.check_outputs(names := self.output_names if names is None else names)
        pixels = map(self.decode, images)
        batches = session_batches(self.session, pixels, lambda image: image, batch_size)
        parts = [self.run_outputs(np.stack(batch), names) for batch in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs of the graph. The first one is that of the task."""
        return [output.name for output in self.session.get_outputs()]

    def check_outputs(self, names: Iterable[str]) -> None:
        """Raise a `UserError` if the graph does not have one of these outputs."""
        for name in names:
            if name not in self.output_names:
                raise UserError(
                    f"The model has no output '{name}', only {', '.join(self.output_names)}; "
                    "`upright export --outputs` adds outputs to a bundle."
                )

    def decode(self, image: ImageSource, reserve: Callable[[int], None] | None = None) -> Pixels:
        """Decode an image to uint8 ``(H, W, C)`` at its own size. `upright.images.decode` explains ``reserve``.

        Raises:
            ImageError: if it cannot be decoded, or if the model accepts only images of another size.
        """
        pixels = decode(image, self.spec, self.max_pixels, reserve)
        _, *size, _ = self.session.get_inputs()[0].shape
        if all(isinstance(side, int) for side in size) and pixels.shape[:2] != tuple(size):
            name = f"'{image}'" if isinstance(image, str | Path) else "The image"
            raise ImageError(
                f"{name} has {_size(pixels.shape[:2])} pixels, but this model only accepts {_size(size)}; "
                "resize the image, or export without --size."
            )
        return pixels

    def rows(self, pixels: Iterable[Pixels], batch_size: int = 64) -> Iterator[Rows]:
        """Yield the row ``(columns,)`` of the main output for each decoded image. Neighbours of a size form a batch."""
        for batch in session_batches(self.session, pixels, lambda image: image, batch_size):
            yield from self.run(np.stack(batch))

    def run(self, images: npt.NDArray[np.uint8]) -> Rows:
        """Return the main output ``(B, columns)`` for decoded images ``(B, H, W, C)``, see `run_outputs`."""
        return self.run_outputs(images, (self.task.output,))[self.task.output]

    def run_outputs(self, images: npt.NDArray[np.uint8], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Return outputs of the graph, each ``(B, ...)``, for decoded images ``(B, H, W, C)``.

        Raises:
            ImageError: if the network does not accept images of this size.
            EngineError: if the engine fails.
        """
        size, spec = images.shape[1:3], self.spec
        if self.engine == "openvino" and spec.resize == "none" and (size[0] < spec.height or size[1] < spec.width):
            # If the output of a layer is empty, OpenVINO returns the results of an earlier run.
            smallest = _size((spec.height, spec.width))
            raise ImageError(
                f"The network does not resize images of {_size(size)} pixels, and the engine openvino needs at least "
                f"{smallest}; use the engine onnxruntime."
            )
        try:
            return dict(zip(names, run_batch(self.session, images, names), strict=True))
        except EngineError as error:
            if self._accepts_training_size(images.shape):
                raise ImageError(f"The model does not accept images of {_size(size)} pixels: {error}") from error
            raise

    def check_samples(self) -> float:
        """Return the largest difference from the predictions that `export` recorded for the samples of the bundle.

        Raises:
            GateError: if a difference is larger than its tolerance.
        """
        pixels = [decode(file, self.spec) for file in self.bundle.sample_files]
        expected, tolerance = self.bundle.expected(self.precision), self.bundle.tolerance(self.precision)
        # Run the samples one by one and in one batch, because the batch size must not change a prediction.
        for batch_size in (1, len(pixels)):
            actual = np.stack(list(self.rows(pixels, batch_size)))
            differences = self.task.differences(expected, actual)
            flipped = self.task.changed(expected, actual, tolerance)
            wrong = flipped | ~(differences <= tolerance)
            if wrong.any():
                samples, hint = self.bundle.samples, INT8_HINT if self.precision == "int8" else ""
                if self.engine != "onnxruntime":
                    hint = " Use the engine onnxruntime."
                files = [sample["file"] for sample, is_wrong in zip(samples, wrong, strict=True) if is_wrong]
                raise GateError(
                    f"Bundle '{self.bundle.folder}' gives other predictions on this machine ({self.engine}, "
                    f"{self.precision}, batches of {batch_size}): {len(files)} of {len(pixels)} samples differ by up "
                    f"to {differences.max():.2g} (allowed {tolerance:.2g}), {int(flipped.sum())} of them in "
                    f"{self.task.answer}: {', '.join(files)}.{hint}"
                )
        return float(differences.max())

    def _accepts_training_size(self, shape: tuple[int, ...]) -> bool:
        """Return whether the model runs on as many pixels at the size of its training images.

        Only a network without resizing can refuse a size, and engines raise the same exception for any failure.
        """
        (batch, height, width, channels), spec = shape, self.spec
        if spec.resize != "none" or (height, width) == (spec.height, spec.width):
            return False
        count = -(-batch * height * width // (spec.height * spec.width))
        try:
            run_batch(self.session, np.zeros((count, spec.height, spec.width, channels), np.uint8))
        except EngineError:
            return False
        return True


class Predictor(BundlePredictor[Prediction]):
    """Classify images with a bundle; see `BundlePredictor`."""

    task_name = "classification"


class MultiLabelPredictor(BundlePredictor[LabelSet]):
    """Find all classes of images with a bundle; see `BundlePredictor`."""

    task_name = "multilabel"


class OrientationPredictor(BundlePredictor[Orientation]):
    """Estimate the orientation of images with a bundle; see `BundlePredictor`."""

    task_name = "orientation"


def _reopen(
    kind: "type[BundlePredictor[Result]]", folder: Path, digest: str, *arguments: Any, **options: Any
) -> "BundlePredictor[Result]":
    return kind(Bundle.open(folder, expect=digest), *arguments, **options)


AnyPredictor: TypeAlias = Predictor | MultiLabelPredictor | OrientationPredictor


def open_predictor(bundle: str | Path | Bundle, *arguments: Any, **options: Any) -> AnyPredictor:
    """Open a bundle with the predictor of its task; `BundlePredictor` has the arguments."""
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    kinds: tuple[type[AnyPredictor], ...] = (Predictor, MultiLabelPredictor, OrientationPredictor)
    (kind,) = (kind for kind in kinds if kind.task_name == bundle.spec.task)
    return kind(bundle, *arguments, **options)


def open_session(
    model: Traversable | bytes,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
    engine: Engine = "onnxruntime",
) -> Any:
    """Open an ONNX file as an ``InferenceSession`` of onnxruntime, or an `OpenVINOSession`.

    Args:
        model: path or content of the file, or a file in an archive.
        threads: number of threads per run; by default the number of cores that this process may use.
        providers: execution providers, best first: ``cuda``, ``tensorrt``, ``coreml``, ``openvino``, ... The processor
            runs the operators that none of them supports.
        engine: ``onnxruntime`` or ``openvino``.

    Raises:
        BundleError: if onnxruntime cannot load the file.
        EngineError: if OpenVINO cannot load the file.
        UserError: if the engine or a provider is not installed or cannot start.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}; without it, there are as many as cores.")
    if engine not in get_args(Engine):
        raise UserError(f"engine must be {' or '.join(get_args(Engine))}, got '{engine}'.")
    # By default engines use all physical cores of the machine, also in a container that may use fewer.
    cores = count_cores()
    count = threads or (cores if cores < (os.cpu_count() or 1) else 0)
    content = model if isinstance(model, bytes) else str(model) if isinstance(model, Path) else model.read_bytes()
    if engine == "openvino":
        if list(providers) != list(CPU):
            raise UserError(f"providers are for the engine onnxruntime, got {', '.join(providers)}; omit them.")
        return OpenVINOSession(content, count)
    full_names = find_providers(providers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    # Do not log constants that the optimiser could not fold. Errors are also raised as exceptions.
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=full_names)
    except Exception as error:  # onnxruntime's exceptions have no other common base
        name = "the model" if isinstance(model, bytes) else f"'{model}'"
        version = onnxruntime.__version__
        raise BundleError(f"onnxruntime {version} cannot load {name}: {one_line(error)}") from error
    # onnxruntime only warns about a provider whose libraries are missing.
    if missing := set(full_names) - set(session.get_providers()):
        names = ", ".join(map(_short, missing))
        raise UserError(f"onnxruntime cannot start the provider {names}: its driver or libraries are missing.")
    return session


def find_providers(names: Sequence[str]) -> list[str]:
    """Return onnxruntime's names of execution providers: ``CUDAExecutionProvider`` for ``cuda``, in any case."""
    available = {_short(name): name for name in onnxruntime.get_available_providers()}
    for name in names:
        if _short(name) not in available:
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} has no provider '{name}', only {', '.join(available)}; "
                "install another build of it in its place, such as onnxruntime-gpu, or use the engine openvino."
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


def run_batch(
    session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8], outputs: Sequence[str] = ()
) -> list[npt.NDArray[Any]]:
    """Run a model on ``images`` ``(B, H, W, C)``. Images are repeated to fill the batch of a fixed batch size.

    Without ``outputs``, it returns the first one.

    Raises:
        ImageError: if the model was exported for another size or another number of channels.
        EngineError: if the engine fails.
    """
    count, shape = len(images), _size(images.shape[1:])
    allowed = session.get_inputs()[0].shape[1:]
    if any(isinstance(n, int) and n != m for n, m in zip(allowed, images.shape[1:], strict=True)):
        raise ImageError(f"The model does not accept images of (H, W, C) {shape}, only {_size(allowed)}.")
    if batch := fixed_batch(session):
        images = images[np.arange(batch) % count]
    try:
        arguments: list[Any] = [list(outputs) or [session.get_outputs()[0].name], {"images": images}]
        if images[0].size > images.shape[-1] * MAX_BATCH_PIXELS and session.get_providers() == [CPU_PROVIDER]:
            # After a large image, return the memory to the system.
            arguments.append(onnxruntime.RunOptions())
            arguments[-1].add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return [output[:count] for output in session.run(*arguments)]
    except Exception as error:  # the engines' exceptions have no other common base
        engine = "openvino" if isinstance(session, OpenVINOSession) else "onnxruntime"
        raise EngineError(f"{engine} failed on {count} images of (H, W, C) {shape}: {one_line(error)}") from error
