"""The model of a checkpoint in PyTorch, ready to answer: what a bundle is measured against."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from upright.errors import UserError
from upright.images import ImageSpec
from upright.recipes import build
from upright.runtime.bundle import Bundle
from upright.runtime.worker import Run
from upright.training.model import Model


def pytorch(bundle: str, checkpoint: str, threads: int, compiled: bool = False) -> Run:
    """Restore the network alone, without Lightning, which would take longer to import than all the rest.

    Args:
        bundle: that was exported from it.
        checkpoint: or the folder of a run.
        threads: that one run may use.
        compiled: by ``torch.compile``.

    Raises:
        UserError: if the bundle is of another run, or it is no checkpoint.
    """
    torch.set_num_threads(threads)
    path = Path(checkpoint) / "best.ckpt" if Path(checkpoint).is_dir() else Path(checkpoint)
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        ours, weights = read["upright"], read["state_dict"]
    except Exception:  # torch's unpickler raises whatever a broken file leads it to
        from upright.checkpoint import read_checkpoint

        read_checkpoint(checkpoint)
        raise
    made_from = Bundle(Path(bundle)).manifest["provenance"]["run"]
    if ours["run"]["id"] != made_from["id"]:
        raise UserError(
            f"'{checkpoint}' is of run '{ours['run']['name']}' ({ours['run']['id']}), and bundle '{bundle}' was "
            f"exported from '{made_from['name']}' ({made_from['id']}); give the checkpoint of that one."
        )
    spec = ImageSpec.from_dict(ours["spec"])
    model = Model(spec, build(ours["model"]["init_args"]["network"])(spec.input_shape, len(spec.classes))).eval()
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    )
    forward = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        logits: torch.Tensor = forward(torch.from_numpy(images).permute(0, 3, 1, 2))
        probabilities: npt.NDArray[np.float32] = logits.softmax(dim=1).numpy()
        return probabilities

    return run
