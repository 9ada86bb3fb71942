"""Load the PyTorch model of a checkpoint, for comparison with a bundle in `upright benchmark`."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from upright.checkpoint import KEY, output_count, read_checkpoint
from upright.errors import CheckpointError
from upright.images import ImageSpec
from upright.recipes import build
from upright.runtime.bundle import Bundle
from upright.runtime.worker import LoadedModel
from upright.training.model import Model


def pytorch(bundle: str, checkpoint: str, threads: int, compiled: bool = False) -> LoadedModel:
    """Load the model without Lightning, because its import would dominate the cold start.

    Raises:
        CheckpointError: if the bundle was exported from another run.
        UserError: see `read_checkpoint`.
    """
    torch.set_num_threads(threads)
    content = read_checkpoint(checkpoint)
    record, source = content[KEY], Bundle(Path(bundle)).manifest["provenance"]["run"]
    if record["run"]["id"] != source["id"]:
        raise CheckpointError(
            f"'{checkpoint}' belongs to run '{record['run']['name']}' ({record['run']['id']}), but bundle '{bundle}' "
            f"was exported from '{source['name']}' ({source['id']}); give the checkpoint of that run."
        )
    spec = ImageSpec.from_dict(record["spec"])
    model = Model(spec, build(record["model"]["init_args"]["network"])(spec.input_shape, output_count(record))).eval()
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)})
    forward = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        logits: torch.Tensor = forward(torch.from_numpy(images).permute(0, 3, 1, 2))
        answers: npt.NDArray[np.float32] = model.answers(logits).numpy()
        return answers

    return run
