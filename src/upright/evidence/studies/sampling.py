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
from statistics import mean

import torch
from torch.nn.functional import cross_entropy

from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.augmentation import RandomAffine
from upright.evidence.bench import Bench, Experiment
from upright.evidence.plots import draw_points, panels
from upright.evidence.study import Finding, mean_and_spread, values
from upright.training.model import Model
from upright.warp import Sampling

TITLES = {
    "lenet": "LeNet alone",
    "nearest": "nearest",
    "bilinear": "bilinear",
    "upright": "nearest, upright loss",
}
LENET = partial(LeNet, activation="relu", pooling="max")


def network(sampling: Sampling) -> partial[TransformerNetwork]:
    """LeNet behind a rotation transformer."""
    transformer = partial(SpatialTransformer, transform="rotation", sampling=sampling, padding="border")
    return partial(TransformerNetwork, transformer=transformer, network=LENET)


def gradient(experiment: Experiment, seed: int) -> float:
    """Norm of the localiser's gradient before any training."""
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
    nearest = Experiment(network("nearest"), data, bench.choose(1, 6))
    experiments = {
        "lenet": nearest._replace(network=LENET),
        "nearest": nearest,
        "bilinear": nearest._replace(network=network("bilinear")),
        "upright": nearest._replace(upright_weight=2.0),
    }
    norms = {key: [gradient(experiments[key], seed) for seed in range(bench.seeds)] for key in ("nearest", "bilinear")}
    runs = bench.train(experiments)
    accuracy, uprightness = (
        {key: values(runs[key], f"test/{name}") for key in runs} for name in ("accuracy", "uprightness")
    )
    none_and_some = not any(norms["nearest"]) and all(norms["bilinear"])
    learns = max(uprightness["bilinear"]) < min(uprightness["nearest"])
    sentence = (
        f"Before training, the gradient's norm over the localiser is {max(norms['nearest']):g} with the nearest pixel "
        f"in every seed, and {min(norms['bilinear']):.2g} to {max(norms['bilinear']):.2g} bilinearly. Trained, the "
        f"nearest ends at an uprightness of {mean(uprightness['nearest']):.3f} and an accuracy of "
        f"{mean(accuracy['nearest']):.4f} (LeNet alone: {mean(accuracy['lenet']):.4f}), bilinear at "
        f"{mean(uprightness['bilinear']):.3f} and {mean(accuracy['bilinear']):.4f}. With the upright loss, whose "
        f"gradient does not pass the pixels, the nearest gets to {mean(uprightness['upright']):.3f} and "
        f"{mean(accuracy['upright']):.4f}."
    )
    table = [
        {
            "network": title,
            "gradient at the start": mean_and_spread(norms.get(key, []), 3),
            "uprightness": mean_and_spread(uprightness[key], 3),
            "test accuracy": mean_and_spread(accuracy[key]),
        }
        for key, title in TITLES.items()
    ]
    figure, axes = panels(3, width=3.6)
    shown = {key: title.replace(" ", "\n", 1) for key, title in TITLES.items()}
    draw_points(axes[0], {shown[key]: norms.get(key, []) for key in runs}, "gradient's norm at the start")
    draw_points(axes[1], {shown[key]: uprightness[key] for key in runs}, "uprightness")
    draw_points(axes[2], {shown[key]: accuracy[key] for key in runs}, "test accuracy")
    axes[1].set_ylim(bottom=-0.03)
    numbers = {"gradient": norms, "test/uprightness": uprightness, "test/accuracy": accuracy}
    return Finding(none_and_some and learns, sentence, table, figure, numbers)
