"""Weight decay and dropout narrow the gap between training and validation loss on a small training set.

Protocol: Train an MLP with two hidden layers of 512 ReLU units on 999 MNIST images, for 30 epochs in batches of 64
(29,970 images). The optimiser is SGD with momentum 0.9 and a one-cycle schedule that peaks at a learning rate of 0.05.
Compare no regularisation, weight decay of 0.003, 0.01 and 0.03 (on weights, not on biases), and dropout of 0.2, 0.5 and
0.8 in both hidden layers. Evaluate the weights after the last epoch without dropout: loss on the training images and on
6,000 validation images, and test accuracy. The seeds change weights, order and dropout.

The claim holds if both are true for weight decay 0.01 and for dropout 0.5:

- Every run has a smaller gap between validation and training loss than every run without regularisation.
- The mean test accuracy is not lower than without regularisation.
"""

from functools import partial

import numpy as np
from torch.optim import SGD

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench, Experiment, Run
from upright.evidence.finding import Finding, draw_points, errors, last_values, means, metric, panels, rows, spreads

DECAYS, DROPOUTS = (0.003, 0.01, 0.03), (0.2, 0.5, 0.8)
PLAIN, COMPARED = "none", ("decay 0.01", "dropout 0.5")


def run(bench: Bench) -> Finding:
    epochs = bench.choose(2, 30)

    def variant(decay: float = 0.0, dropout: float = 0.0) -> Experiment:
        return Experiment(
            network=partial(MLP, widths=(512, 512), dropout=dropout),
            data=bench.data(train_fraction=bench.choose(0.1, 1000 / 54000)),
            epochs=epochs,
            optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=decay),
            validate_every=epochs,
        )

    variants = {PLAIN: variant()}
    variants |= {f"decay {decay}": variant(decay=decay) for decay in bench.choose(DECAYS[1:2], DECAYS)}
    variants |= {f"dropout {share}": variant(dropout=share) for share in bench.choose(DROPOUTS[1:2], DROPOUTS)}
    runs = bench.train(variants)
    scores = bench.measure(Run.loss_and_accuracy, runs, "train")
    training = {name: [loss for loss, _ in scores[name]] for name in runs}
    validation = last_values(runs, "val/loss")
    gap = {name: np.subtract(validation[name], training[name]).tolist() for name in runs}
    accuracy = metric(runs, "test/accuracy")
    mean_gap, mean_accuracy = means(gap), means(accuracy)
    narrower = {name: max(gap[name]) < min(gap[PLAIN]) for name in COMPARED}
    as_good = {name: mean_accuracy[name] >= mean_accuracy[PLAIN] for name in COMPARED}
    sentence = " ".join(
        f"{name.capitalize()} {'narrows' if narrower[name] else 'does not clearly narrow'} the gap from "
        f"{mean_gap[PLAIN]:.3f} to {mean_gap[name]:.3f}, and the test accuracy is "
        f"{'not lower' if as_good[name] else 'lower'}: {mean_accuracy[name]:.4f} instead of {mean_accuracy[PLAIN]:.4f}."
        for name in COMPARED
    )
    losses = {"training loss": training, "validation loss": validation, "gap": gap}
    columns = {title: spreads(groups, 3) for title, groups in losses.items()} | {"test accuracy": spreads(accuracy)}
    figure, axes = panels(2, width=5.2)
    plots = {"gap: validation loss - training loss": gap, "test error, %": errors(accuracy)}
    for axis, (title, groups) in zip(axes, plots.items(), strict=True):
        draw_points(axis, groups, title, [*runs])
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    held = all(narrower.values()) and all(as_good.values())
    table = rows("regularisation", [*runs], columns)
    numbers = {"train/loss": training, "val/loss": validation, "test/accuracy": accuracy}
    return Finding(held, sentence, table, figure, numbers)
