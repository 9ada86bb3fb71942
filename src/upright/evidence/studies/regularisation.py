"""On a small training set, weight decay and dropout narrow the gap between training and validation.

Protocol: 999 of MNIST's training images, an MLP of two hidden layers of 512 with ReLU, 30 epochs in batches of 64
(29,970 images seen), SGD at a rate of 0.05 in one cycle, momentum 0.9; alone, with a weight decay (of weights, not of
biases) of 0.003, 0.01 and 0.03, and with dropout of 0.2, 0.5 and 0.8 in both hidden layers. Of the weights after the
last epoch, without dropout: loss on the training images and on 6,000 of validation, and the test accuracy. The seeds
change weights, order and dropout.

It holds if every run with a weight decay of 0.01, and every run with dropout of 0.5, has a smaller gap of loss between
training and validation than every run without either, and their test accuracy is on average not lower.
"""

import statistics
from functools import partial

from torch.optim import SGD

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench, Experiment
from upright.evidence.plots import draw_points, panels
from upright.evidence.study import Finding, mean_and_spread, values

DECAYS, DROPOUTS = (0.003, 0.01, 0.03), (0.2, 0.5, 0.8)
PLAIN, JUDGED = "neither", {"weight decay": "decay 0.01", "dropout": "dropout 0.5"}


def run(bench: Bench) -> Finding:
    """Train with each of the means at three strengths, and without."""
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
    trained = bench.losses_and_accuracies(runs, "train")
    losses = {
        "train": {name: [loss for loss, _ in trained[name]] for name in runs},
        "val": {name: [run.column("val/loss")[-1] for run in runs[name]] for name in runs},
    }
    gap = {
        name: [after - before for before, after in zip(losses["train"][name], losses["val"][name], strict=True)]
        for name in runs
    }
    accuracy = {name: values(runs[name], "test/accuracy") for name in runs}
    narrower = {what: max(gap[name]) < min(gap[PLAIN]) for what, name in JUDGED.items()}
    as_good = {
        what: statistics.mean(accuracy[name]) >= statistics.mean(accuracy[PLAIN]) for what, name in JUDGED.items()
    }
    sentence = "; ".join(
        f"{name} {'narrows' if narrower[what] else 'does not clearly narrow'} the gap of loss from "
        f"{statistics.mean(gap[PLAIN]):.3f} to {statistics.mean(gap[name]):.3f}, with a test accuracy "
        f"{'not' if as_good[what] else 'that is'} lower: {statistics.mean(accuracy[name]):.4f} after "
        f"{statistics.mean(accuracy[PLAIN]):.4f}"
        for what, name in JUDGED.items()
    )
    table = [
        {
            "regularisation": name,
            "training loss": mean_and_spread(losses["train"][name], 3),
            "validation loss": mean_and_spread(losses["val"][name], 3),
            "gap": mean_and_spread(gap[name], 3),
            "test accuracy": mean_and_spread(accuracy[name]),
        }
        for name in runs
    ]
    figure, axes = panels(2, width=5.2)
    error = {name: [100 * (1 - right) for right in accuracy[name]] for name in runs}
    titles = {"gap: validation loss less training loss": gap, "test error, %": error}
    for axis, (title, found) in zip(axes, titles.items(), strict=True):
        draw_points(axis, {name.replace(" ", "\n"): found[name] for name in runs}, title)
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    numbers = {"train/loss": losses["train"], "val/loss": losses["val"], "test/accuracy": accuracy}
    return Finding(
        all(narrower.values()) and all(as_good.values()),
        f"{sentence[0].upper()}{sentence[1:]}.",
        table,
        figure,
        numbers,
    )
