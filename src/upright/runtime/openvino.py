"""OpenVINO as an engine: a model with the methods of onnxruntime's session that predictions need."""

import io
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.errors import EngineError, UserError, one_line
from upright.images import MAX_BATCH_PIXELS

SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    # By default, OpenVINO computes in bfloat16 on processors that have it, and answers change beyond their tolerance.
    "INFERENCE_PRECISION_HINT": "f32",
    # Pinned threads of several processes would all share the first cores.
    "ENABLE_CPU_PINNING": False,
    # Limit on kernels, which are compiled for every size of image and batch. The default is 5000, some gigabytes.
    "CPU_RUNTIME_CACHE_CAPACITY": 256,
}
ONEDNN_KERNELS = "64"  # of all models together, besides the above; the default is 1024
TYPES = {"u8": "uint8", "f16": "float16", "f32": "float", "f64": "double", "i64": "int64"}


def check_installed() -> None:
    """Raise a `UserError` if OpenVINO is not installed."""
    if not find_spec("openvino"):
        raise UserError("The engine openvino needs the package 'openvino': pip install 'upright[openvino]'.")


class End(NamedTuple):
    """An input or an output of the graph, with onnxruntime's name of its type. A free dimension is ``?``."""

    name: str
    type: str
    shape: list[int | str]


class OpenVINOSession:
    """An ONNX file in OpenVINO, on the processor. Threads may share it; it runs one batch at a time.

    Args:
        model: path or content of the file.
        threads: number of threads per run; 0 for OpenVINO's default.

    Raises:
        UserError: if OpenVINO is not installed.
        EngineError: if it cannot load the file.
    """

    def __init__(self, model: str | bytes, threads: int) -> None:
        check_installed()
        core = _core()
        try:
            network = core.read_model(model if isinstance(model, str) else io.BytesIO(model))
            self._model = core.compile_model(network, "CPU", SETTINGS | {"INFERENCE_NUM_THREADS": threads})
        except Exception as error:  # OpenVINO's exceptions have no other common base
            name = f"'{model}'" if isinstance(model, str) else "the model"
            raise EngineError(f"openvino {version('openvino')} cannot load {name}: {one_line(error)}") from error
        self._request, self._lock = self._model.create_infer_request(), Lock()
        self._inputs, self._outputs = (list(map(_end, ends)) for ends in (self._model.inputs, self._model.outputs))
        self._places = {output.name: place for place, output in enumerate(self._outputs)}

    def get_inputs(self) -> list[End]:
        return self._inputs

    def get_outputs(self) -> list[End]:
        return self._outputs

    def get_providers(self) -> list[str]:
        return []  # onnxruntime's kind of engines

    def run(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[np.uint8]]) -> list[npt.NDArray[Any]]:
        """Return the outputs of these names."""
        (images,) = feeds.values()
        with self._lock:
            results = self._request.infer(feeds, share_inputs=True, share_outputs=True)
            outputs = [np.array(results[self._places[name]]) for name in names]
            if images[0].size > images.shape[-1] * MAX_BATCH_PIXELS:
                # After a large image, return the memory to the system.
                self._model.release_memory()
        return outputs


@cache
def _core() -> Any:
    # One for the process. Each loads the CPU plugin, which sets the stack for signals of this thread, and restores the
    # one before when it goes: after two with overlapping lives, a signal would use a stack that is unmapped already.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
    from openvino import Core

    return Core()


def _end(end: Any) -> End:
    shape = [side.get_length() if side.is_static else "?" for side in end.partial_shape]
    kind = end.element_type.get_type_name()
    return End(end.any_name, f"tensor({TYPES.get(kind, kind)})", shape)
