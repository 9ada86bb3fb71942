"""Sampling the nearest pixel gives a localiser no gradient, bilinear sampling does; so only then does it learn to turn.

Protocol: MNIST turned at random by up to 60 degrees in training; every test image at -60, -30, 0, 30 and 60 degrees.
LeNet (ReLU, maxima) alone, and behind a rotation transformer that samples the nearest pixel, or bilinearly; and the
nearest one with the upright loss (weight 2), which compares where pixels come from, not what is sampled there. 17,640
training images, 6 epochs (105,840 images seen). The norm of the gradient of the classification loss over all of the
localiser is taken on 512 turned training images before any training, per seed.

It holds if that norm is in every seed exactly 0 with the nearest pixel and above 0 bilinearly; and if every bilinear
run ends with a lower uprightness (0: perfectly upright, 1: not turned at all) than every nearest run. Accuracy and the
upright loss are reported beside it.
"""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

from upright.data.augmentation import RandomAffine
from upright.evidence.bench import LENET, Bench, Experiment, transformed
from upright.evidence.finding import Finding, draw_points, means, measured, panels, rows, spreads
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
    """Measure the gradient, then train with each way of sampling."""
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
    accuracy, uprightness = measured(runs, "test/accuracy"), measured(runs, "test/uprightness")
    right, mean = means(accuracy), means(uprightness)
    none_and_some = not any(norms["nearest"]) and all(norms["bilinear"])
    learns = max(uprightness["bilinear"]) < min(uprightness["nearest"])
    sentence = (
        f"Before training, the gradient's norm over the localiser is {max(norms['nearest']):g} with the nearest pixel "
        f"in every seed, and {min(norms['bilinear']):.2g} to {max(norms['bilinear']):.2g} bilinearly. Trained, the "
        f"nearest ends at an uprightness of {mean['nearest']:.3f} and an accuracy of {right['nearest']:.4f} (LeNet "
        f"alone: {right['lenet']:.4f}), bilinear at {mean['bilinear']:.3f} and {right['bilinear']:.4f}. With the "
        f"upright loss, whose gradient does not pass the pixels, the nearest gets to {mean['upright']:.3f} and "
        f"{right['upright']:.4f}."
    )
    columns = {
        "gradient at the start": spreads(norms, 3),
        "uprightness": spreads(uprightness, 3),
        "test accuracy": spreads(accuracy),
    }
    figure, axes = panels(3, width=3.6)
    plots = {"gradient's norm at the start": norms, "uprightness": uprightness, "test accuracy": accuracy}
    for axis, (name, groups) in zip(axes, plots.items(), strict=True):
        draw_points(axis, {title.replace(" ", "\n", 1): groups.get(key, []) for key, title in TITLES.items()}, name)
    axes[1].set_ylim(bottom=-0.03)
    numbers = {"gradient": norms, "test/uprightness": uprightness, "test/accuracy": accuracy}
    return Finding(none_and_some and learns, sentence, rows("network", TITLES, columns), figure, numbers)
