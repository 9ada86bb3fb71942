"""With capacity the error on training images falls, and that on others falls first, then rises: too much overfits.

Protocol: 999 of MNIST's training images, an MLP of one hidden layer of 1, 2, 4, 8, 16, 64, 256 and 1,024 units with
ReLU, nothing to regularise it, 30 epochs in batches of 64 (29,970 images seen), SGD at a rate of 0.05 in one cycle,
momentum 0.9. Of the weights after the last epoch: the error on the training images, on 6,000 of validation, and on
10,000 of test. The seeds change weights and order.

It holds if (1) the training error is lower at 1,024 units than at 1 in every run; (2) the test error of the widest
network is higher, in every run, than that of the width of the lowest validation error on average, which is more than
1. (First, rule 1 spoke of 8 units; with 8 no training error is left, and nothing can be lower.)
"""

from functools import partial

import numpy as np
from torch.optim import SGD

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench, Experiment
from upright.evidence.finding import Finding, draw_band, means, measured, panels, rows, spreads

WIDTHS = (1, 2, 4, 8, 16, 64, 256, 1024)
SMALL, WIDEST = 1, 1024


def run(bench: Bench) -> Finding:
    """Train at every width."""
    widths, epochs = bench.choose((SMALL, WIDEST), WIDTHS), bench.choose(2, 30)
    variants = {
        f"width-{width}": Experiment(
            network=partial(MLP, widths=(width,)),
            data=bench.data(train_fraction=bench.choose(0.1, 1000 / 54000)),
            epochs=epochs,
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            validate_every=epochs,
        )
        for width in widths
    }
    runs = dict(zip(widths, bench.train(variants).values(), strict=True))
    scores = bench.losses_and_accuracies(runs, "train")
    losses = {
        "training": {width: [loss for loss, _ in scores[width]] for width in widths},
        "validation": {width: [run.column("val/loss")[-1] for run in runs[width]] for width in widths},
    }
    right = {
        "training": {width: [right for _, right in scores[width]] for width in widths},
        "validation": {width: [run.column("val/accuracy")[-1] for run in runs[width]] for width in widths},
        "test": measured(runs, "test/accuracy"),
    }
    errors = {
        split: {width: [100 * (1 - share) for share in shares] for width, shares in groups.items()}
        for split, groups in right.items()
    }
    training, validation, test = (means(groups) for groups in errors.values())
    best = min(widths, key=lambda width: validation[width])
    fits = all(w < s for w, s in zip(errors["training"][WIDEST], errors["training"][SMALL], strict=True))
    worse = [widest > other for widest, other in zip(errors["test"][WIDEST], errors["test"][best], strict=True)]
    sentence = (
        f"From {SMALL} unit to {WIDEST:,} the training error goes from {training[SMALL]:.1f} to "
        f"{training[WIDEST]:.1f} %; the test error is {test[best]:.1f} % at {best:,}, the width of the lowest "
        f"validation error, and {test[WIDEST]:.1f} % at the widest, higher in {sum(worse)} of {len(worse)} runs."
    )
    columns = {f"{title} error, %": spreads(groups, 1) for title, groups in errors.items()}
    columns |= {f"{title} loss": spreads(groups, 3) for title, groups in losses.items()}
    table = rows("units", {width: f"{width:,}" for width in widths}, columns)
    figure, axes = panels(2)
    plots = {"error, %": {title: errors[title] for title in ("training", "test")}, "loss": losses}
    for axis, (measure, lines) in zip(axes, plots.items(), strict=True):
        for title, groups in lines.items():
            draw_band(axis, widths, np.transpose([*groups.values()]), title, marker="o", markersize=3)
        axis.set(xscale="log", xlabel="hidden units", ylabel=measure, ylim=(0, None))
        axis.legend()
    return Finding(fits and all(worse) and best > SMALL, sentence, table, figure, {"error": errors, "loss": losses})
