"""Copy the models of a bundle into a Triton model repository.

Source: ``model_config.proto`` of https://github.com/triton-inference-server/common, and Triton's user guide on model
repositories and configuration. The inputs and outputs come from onnxruntime, as in Triton's own backend.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import onnxruntime

from upright.errors import UserError
from upright.files import check_replaceable, replacing_folder
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import open_session

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "1/model.onnx"
MAX_BATCH = 64
"""Images that Triton combines in one batch, if the model has a free batch size."""
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}


def model_folders(repository: Path, name: str, precisions: Iterable[str], bundle: Path, force: bool) -> dict[str, Path]:
    """Return the folder of each precision: ``NAME`` for float32, ``NAME_fp16`` and ``NAME_int8``.

    The repository may contain other models, and the bundle may not exist yet. Raise a `UserError` if a model exists, if
    a folder is not a Triton model, or if bundle and repository overlap.
    """
    folders = {each: repository / (name if each == "fp32" else f"{name}_{each}") for each in precisions}
    for folder in folders.values():
        ours, theirs = folder.resolve(), bundle.resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise UserError(f"Bundle '{bundle}' and Triton model '{folder}' need separate folders: change --triton.")
        check_replaceable(folder, "a Triton model", CONFIG)
        if folder.exists() and not force:
            raise UserError(f"Triton model '{folder}' exists: --force replaces it with all its versions.")
    return folders


def check_labels(classes: Iterable[str]) -> None:
    """Raise a `UserError` if a class name has a line break, because Triton reads one class per line."""
    if broken := [name for name in classes if "\n" in name]:
        raise UserError(f"Triton reads one class per line, and {broken[0]!r} has a line break; rename the class.")


def write_models(bundle: Bundle, folders: dict[str, Path]) -> None:
    """Copy the models of a bundle, with their configurations. Each folder is written completely or not at all."""
    for precision, target in folders.items():
        with replacing_folder(target) as folder:
            model = folder / MODEL
            model.parent.mkdir()
            model.write_bytes(bundle.model(precision).read_bytes())
            if bundle.spec.classes:
                (folder / LABELS).write_text("".join(f"{name}\n" for name in bundle.spec.classes), encoding="utf-8")
            (folder / CONFIG).write_text(configuration(target.name, open_session(model)), encoding="utf-8")


def configuration(name: str, session: onnxruntime.InferenceSession) -> str:
    """Return the ``config.pbtxt`` of a model.

    A free first axis is the batch, which Triton omits from the dimensions. A fixed first axis stays a dimension, and
    Triton then does not batch requests.
    """
    free = not isinstance(session.get_inputs()[0].shape[0], int)

    def tensor(node: onnxruntime.NodeArg, extra: str = "") -> str:
        lengths = [length if isinstance(length, int) else -1 for length in node.shape[free:]]
        return f'  {{ name: "{node.name}" data_type: {TYPES[node.type]} dims: {lengths}{extra} }}'

    labelled = {"probabilities": f' label_filename: "{LABELS}"'}
    inputs = ",\n".join(tensor(node) for node in session.get_inputs())
    outputs = ",\n".join(tensor(node, labelled.get(node.name, "")) for node in session.get_outputs())
    return f"""name: {json.dumps(name, ensure_ascii=False)}
backend: "onnxruntime"
max_batch_size: {MAX_BATCH if free else 0}
input [
{inputs}
]
output [
{outputs}
]
{"dynamic_batching { }" if free else "# The graph takes a fixed number of images, so Triton does not batch requests."}
"""
