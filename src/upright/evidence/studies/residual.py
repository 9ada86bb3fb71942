"""Without shortcuts a deep network trains worse than a shallow one; with them it does not, for products become sums.

Protocol: the networks that He et al. 2015 trained on CIFAR-10 (`SmallResNet`, with and without shortcuts, batch
normalisation in both), 4 maps wide, of depth 8, 20 and 44. MNIST, 5,400 of its training images, 3 epochs (16,200
images seen), batches of 64; SGD at a rate of 0.1 in one cycle, momentum 0.9, weight decay 0.0001. The training loss is
the mean over the last epoch.

Then, at the start and without normalisation, for depths up to 110: the gradient of the loss after the stem, over that
after the last block (both as norms over 64 training images). That is what the Jacobians of all blocks make of it.
Xavier's weights, which halve the variance at each ReLU; He's, which are made to keep it, beside them.

It holds if (1) without shortcuts every run of depth 44 ends at a higher training loss than every run of depth 8; (2)
with them its mean is not higher; (3) for every seed the gradient at depth 44 falls to less than 0.001 without
shortcuts, and to no less than 0.1 with them (Xavier).
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
from upright.evidence.finding import Finding, draw_band, means, measured, panels, rows, spreads
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
    """Train both kinds at every depth, and measure gradients in networks before training."""
    depths = bench.choose((8, 14), (8, 20, 44))
    shallow, deep = depths[0], depths[-1]
    data, epochs = bench.data(train_fraction=bench.choose(0.05, 0.1)), bench.choose(1, 3)
    optimizer = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.0001)
    plain = Experiment(SmallResNet, data, epochs, optimizer=optimizer, validate_every=epochs)
    names = {(kind, depth): f"{kind.split()[-1]}-{depth}" for kind in KINDS for depth in depths}
    networks = {
        (kind, depth): partial(SmallResNet, depth=depth, width=4, shortcuts=KINDS[kind]) for kind, depth in names
    }
    results = bench.train({name: plain._replace(network=networks[key]) for key, name in names.items()})
    runs = {key: results[name] for key, name in names.items()}
    loss = {key: [each.column("train/loss")[-1] for each in runs[key]] for key in runs}
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
        f"From depth {shallow} to {deep} the training loss goes from {mean['plain', shallow]:.3f} to "
        f"{mean['plain', deep]:.3f} without shortcuts ({'every' if degrades else 'not every'} deep run is worse), and "
        f"from {mean['with shortcuts', shallow]:.3f} to {mean['with shortcuts', deep]:.3f} with them. Of the gradient "
        f"at the last block of {deep} layers, without normalisation, a share of at most {max(product):.0e} arrives at "
        f"the stem without shortcuts, and of at least {min(total):.2g} with them (Xavier)."
    )
    accuracy = measured(runs, "test/accuracy")
    columns = {
        "depth": {key: str(key[1]) for key in runs},
        "training loss": spreads(loss, 3),
        "test accuracy": spreads(accuracy),
    }
    for scheme, title in TITLES.items():
        columns[f"gradient that arrives, {title}"] = {
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
    axes[2].set(title="gradient that arrives at the stem", xlabel="depth")
    for axis in axes:
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    numbers = {
        "train/loss": {names[key]: each for key, each in loss.items()},
        "test/accuracy": {names[key]: each for key, each in accuracy.items()},
        "gradient": {" ".join(map(str, key)): each for key, each in first.items()},
    }
    return Finding(
        degrades and keeps and passes,
        sentence,
        rows("network", {key: key[0] for key in runs}, columns),
        figure,
        numbers,
    )
