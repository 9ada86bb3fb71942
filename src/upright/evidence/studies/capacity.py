"""More capacity lowers the training error, while the test error first falls and then rises: large networks overfit.

Protocol: Train MLPs with one hidden layer of 1, 2, 4, 8, 16, 64, 256 and 1,024 ReLU units, without regularisation. The
training set is 999 MNIST images. Each run has 30 epochs in batches of 64 (29,970 images). The optimiser is SGD with
momentum 0.9 and a one-cycle schedule that peaks at a learning rate of 0.05. Evaluate the weights after the last epoch
on the training images, on 6,000 validation images and on 10,000 test images. The seeds change weights and order.

The claim holds if both are true:

- In every run, the training error is lower with 1,024 units than with 1.
- In every run, the widest network has a higher test error than the width with the lowest mean validation error, and
  that width is not 1.

At first, the first rule compared with 8 units. With 8 units no training error is left, so no width can be lower.
"""

from functools import partial

import numpy as np
from torch.optim import SGD

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench, Experiment, Run
from upright.evidence.finding import Finding, draw_band, errors, last_values, means, metric, panels, rows, spreads

WIDTHS = (1, 2, 4, 8, 16, 64, 256, 1024)
SMALL, WIDEST = 1, 1024


def run(bench: Bench) -> Finding:
    widths, epochs = bench.choose((SMALL, WIDEST), WIDTHS), bench.choose(2, 30)
    plain = Experiment(
        network=MLP,
        data=bench.data(train_fraction=bench.choose(0.1, 1000 / 54000)),
        epochs=epochs,
        optimizer=partial(SGD, lr=0.05, momentum=0.9),
        validate_every=epochs,
    )
    runs = bench.train({width: plain._replace(network=partial(MLP, widths=(width,))) for width in widths})
    scores = bench.measure(Run.loss_and_accuracy, runs, "train")
    losses = {
        "training": {width: [loss for loss, _ in scores[width]] for width in widths},
        "validation": last_values(runs, "val/loss"),
    }
    error = {
        "training": errors({width: [right for _, right in scores[width]] for width in widths}),
        "validation": errors(last_values(runs, "val/accuracy")),
        "test": errors(metric(runs, "test/accuracy")),
    }
    training, validation, test = (means(groups) for groups in error.values())
    best = min(validation, key=validation.__getitem__)
    fits = all(w < s for w, s in zip(error["training"][WIDEST], error["training"][SMALL], strict=True))
    worse = [widest > other for widest, other in zip(error["test"][WIDEST], error["test"][best], strict=True)]
    sentence = (
        f"From {SMALL} unit to {WIDEST:,} units, the training error changes from {training[SMALL]:.1f} % to "
        f"{training[WIDEST]:.1f} %. The test error is {test[best]:.1f} % with {best:,} units, the width with the "
        f"lowest validation error. It is {test[WIDEST]:.1f} % at the widest, and higher in {sum(worse)} of "
        f"{len(worse)} runs."
    )
    columns = {f"{title} error, %": spreads(groups, 1) for title, groups in error.items()}
    columns |= {f"{title} loss": spreads(groups, 3) for title, groups in losses.items()}
    table = rows("units", {width: f"{width:,}" for width in widths}, columns)
    figure, axes = panels(2)
    plots = {"error, %": {title: error[title] for title in ("training", "test")}, "loss": losses}
    for axis, (measure, lines) in zip(axes, plots.items(), strict=True):
        for title, groups in lines.items():
            draw_band(axis, widths, np.transpose([*groups.values()]), title, marker="o", markersize=3)
        axis.set(xscale="log", xlabel="hidden units", ylabel=measure, ylim=(0, None))
        axis.legend()
    return Finding(fits and all(worse) and best > SMALL, sentence, table, figure, {"error": error, "loss": losses})
