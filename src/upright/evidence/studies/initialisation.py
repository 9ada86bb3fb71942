"""Weights that fit ReLU or tanh keep signals and gradients at one size; small ones, or a sigmoid, lose the gradient.

Protocol: an MLP of 10 hidden layers of 256 units, before it has learnt anything: the standard deviation (over units and
images) of its activations in each hidden layer for 512 of MNIST's training images, and that of the loss's gradient with
respect to them; with ReLU, tanh and sigmoid, with weights by He (2 / inputs as variance), by Xavier (2 / (inputs +
outputs)), and of deviation 0.01, biases 0. The seeds change the weights.

It holds if in every seed (1) activations and gradients with ReLU and He, and with tanh and Xavier, differ between
first and last hidden layer by a factor of less than 10; (2) gradients with weights of deviation 0.01, and gradients
with the sigmoid whatever the weights, differ by one of more than 1,000.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from upright.architectures.initialisation import Scheme, initialise
from upright.architectures.layers import ACTIVATIONS, Activation
from upright.architectures.mlp import MLP
from upright.data.batch import Batch
from upright.evidence.bench import Bench
from upright.evidence.plots import draw_band, panels
from upright.evidence.study import Finding
from upright.images import ImageSpec
from upright.runs.drawing import COLOURS
from upright.training.model import Model

LAYERS, WIDTH = 10, 256
SCHEMES: dict[Scheme, str] = {"he_normal": "He", "xavier_normal": "Xavier", "normal": "deviation 0.01"}
TITLES: dict[Activation, str] = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}
FIT: set[tuple[Activation, Scheme]] = {("relu", "he_normal"), ("tanh", "xavier_normal")}


def sizes(spec: ImageSpec, batch: Batch, activation: Activation, scheme: Scheme, seed: int) -> list[list[float]]:
    """Deviations of the activations, and those of their gradients, in each hidden layer."""
    torch.manual_seed(seed)
    network = MLP(spec.input_shape, len(spec.classes), widths=(WIDTH,) * LAYERS, activation=activation)
    initialise(network, scheme)
    kept: list[Tensor] = []
    for layer in network.layers:
        if isinstance(layer, ACTIVATIONS[activation]):
            layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    loss = cross_entropy(Model(spec, network)(batch.images), batch.labels)
    return [[float(values.detach().std()) for values in each] for each in (kept, torch.autograd.grad(loss, kept))]


def change(layers: Sequence[float]) -> float:
    """By what factor first and last differ, at least 1."""
    return max(layers[0], layers[-1]) / max(min(layers[0], layers[-1]), 1e-38)


def run(bench: Bench) -> Finding:
    """Measure every activation with every scheme."""
    data = bench.data()()
    batch = data.samples("train")[slice(512)]
    found = {
        (activation, scheme): [sizes(data.spec, batch, activation, scheme, seed) for seed in range(bench.seeds)]
        for activation in TITLES
        for scheme in SCHEMES
    }
    signal, gradient = ({key: [each[which] for each in runs] for key, runs in found.items()} for which in (0, 1))
    kept = max(change(each) for key in FIT for each in (*signal[key], *gradient[key]))
    lost = min(
        change(each) for key, runs in gradient.items() if key[0] == "sigmoid" or key[1] == "normal" for each in runs
    )
    sentence = (
        f"Over {LAYERS} layers activations and gradients change by a factor of at most {kept:.1f} with ReLU and He and "
        f"with tanh and Xavier; with weights of deviation 0.01, and with the sigmoid, gradients change by one of at "
        f"least {lost:.1e}."
    )
    table = [
        {
            "activation": TITLES[activation],
            "weights": SCHEMES[scheme],
            "activations, layer 1": _mean(signal[activation, scheme], 0),
            f"activations, layer {LAYERS}": _mean(signal[activation, scheme], -1),
            f"gradients, layer {LAYERS}": _mean(gradient[activation, scheme], -1),
            "gradients, layer 1": _mean(gradient[activation, scheme], 0),
        }
        for activation, scheme in found
    ]
    figure, axes = panels(3, 2)
    for column, (activation, title) in enumerate(TITLES.items()):
        for row, (what, sized) in enumerate({"activations": signal, "gradients": gradient}.items()):
            axis = axes[3 * row + column]
            for colour, (scheme, weights) in zip(COLOURS, SCHEMES.items(), strict=False):
                draw_band(axis, range(1, LAYERS + 1), sized[activation, scheme], weights, color=colour)
            axis.set(yscale="log", xlabel="layer", ylabel=f"deviation of {what}")
            axis.set_title(title, fontsize=9)
            # One scale for a row, so that columns compare.
            every = [value for runs in sized.values() for each in runs for value in each]
            axis.set_ylim(min(every) / 3, max(every) * 3)
    axes[0].legend(fontsize=7)
    numbers = {
        f"{activation} {scheme}": {"activations": signal[activation, scheme], "gradients": gradient[activation, scheme]}
        for activation, scheme in found
    }
    return Finding(kept < 10 and lost > 1000, sentence, table, figure, numbers)


def _mean(runs: Sequence[Sequence[float]], layer: int) -> str:
    return f"{statistics.mean(each[layer] for each in runs):.1e}"
