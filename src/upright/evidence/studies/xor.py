"""A perceptron cannot learn XOR; an MLP with a hidden layer can; without an activation between its layers it cannot.

Protocol: Train on 400 noisy points around the four points of XOR (standard deviation 0.1), and test on 400 others.
There are two inputs. Compare a linear classifier, an MLP with one hidden layer of 8 tanh units, and the same MLP
without the activation. The optimiser is Adam at a learning rate of 0.05, with 300 steps on all 400 points. A line can
separate at most three of the four points correctly, so no linear classifier exceeds 0.75 (Minsky, Papert 1969).

The claim holds if every MLP classifies more than 0.99 of the test points correctly, and no other network more than
0.78.
"""

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from upright.architectures.mlp import MLP
from upright.architectures.perceptron import Perceptron
from upright.evidence.bench import Bench
from upright.evidence.finding import Finding, draw_points, panels, rows, spreads
from upright.runs.drawing import COLOURS

CORNERS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
NETWORKS = ("perceptron", "MLP", "MLP without activations")


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs ``(N, 1, 1, 2)`` around the four corners, and the XOR of each corner's coordinates."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.arange(count) % 4
    inputs = CORNERS[corner] + 0.1 * torch.randn(count, 2, generator=generator)
    return inputs.view(count, 1, 1, 2), (CORNERS[corner].sum(1) == 1).long()


def network(name: str) -> nn.Module:
    """Build a network with two inputs and two classes."""
    if name == "perceptron":
        return Perceptron((1, 1, 2), 2)
    if name == "MLP":
        return MLP((1, 1, 2), 2, widths=(8,), activation="tanh")
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.Linear(8, 2))


def learn(name: str, seed: int) -> tuple[nn.Module, float]:
    """Train a network on 400 points, and return it with its accuracy on 400 others."""
    torch.manual_seed(seed)
    learner = network(name)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    inputs, labels = points(400, 2 * seed)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(learner(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    inputs, labels = points(400, 2 * seed + 1)
    return learner, float((learner(inputs).argmax(1) == labels).float().mean())


def run(bench: Bench) -> Finding:
    runs = {name: [learn(name, seed) for seed in range(bench.seeds)] for name in NETWORKS}
    accuracy = {name: [right for _, right in each] for name, each in runs.items()}
    linear, mlp, without = accuracy.values()
    sentence = (
        f"The perceptron classifies at most {max(linear):.3f} of the test points correctly, the MLP at least "
        f"{min(mlp):.3f}, and the MLP without activations at most {max(without):.3f}."
    )
    table = rows("network", NETWORKS, {"test accuracy": spreads(accuracy, 3)})
    figure, axes = panels(4, width=3)
    for axis, name in zip(axes, NETWORKS, strict=False):
        draw_plane(axis, runs[name][0][0])
        axis.set_title(name)
    draw_points(axes[3], accuracy, "test accuracy", NETWORKS)
    axes[3].set_ylim(0, 1.05)
    return Finding(min(mlp) > 0.99 and max(linear + without) <= 0.78, sentence, table, figure, {"accuracy": accuracy})


@torch.no_grad()
def draw_plane(axis: Axes, learner: nn.Module) -> None:
    """Draw the probability of a class over the plane, and the test points."""
    ticks = np.linspace(-0.5, 1.5, 81, dtype=np.float32)
    plane = torch.from_numpy(np.stack(np.meshgrid(ticks, ticks), axis=-1)).view(-1, 1, 1, 2)
    probability = learner(plane).softmax(1)[:, 1].view(81, 81).numpy()
    axis.contourf(ticks, ticks, probability, levels=np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.5)
    inputs, labels = points(400, 1)
    for label in (0, 1):
        x, y = inputs[labels == label].view(-1, 2).T
        axis.scatter(x, y, s=5, color=COLOURS[label], label=f"XOR is {label}")
    axis.legend(fontsize=7, loc="lower left")
