"""Nearest-pixel sampling gives a localiser no gradient, and bilinear sampling does; only then does it learn to rotate.

Protocol: Train on MNIST with random rotations of up to 60 degrees. Every test image has the angles -60, -30, 0, 30 and
60 degrees. Compare LeNet (ReLU, max pooling) alone, LeNet behind a rotation transformer with nearest-pixel sampling or
with bilinear sampling, and nearest-pixel sampling with the upright loss (weight 2). The upright loss compares the
positions of pixels, not the sampled values. Each run has 17,640 training images and 6 epochs (105,840 images). Before
training, measure the norm of the gradient of the classification loss over all parameters of the localiser, on 512
rotated training images, for each seed.

The claim holds if both are true:

- For every seed, this norm is exactly 0 with nearest-pixel sampling and above 0 with bilinear sampling.
- Every bilinear run ends with a lower uprightness (0: all images upright, 1: no rotation) than every nearest-pixel run.

Accuracy and the upright loss are reported in addition.
"""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

from upright.data.augmentation import RandomAffine
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, means, metric, panels, rows, spreads
from upright.training.model import Model

TITLES = {
    "lenet": "LeNet alone",
    "nearest": "nearest",
    "bilinear": "bilinear",
    "upright": "nearest, upright loss",
}
NETWORKS = {name: transformed("rotation", sampling=name) for name in ("nearest", "bilinear")}


def gradient(experiment: Experiment, seed: int) -> float:
    """Return the norm of the localiser's gradient before any training."""
    data = experiment.data()
    torch.manual_seed(seed)
    model = Model(data.spec, experiment.network(data.spec.input_shape, 10))
    batch = data.samples("train")[:512]
    loss: torch.Tensor = cross_entropy(model(data.augmentation(batch.images).images), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    transformer = model.get_submodule("network.transformer")
    gradients = [parameter.grad for parameter in transformer.parameters() if parameter.grad is not None]
    return float(torch.cat([each.flatten() for each in gradients]).norm())


def run(bench: Bench) -> Finding:
    data = bench.data(
        train_fraction=bench.choose(0.1, 0.3),
        val_fraction=0.02,
        batch_size=128,
        angles=bench.choose((-60, 60), (-60, -30, 0, 30, 60)),
        augment=[partial(RandomAffine, rotate=60)],
    )
    lenet = Experiment(LENET, data, bench.choose(1, 6))
    variants = {"lenet": lenet} | {name: lenet._replace(network=network) for name, network in NETWORKS.items()}
    variants["upright"] = variants["nearest"]._replace(upright_weight=2.0)
    norms = {key: [gradient(variants[key], seed) for seed in range(bench.seeds)] for key in NETWORKS}
    runs = bench.train(variants)
    accuracy, uprightness = metric(runs, "test/accuracy"), metric(runs, "test/uprightness")
    right, mean = means(accuracy), means(uprightness)
    none_and_some = not any(norms["nearest"]) and all(norms["bilinear"])
    learns = max(uprightness["bilinear"]) < min(uprightness["nearest"])
    sentence = (
        f"Before training, the norm of the localiser's gradient is at most {max(norms['nearest']):g} with "
        f"nearest-pixel sampling, and {min(norms['bilinear']):.2g} to {max(norms['bilinear']):.2g} with bilinear "
        f"sampling. After training, nearest-pixel sampling has an uprightness of {mean['nearest']:.3f} and an accuracy "
        f"of {right['nearest']:.4f} (LeNet alone: {right['lenet']:.4f}); bilinear sampling has {mean['bilinear']:.3f} "
        f"and {right['bilinear']:.4f}. The gradient of the upright loss does not depend on sampled values: with it, "
        f"nearest-pixel sampling has {mean['upright']:.3f} and {right['upright']:.4f}."
    )
    columns = {
        "gradient before training": spreads(norms, 3),
        "uprightness": spreads(uprightness, 3),
        "test accuracy": spreads(accuracy),
    }
    figure, axes = panels(3, width=3.6)
    plots = {"norm of the gradient before training": norms, "uprightness": uprightness, "test accuracy": accuracy}
    for axis, (name, groups) in zip(axes, plots.items(), strict=True):
        draw_points(axis, groups, name, TITLES)
    axes[1].set_ylim(bottom=-0.03)
    numbers = {"gradient": norms, "test/uprightness": uprightness, "test/accuracy": accuracy}
    return Finding(none_and_some and learns, sentence, rows("network", TITLES, columns), figure, numbers)
