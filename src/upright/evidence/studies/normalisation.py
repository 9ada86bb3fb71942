"""Batch normalisation lets a network train at larger learning rates, in fewer steps, and to a better accuracy.

Protocol: Train VGG-13 with and without batch normalisation. It has the first four stages only, with 8, 16, 32 and 32
maps, two hidden layers of 64 units, no dropout, and He's initial weights. Each run is one epoch of 10,800 MNIST images
in 169 batches of 64. The optimiser is SGD with momentum 0.9 at a constant learning rate of 0.0003, 0.001, 0.003, 0.01,
0.03, 0.1, 0.3 or 1. The final loss is the mean over the last 10 steps. A learning rate trains if every seed ends below
1 (chance is 2.3). The best learning rate has the lowest final loss on average over the seeds. At that rate, measure the
steps to a loss of 0.3 and the test accuracy. The seeds change weights and order.

A first grid started at 0.003, which was the best rate without normalisation. A best rate at the edge of a grid may not
be the best one, so the grid was extended.

The claim holds if all are true:

- The largest learning rate that trains is larger with batch normalisation.
- Every run with batch normalisation, at its best rate, takes fewer steps than every run without.
- Every run with batch normalisation, at its best rate, has a higher test accuracy than every run without.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from upright.architectures.vgg import VGG
from upright.data.datamodule import ImageDataModule
from upright.evidence.bench import Bench
from upright.evidence.finding import Finding, draw_band, draw_points, means, panels, rows, spreads
from upright.training.model import Model

KINDS = {"without": False, "with batch normalisation": True}
AVERAGED_STEPS, TRAINED_LOSS, REACHED = 10, 1.0, 0.3


class Outcome(NamedTuple):
    """The loss at every step, up to one that is not finite, and the test accuracy."""

    losses: list[float]
    accuracy: float

    @property
    def smooth(self) -> list[float]:
        """Moving averages of the loss over the last ``AVERAGED_STEPS`` steps; a diverged run ends at infinity."""
        return [statistics.mean(self.losses[max(0, i - AVERAGED_STEPS) : i]) for i in range(1, len(self.losses) + 1)]

    @property
    def steps(self) -> float:
        """Number of steps to the loss ``REACHED``; infinity if the run never reaches it."""
        return next((step for step, loss in enumerate(self.smooth, 1) if loss <= REACHED), math.inf)


def learn(datamodule: Callable[[], ImageDataModule], rate: float, normalised: bool, seed: int) -> Outcome:
    """Train for one epoch, and test."""
    L.seed_everything(seed, verbose=False)
    data = datamodule()
    widths, units = (8, 16, 32, 32), (64, 64)
    network = VGG(data.spec.input_shape, 10, depth=13, widths=widths, units=units, dropout=0, batch_norm=normalised)
    model = Model(data.spec, network)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses: list[float] = []
    for batch in data.train_dataloader():
        loss = cross_entropy(model(batch.images), batch.labels)
        if not loss.isfinite():
            losses.append(math.inf)
            break
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [model(batch.images).argmax(1) == batch.labels for batch in data.test_dataloader()]
    return Outcome(losses, float(torch.cat(right).float().mean()))


def run(bench: Bench) -> Finding:
    rates = bench.choose((0.01, 0.1), (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0))
    data = bench.data(train_fraction=bench.choose(0.5, 0.2))
    keys = [(kind, rate, seed) for kind in KINDS for rate in rates for seed in range(bench.seeds)]
    results = iter(bench.map(learn, [(data, rate, KINDS[kind], seed) for kind, rate, seed in keys]))
    runs = {kind: {rate: [next(results) for _ in range(bench.seeds)] for rate in rates} for kind in KINDS}
    end = {kind: {rate: [each.smooth[-1] for each in runs[kind][rate]] for rate in rates} for kind in KINDS}
    largest = {
        kind: max((rate for rate in rates if max(end[kind][rate]) < TRAINED_LOSS), default=0.0) for kind in KINDS
    }
    best = {kind: min((statistics.mean(each), rate) for rate, each in end[kind].items())[1] for kind in KINDS}
    steps = {kind: [each.steps for each in runs[kind][best[kind]]] for kind in KINDS}
    accuracy = {kind: [each.accuracy for each in runs[kind][best[kind]]] for kind in KINDS}
    without, normalised = KINDS
    larger = largest[normalised] > largest[without]
    fewer = max(steps[normalised]) < min(steps[without])
    better = min(accuracy[normalised]) > max(accuracy[without])
    mean = means(accuracy)
    count = {
        kind: f"{statistics.mean(each):.0f}" if max(each) < math.inf else "not reached" for kind, each in steps.items()
    }
    sentence = (
        f"The largest learning rate that trains is {largest[normalised]:g} with batch normalisation and "
        f"{largest[without]:g} without. Steps to a loss of {REACHED}: {count[normalised]} with and {count[without]} "
        f"without (every run with it takes fewer: {'yes' if fewer else 'no'}). Test accuracy: {mean[normalised]:.4f} "
        f"with and {mean[without]:.4f} without (every run with it is higher: {'yes' if better else 'no'})."
    )
    columns = {
        "largest learning rate that trains": {kind: f"{largest[kind]:g}" for kind in KINDS},
        "best learning rate": {kind: f"{best[kind]:g}" for kind in KINDS},
        f"steps to a loss of {REACHED}": count,
        "final loss": spreads({kind: end[kind][best[kind]] for kind in KINDS}, 3),
        "test accuracy": spreads(accuracy),
    }
    figure, axes = panels(3)
    for kind in KINDS:
        # A diverged run is worse than a run that learns nothing, and both are outside the range of interest.
        ends = np.minimum(np.transpose([*end[kind].values()]), 10)
        draw_band(axes[0], rates, ends, kind, marker="o", markersize=3)
        curves = [each.smooth for each in runs[kind][best[kind]]]
        draw_band(axes[1], range(1, len(curves[0]) + 1), curves, f"{kind}, rate {best[kind]:g}")
    axes[0].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="final loss (10 and above as 10)")
    axes[1].set(yscale="log", xlabel="step", ylabel=f"loss, mean over {AVERAGED_STEPS} steps")
    axes[1].axhline(REACHED, color="#666666", linewidth=0.8, linestyle=":")
    for axis in axes[:2]:
        axis.legend(fontsize=7)
    titles = {kind: f"{kind.split()[0]}, {best[kind]:g}" for kind in KINDS}
    draw_points(axes[2], accuracy, "test accuracy", titles)
    numbers = {
        kind: {
            f"{rate:g}": [
                {"loss": finite(run.smooth[-1]), "steps": finite(run.steps), "test/accuracy": run.accuracy}
                for run in each
            ]
            for rate, each in runs[kind].items()
        }
        for kind in KINDS
    }
    table = rows("batch normalisation", {kind: kind.split()[0] for kind in KINDS}, columns)
    return Finding(larger and fewer and better, sentence, table, figure, numbers)


def finite(value: float) -> float | None:
    """Return the number, or None if it is not finite, because JSON has no infinity."""
    return value if math.isfinite(value) else None
