"""Initial weights that suit ReLU or tanh preserve signals and gradients; small weights or a sigmoid lose the gradient.

Protocol: Take an MLP with 10 hidden layers of 256 units before any training, and 512 MNIST training images. In each
hidden layer, measure the standard deviation of the activations over units and images. Measure the same for the gradient
of the loss with respect to the activations. The activation is ReLU, tanh or sigmoid. The weights are He's (variance 2 /
inputs), Xavier's (variance 2 / (inputs + outputs)), or have a standard deviation of 0.01. Biases are 0. The seeds
change the weights.

The claim holds if both are true for every seed:

- With ReLU and He, and with tanh and Xavier, activations and gradients of the first and last hidden layer differ by a
  factor of less than 10.
- With a standard deviation of 0.01, and with the sigmoid and any weights, the gradients differ by a factor of more than
  1,000.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from upright.architectures.initialisation import Scheme, initialise
from upright.architectures.layers import ACTIVATIONS, Activation
from upright.architectures.mlp import MLP
from upright.data.batch import Batch
from upright.evidence.bench import Bench, signals_and_gradients
from upright.evidence.finding import Finding, draw_band, panels, rows
from upright.images import ImageSpec
from upright.runs.drawing import COLOURS

LAYERS, WIDTH = 10, 256
SCHEMES: dict[Scheme, str] = {"he_normal": "He", "xavier_normal": "Xavier", "normal": "std 0.01"}
TITLES: dict[Activation, str] = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}
FIT: set[tuple[Activation, Scheme]] = {("relu", "he_normal"), ("tanh", "xavier_normal")}


def sizes(spec: ImageSpec, batch: Batch, activation: Activation, scheme: Scheme, seed: int) -> list[list[float]]:
    """Return the standard deviations of the activations and of their gradients in each hidden layer."""
    torch.manual_seed(seed)
    network = MLP(spec.input_shape, len(spec.classes), widths=(WIDTH,) * LAYERS, activation=activation)
    initialise(network, scheme)
    layers = [layer for layer in network.layers if isinstance(layer, ACTIVATIONS[activation])]
    tensors = signals_and_gradients(network, layers, spec, batch)
    return [[float(values.detach().std()) for values in each] for each in tensors]


def change(layers: Sequence[float]) -> float:
    """Return the factor between the first and the last layer, at least 1."""
    return max(layers[0], layers[-1]) / max(min(layers[0], layers[-1]), 1e-38)


def run(bench: Bench) -> Finding:
    data = bench.data()()
    batch = data.samples("train")[slice(512)]
    keys = [(activation, scheme) for activation in TITLES for scheme in SCHEMES]
    # The shape of each value is (runs, layers).
    signal, gradient = {}, {}
    for key in keys:
        runs = [sizes(data.spec, batch, *key, seed) for seed in range(bench.seeds)]
        signal[key], gradient[key] = ([each[index] for each in runs] for index in (0, 1))
    most = max(change(each) for key in FIT for each in (*signal[key], *gradient[key]))
    least = min(
        change(each) for key, runs in gradient.items() if key[0] == "sigmoid" or key[1] == "normal" for each in runs
    )
    sentence = (
        f"With ReLU and He, and with tanh and Xavier, activations and gradients change by a factor of at most "
        f"{most:.1f} over {LAYERS} layers. With a standard deviation of 0.01, and with the sigmoid, gradients change "
        f"by a factor of at least {least:.1e}."
    )
    columns = {"weights": {key: SCHEMES[key[1]] for key in keys}}
    for heading, runs_of, layer in (
        ("activations, layer 1", signal, 0),
        (f"activations, layer {LAYERS}", signal, -1),
        (f"gradients, layer {LAYERS}", gradient, -1),
        ("gradients, layer 1", gradient, 0),
    ):
        columns[heading] = {key: f"{statistics.mean(each[layer] for each in runs_of[key]):.1e}" for key in keys}
    figure, axes = panels(3, 2)
    for row, (title, runs_of) in enumerate({"activations": signal, "gradients": gradient}.items()):
        # Use one scale per row, so that columns are comparable.
        values = np.array([*runs_of.values()])
        for axis, activation in zip(axes[3 * row :], TITLES, strict=False):
            for colour, (scheme, weights) in zip(COLOURS, SCHEMES.items(), strict=False):
                draw_band(axis, range(1, LAYERS + 1), runs_of[activation, scheme], weights, color=colour)
            axis.set(yscale="log", xlabel="layer", ylabel=f"standard deviation of {title}", title=TITLES[activation])
            axis.set_ylim(values.min() / 3, values.max() * 3)
    axes[0].legend(fontsize=7)
    numbers = {key: {"activations": signal[key], "gradients": gradient[key]} for key in keys}
    table = rows("activation", {key: TITLES[key[0]] for key in keys}, columns)
    return Finding(most < 10 and least > 1000, sentence, table, figure, numbers)
