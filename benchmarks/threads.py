"""Speed of training with each number of threads, on a quiet machine and beside a process that takes a core.

    python benchmarks/threads.py [--seconds 3] [--rounds 5] [--quick]

It measures steps of `ImageClassifier`'s model with AdamW, in batches of 128 images of 28 x 28. All numbers of threads
take turns in fresh processes, each on a quiet machine and beside a busy process. The table has medians, relative to one
thread per core on a quiet machine.
"""

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from shared import command_line, heading, row
from torch import nn
from torch.nn.functional import cross_entropy

from upright.architectures.lenet import LeNet
from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.cores import count_cores
from upright.images import ImageSpec
from upright.runs.process import keep_freed_memory
from upright.training.model import Model

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "LeNet": LeNet,
    "transformer and LeNet": lambda *shape: TransformerNetwork(*shape, transformer=SpatialTransformer, network=LeNet),
    "ResNet-14 of width 8": lambda *shape: SmallResNet(*shape, depth=14, width=8),
}


def steps_per_second(network: str, threads: int, seconds: float) -> float:
    """Return the training steps per second in this process."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    spec = ImageSpec(1, 28, 28, tuple("0123456789"), mean=(0.1307,), std=(0.3081,))
    model = Model(spec, NETWORKS[network](spec.input_shape, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = torch.randint(0, 256, (128, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step()
        count += 1
    return count / elapsed


def measure(network: str, threads: int, seconds: float, *, busy: bool) -> float:
    """Return the training steps per second in a fresh process."""
    program = f"import threads; print(threads.steps_per_second({network!r}, {threads}, {seconds}))"
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, "-c", program]
        return float(subprocess.run(command, cwd=sys.path[0], check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement; default: 3")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; default: 5")
    options = parser.parse_args()
    cores = count_cores()
    networks, counts = list(NETWORKS), sorted({1, max(1, cores - 1), cores})
    if options.quick:
        networks, counts, options.seconds, options.rounds = networks[:1], [cores], 0.1, 1
    print(f"{cores} cores\n")
    heading("network", "threads", "quiet", "beside a busy process", "least", "greatest")
    for network in networks:
        rates: dict[tuple[int, bool], list[float]] = defaultdict(list)
        for _ in range(options.rounds):
            for threads in counts:
                for busy in (False, True):
                    rates[threads, busy].append(measure(network, threads, options.seconds, busy=busy))
        full = statistics.median(rates[cores, False])
        for threads in counts:
            quiet, beside = (statistics.median(rates[threads, busy]) / full for busy in (False, True))
            least, greatest = (extreme(rates[threads, True]) / full for extreme in (min, max))
            row(network, threads, f"{quiet:.2f}", f"**{beside:.2f}**", f"{least:.2f}", f"{greatest:.2f}")


if __name__ == "__main__":
    main()
