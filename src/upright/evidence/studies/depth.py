"""A deep and narrow network classifies better than a shallow and wide one with the same number of parameters.

Protocol: Train on 5,400 MNIST images for 10 epochs (54,000 images) in batches of 64. The optimiser is AdamW with a
one-cycle schedule that peaks at a learning rate of 0.003. The initial weights are He's, and all networks use ReLU. MLPs
with 1 to 4 hidden layers have 100,000 parameters. CNNs with 1 to 4 convolutions of 3 x 3 have 30,000 parameters. They
have 2 x 2 max pooling after the first and after the last convolution, and one linear layer. The layers of a network
have equal widths, or widths that differ by one unit, so that every count is within 1 %. The training loss is the mean
over the last epoch. The seeds change weights and order.

The claim holds if, in both families, every run with 4 layers has a higher test accuracy than every run with 1 layer.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench, Experiment
from upright.evidence.finding import Finding, draw_band, last_values, means, metric, panels, rows, spreads

SHAPE = (1, 28, 28)
DEPTHS = (1, 2, 3, 4)
SHALLOW, DEEP = 1, 4


class CNN(nn.Module):
    """Convolutions of 3 x 3 and one linear layer.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: ``K``.
        widths: number of maps of each convolution.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, *, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs, height, width = input_shape
        layers: list[nn.Module] = []
        for layer, maps in enumerate(widths):
            layers += [nn.Conv2d(inputs, maps, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if layer == 0 else [])]
            inputs = maps
        outputs = inputs * (height // 4) * (width // 4)
        self.layers = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(outputs, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(B, C, H, W)`` to logits ``(B, K)``."""
        logits: Tensor = self.layers(images)
        return logits


FAMILIES: dict[str, tuple[Callable[..., nn.Module], int]] = {"MLP": (MLP, 100_000), "CNN": (CNN, 30_000)}
"""Network and number of parameters of each family."""


def parameters(network: Callable[..., nn.Module], widths: tuple[int, ...]) -> int:
    """Count the parameters of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network(SHAPE, 10, widths=widths).parameters())


@cache
def widths(family: str, depth: int) -> tuple[int, ...]:
    """Return the widths of the layers for the number of parameters of the family."""
    network, budget = FAMILIES[family]
    width = 1
    while parameters(network, (width + 1,) * depth) <= budget:
        width += 1
    # Widen only some of the layers by one unit, because widening all of them changes the count in coarser steps.
    candidates = [(width + 1,) * wider + (width,) * (depth - wider) for wider in range(depth + 1)]
    return min(candidates, key=lambda candidate: abs(parameters(network, candidate) - budget))


def run(bench: Bench) -> Finding:
    depths, epochs = bench.choose((SHALLOW, DEEP), DEPTHS), bench.choose(1, 10)
    keys = [(family, depth) for family in FAMILIES for depth in depths]
    plain = Experiment(MLP, bench.data(train_fraction=0.1), epochs, init="he_normal", validate_every=epochs)
    runs = bench.train({key: plain._replace(network=partial(FAMILIES[key[0]][0], widths=widths(*key))) for key in keys})
    accuracy, loss = metric(runs, "test/accuracy"), last_values(runs, "train/loss")
    won, parts, mean = {}, [], means(accuracy)
    for family, (_, budget) in FAMILIES.items():
        shallow, deep = (family, SHALLOW), (family, DEEP)
        won[family] = min(accuracy[deep]) > max(accuracy[shallow])
        parts.append(
            f"{family}s with {budget:,} parameters are {'' if won[family] else 'not clearly '}better if they are deep: "
            f"the test accuracy is {mean[shallow]:.4f} with {SHALLOW} layer and {mean[deep]:.4f} with {DEEP} layers "
            f"({'every' if won[family] else 'not every'} deep run is above every shallow run)."
        )
    columns = {
        "layers": {key: str(key[1]) for key in keys},
        "width": {key: " or ".join(map(str, sorted({*widths(*key)}))) for key in keys},
        "parameters": {key: f"{parameters(FAMILIES[key[0]][0], widths(*key)):,}" for key in keys},
        "test accuracy": spreads(accuracy),
        "training loss": spreads(loss),
    }
    table = rows("network", {key: key[0] for key in keys}, columns)
    figure, axes = panels(2, 2)
    for row, (title, groups) in enumerate({"test accuracy": accuracy, "training loss": loss}.items()):
        for axis, family in zip(axes[2 * row :], FAMILIES, strict=False):
            draw_band(axis, depths, np.transpose([groups[family, depth] for depth in depths]), family)
            axis.set_title(f"{family}s with {FAMILIES[family][1]:,} parameters")
            axis.set(xticks=depths, xlabel="hidden layers" if family == "MLP" else "convolutions", ylabel=title)
    numbers = {"test/accuracy": accuracy, "train/loss": loss}
    return Finding(all(won.values()), " ".join(parts), table, figure, numbers)
