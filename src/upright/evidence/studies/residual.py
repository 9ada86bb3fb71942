"""A deep network without shortcuts trains worse than a shallow one; with shortcuts it does not: products become sums.

Protocol: Train the networks that He et al. 2015 trained on CIFAR-10: `SmallResNet` with and without shortcuts, both
with batch normalisation. They are 4 maps wide and have a depth of 8, 20 or 44. Train on 5,400 MNIST images for 3 epochs
(16,200 images) in batches of 64. The optimiser is SGD with momentum 0.9, weight decay 0.0001 and a one-cycle schedule
that peaks at a learning rate of 0.1. The training loss is the mean over the last epoch.

Then take networks of depths up to 110, before training and without normalisation. Measure the gradient of the loss
after the stem, divided by the gradient after the last block. Both are norms over 64 training images. The ratio is the
effect of the Jacobians of all blocks. Do this with Xavier's weights, which halve the variance at each ReLU, and with
He's, which preserve it.

The claim holds if all are true:

- Without shortcuts, every run of depth 44 ends with a higher training loss than every run of depth 8.
- With shortcuts, the mean training loss of depth 44 is not higher than that of depth 8.
- For every seed (Xavier's weights), the ratio of gradients at depth 44 is below 0.001 without shortcuts, and at least
  0.1 with shortcuts.
"""

import statistics
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from upright.architectures.initialisation import Scheme, initialise
from upright.architectures.resnet import SmallResNet
from upright.data.batch import Batch
from upright.evidence.bench import Bench, Experiment, signals_and_gradients
from upright.evidence.finding import Finding, draw_band, last_values, means, metric, panels, rows, spreads
from upright.images import ImageSpec
from upright.runs.drawing import COLOURS

KINDS = {"plain": False, "with shortcuts": True}
TITLES: dict[Scheme, str] = {"xavier_normal": "Xavier", "he_normal": "He"}
STYLES = (":", "--", "-")


def gradients(shortcuts: bool, depth: int, scheme: Scheme, seed: int, spec: ImageSpec, batch: Batch) -> list[float]:
    """Return the norms of the loss's gradient after the stem and each block, over the norm after the last block."""
    torch.manual_seed(seed)
    network = SmallResNet(spec.input_shape, len(spec.classes), depth=depth, width=4, shortcuts=shortcuts)
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, nn.Identity())
    initialise(network, scheme)
    _, tensors = signals_and_gradients(network, (network.stem, *network.blocks), spec, batch)
    norms = [float(gradient.norm()) for gradient in tensors]
    return [norm / norms[-1] for norm in norms]


def run(bench: Bench) -> Finding:
    depths = bench.choose((8, 14), (8, 20, 44))
    shallow, deep = depths[0], depths[-1]
    data, epochs = bench.data(train_fraction=bench.choose(0.05, 0.1)), bench.choose(1, 3)
    optimizer = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.0001)
    plain = Experiment(SmallResNet, data, epochs, optimizer=optimizer, validate_every=epochs)
    runs = bench.train(
        {
            (kind, depth): plain._replace(network=partial(SmallResNet, depth=depth, width=4, shortcuts=shortcuts))
            for kind, shortcuts in KINDS.items()
            for depth in depths
        }
    )
    loss = last_values(runs, "train/loss")
    images, further = data(), bench.choose(depths, (8, 20, 32, 44, 80, 110))
    batch = next(iter(images.loader("train")))
    norms = {
        (kind, scheme, depth): [
            gradients(shortcuts, depth, scheme, seed, images.spec, batch) for seed in range(bench.seeds)
        ]
        for kind, shortcuts in KINDS.items()
        for scheme in TITLES
        for depth in further
    }
    first = {key: [each[0] for each in runs_of] for key, runs_of in norms.items()}

    mean = means(loss)
    product, total = (first[kind, "xavier_normal", deep] for kind in KINDS)
    degrades = min(loss["plain", deep]) > max(loss["plain", shallow])
    keeps = mean["with shortcuts", deep] <= mean["with shortcuts", shallow]
    passes = max(product) < 0.001 and min(total) >= 0.1
    sentence = (
        f"From depth {shallow} to {deep}, the training loss changes from {mean['plain', shallow]:.3f} to "
        f"{mean['plain', deep]:.3f} without shortcuts ({'every' if degrades else 'not every'} deep run is worse), and "
        f"from {mean['with shortcuts', shallow]:.3f} to {mean['with shortcuts', deep]:.3f} with shortcuts. At depth "
        f"{deep} without normalisation (Xavier), the ratio of gradients is at most {max(product):.0e} without "
        f"shortcuts, and at least {min(total):.2g} with shortcuts."
    )
    accuracy = metric(runs, "test/accuracy")
    columns = {
        "depth": {key: str(key[1]) for key in runs},
        "training loss": spreads(loss, 3),
        "test accuracy": spreads(accuracy),
    }
    for scheme, title in TITLES.items():
        columns[f"ratio of gradients, {title}"] = {
            (kind, depth): f"{statistics.geometric_mean(first[kind, scheme, depth]):.1e}" for kind, depth in runs
        }
    figure, axes = panels(3)
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        for depth, style in zip(depths, STYLES, strict=False):
            curves = [each.column("train/loss") for each in runs[kind, depth]]
            draw_band(axes[0], range(1, epochs + 1), curves, f"{kind}, {depth}", color=colour, linestyle=style)
        for scheme, style in zip(TITLES, ("-", "--"), strict=True):
            label, each = f"{kind}, {TITLES[scheme]}", norms[kind, scheme, deep]
            draw_band(axes[1], range(len(each[0])), each, label, color=colour, linestyle=style)
            across = np.transpose([first[kind, scheme, depth] for depth in further])
            draw_band(axes[2], further, across, label, color=colour, linestyle=style)
    axes[0].set(title="training loss", xlabel="epoch", xticks=range(1, epochs + 1))
    axes[1].set(title=f"gradient after each block, depth {deep}", xlabel="block (0: the stem)")
    axes[2].set(title="ratio of gradients, stem to last block", xlabel="depth")
    for axis in axes:
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    numbers = {"train/loss": loss, "test/accuracy": accuracy, "gradient": first}
    table = rows("network", {key: key[0] for key in runs}, columns)
    return Finding(degrades and keeps and passes, sentence, table, figure, numbers)
