"""The speed of the spatial transformer: its sampling points against ``affine_grid``, and votes against regression.

    python benchmarks/transformer.py [--size 28] [--quick]

The first table compares, in ONNX Runtime, the transformer with the exporter's own decomposition of ``affine_grid``:
the same block (localiser, affine grid, bilinear sampler; 28 x 28 grey, opset 18) with the same weights. The second one
compares two complete networks, each a rotation in front of a LeNet: `PolarLocaliser` against `ConvLocaliser` with 16
maps, in ONNX Runtime and in a training step, on one thread. All pairs take turns. The ratio is the median of nine
rounds, with the least and the greatest.
"""

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from shared import command_line, heading, milliseconds, row
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from upright.architectures.lenet import LeNet
from upright.architectures.localisers import ConvLocaliser, Network
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.architectures.voting import PolarLocaliser

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


def rotating(localiser: Network, size: int) -> nn.Module:
    """Return a LeNet behind a rotation."""
    transformer = partial(SpatialTransformer, transform="rotation", padding="border", localiser=localiser)
    lenet = partial(LeNet, activation="relu", pooling="max")
    return TransformerNetwork((1, size, size), 10, network=lenet, transformer=transformer)


def training_step(network: nn.Module, size: int, batch: int = 128) -> Callable[[], None]:
    """Return a function that trains one step."""
    optimizer = torch.optim.AdamW(network.train().parameters())
    images, labels = torch.rand(batch, 1, size, size), torch.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def compare_localisers(size: int, rounds: int, seconds: float) -> None:
    """Print the table of the localisers."""
    torch.set_num_threads(1)
    heading("network with LeNet", "votes, ms", "regression, ms", "ratio", "least", "greatest")
    networks = [rotating(localiser, size) for localiser in (PolarLocaliser, partial(ConvLocaliser, width=16))]
    work: dict[str, list[Callable[[], object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1, 64):
            images = {"images": torch.rand(batch, 1, size, size).numpy()}
            blocks = [session(each, Path(folder) / f"{place}.onnx", size, 1) for place, each in enumerate(networks)]
            work[f"ONNX Runtime, batch {batch}"] = [partial(block.run, None, images) for block in blocks]
        work["training step, batch 128"] = [training_step(network, size) for network in networks]
        for name, runs in work.items():
            times = [[milliseconds(run, seconds) for run in runs] for _ in range(rounds)]
            compared(name, times, [ours / theirs for ours, theirs in times])


def compared(name: object, times: list[list[float]], ratios: list[float]) -> None:
    """Print a row: the median times, and the ratio with its range."""
    medians = [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)]
    row(name, *medians, f"**{statistics.median(ratios):.2f}**", *(f"{extreme(ratios):.2f}" for extreme in (min, max)))


def main() -> None:
    """Print two tables."""
    parser = command_line(__doc__)
    parser.add_argument("--size", type=int, default=28, help="height and width; default: 28")
    options = parser.parse_args()
    size, rounds, seconds = options.size, 1 if options.quick else ROUNDS, 0.0 if options.quick else 0.2
    torch.manual_seed(0)
    ours = SpatialTransformer((1, size, size), transform="affine")
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
                compared(f"{threads} | {batch}", times, [theirs / mine for mine, theirs in times])
    print()
    compare_localisers(size, rounds, seconds)


if __name__ == "__main__":
    main()
