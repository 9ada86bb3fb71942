"""The spatial transformer in ONNX Runtime against the exporter's own decomposition of ``affine_grid``.

    python benchmarks/transformer.py

Both are the same block (localiser, affine grid, bilinear sampler; 28 x 28 grey, opset 18) with the same weights. They
run in turn, and the ratio is taken round by round: the median, and the least and greatest of nine rounds.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from upright.architectures.spatial_transformer import SpatialTransformer

ROUNDS = 9


class Textbook(nn.Module):
    """The same transformer as everyone writes it."""

    def __init__(self, transformer: SpatialTransformer) -> None:
        super().__init__()
        self.localisation = transformer.localisation

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` turned."""
        matrices = self.localisation(images).reshape(-1, 2, 3) + torch.eye(2, 3)
        return grid_sample(images, affine_grid(matrices, list(images.shape), align_corners=False), align_corners=False)


def session(block: nn.Module, path: Path, size: int, threads: int) -> onnxruntime.InferenceSession:
    """The exported block."""
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


def milliseconds(block: onnxruntime.InferenceSession, images: np.ndarray, least: float = 0.2) -> float:
    """Time of one run, the mean over at least so many seconds."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < least:
        block.run(None, {"images": images})
        count += 1
    return 1000 * passed / count


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=28, help="height and width")
    size = parser.parse_args().size
    torch.manual_seed(0)
    ours = SpatialTransformer((1, size, size))
    nn.init.normal_(ours.localisation[-1].weight, std=0.1)
    textbook = Textbook(ours)
    images = torch.rand(64, 1, size, size)
    with torch.no_grad():
        difference = (ours(images) - textbook(images)).abs().max()
    print(f"{size} x {size}; largest difference {difference:.1e}\n")
    print("| threads | batch | ours, ms | affine_grid, ms | ratio | least | greatest |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2):
            blocks = [
                session(block, Path(folder) / f"{name}{threads}.onnx", size, threads)
                for name, block in (("ours", ours), ("textbook", textbook))
            ]
            for batch in (1, 64):
                given = images[:batch].numpy()
                for block in blocks:
                    milliseconds(block, given)
                rounds = [[milliseconds(block, given) for block in blocks] for _ in range(ROUNDS)]
                ratios = [theirs / mine for mine, theirs in rounds]
                mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
                row = (threads, batch, f"{mine:.3f}", f"{theirs:.3f}", f"**{statistics.median(ratios):.2f}**")
                print("|", " | ".join(map(str, row)), f"| {min(ratios):.2f} | {max(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
