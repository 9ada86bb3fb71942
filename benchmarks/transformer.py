"""The spatial transformer in ONNX Runtime against the exporter's own decomposition of ``affine_grid``.

    python benchmarks/transformer.py [--size 28] [--quick]

Both are the same block (localiser, affine grid, bilinear sampler; 28 x 28 grey, opset 18) with the same weights. They
take turns. The ratio is the median of nine rounds, with the least and the greatest.
"""

import logging
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from shared import command_line, heading, milliseconds, row
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from upright.architectures.spatial_transformer import SpatialTransformer

ROUNDS = 9


class Textbook(nn.Module):
    """The same transformer, implemented with ``affine_grid``."""

    def __init__(self, transformer: SpatialTransformer) -> None:
        super().__init__()
        self.localisation = transformer.localisation

    def forward(self, images: Tensor) -> Tensor:
        matrices = self.localisation(images).reshape(-1, 2, 3) + torch.eye(2, 3)
        return grid_sample(images, affine_grid(matrices, list(images.shape), align_corners=False), align_corners=False)


def session(block: nn.Module, path: Path, size: int, threads: int) -> onnxruntime.InferenceSession:
    """Export a block and open it in onnxruntime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            block.eval(),
            (torch.zeros(2, 1, size, size),),
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}],
            verbose=False,
        )
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--size", type=int, default=28, help="height and width; default: 28")
    options = parser.parse_args()
    size, rounds, seconds = options.size, 1 if options.quick else ROUNDS, 0.0 if options.quick else 0.2
    torch.manual_seed(0)
    ours = SpatialTransformer((1, size, size))
    nn.init.normal_(ours.localisation[-1].weight, std=0.1)
    textbook = Textbook(ours)
    images = torch.rand(64, 1, size, size)
    with torch.no_grad():
        difference = (ours(images) - textbook(images)).abs().max()
    print(f"{size} x {size}; largest difference {difference:.1e}\n")
    heading("threads", "batch", "ours, ms", "affine_grid, ms", "ratio", "least", "greatest")
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1,) if options.quick else (1, 2):
            blocks = [
                session(block, Path(folder) / f"{name}{threads}.onnx", size, threads)
                for name, block in (("ours", ours), ("textbook", textbook))
            ]
            for batch in (1,) if options.quick else (1, 64):
                runs = [partial(block.run, None, {"images": images[:batch].numpy()}) for block in blocks]
                times = [[milliseconds(run, seconds) for run in runs] for _ in range(rounds)]
                ratios = [theirs / mine for mine, theirs in times]
                medians = [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)]
                extremes = [f"{extreme(ratios):.2f}" for extreme in (min, max)]
                row(threads, batch, *medians, f"**{statistics.median(ratios):.2f}**", *extremes)


if __name__ == "__main__":
    main()
