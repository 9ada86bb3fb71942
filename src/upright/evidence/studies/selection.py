"""The best of M models on N validation images is less accurate than its score, more so for large M and small N.

Protocol: Train 24 MLPs on 5,000 MNIST images for 3 epochs (Adam, batches of 64). Their width (16 to 256), learning rate
(0.0003 to 0.01) and dropout (0 to 0.5) are random. Repeat 400 times: choose the best of M models on N of the 10,000
test images, and estimate its accuracy on the other test images. The difference is the optimism. In 40 of these draws,
also compute the bootstrap estimate of `upright select` from the N images alone, and two bounds that hold with 95 %
probability. M is 4 or 24; N is 100, 400 or 1,600. The seeds change models, weights and draws.

The claim holds if all are true:

- For every seed, the mean optimism is above 0, larger for 24 models than for 4, and smaller for 1,600 images than for
  100.
- The bootstrap estimate (mean over seeds) is between two thirds and three halves of the optimism.
"""

import statistics
from functools import partial
from math import log, sqrt

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench
from upright.evidence.finding import Finding, draw_band, means, panels, rows, spreads
from upright.evidence.selecting.optimism import Floats, optimism, resampled

MODELS, IMAGES = (4, 24), (100, 400, 1600)
KINDS = ("optimism", "bootstrap", "Hoeffding", "Maurer and Pontil")
DELTA = 0.05


def hoeffding(models: int, images: int) -> float:
    """Return the distance between measured and true mean that no model exceeds, with 95 %, whatever the variance.

    The eps of ``DELTA = 2 M exp(-2 N eps^2)``: Hoeffding's inequality (1963) and the union bound (Shalev-Shwartz and
    Ben-David 2014, section 11.2).
    """
    return sqrt(log(2 * models / DELTA) / (2 * images))


def empirical_bernstein(scores: Floats, models: int) -> float:
    """Return the distance for the chosen model with ``scores`` ``(N,)``; it depends on their variance.

    ``sqrt(2 V L / N) + 7 L / (3 (N - 1))`` with ``L = ln(2 M / DELTA)``: Maurer and Pontil (2009), corollary 5.
    """
    images, level = len(scores), log(2 * models / DELTA)
    return sqrt(2 * float(scores.var(ddof=1)) * level / images) + 7 * level / (3 * (images - 1))


def answers(bench: Bench, candidate: int, seed: int) -> Floats:
    """Train a candidate; return for each test image whether its answer is correct, 1 or 0, ``(N,)``."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 * seed + candidate)
    data = bench.data()()
    training, test = data.samples("train"), data.samples("test")[:]
    sample = training[torch.randperm(len(training))[: bench.choose(500, 5000)]]
    width, rate = int(16 * 16 ** float(torch.rand(()))), 0.0003 * (0.01 / 0.0003) ** float(torch.rand(()))
    network = MLP(data.spec.input_shape, 10, widths=(width,), dropout=0.5 * float(torch.rand(())))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for _ in range(3):
        for batch in torch.split(torch.randperm(len(sample.labels)), 64):
            optimizer.zero_grad()
            logits = network(sample.images[batch].float() / 255)
            cross_entropy(logits, sample.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        guesses = network.eval()(test.images.float() / 255).argmax(1)
    right: Floats = (guesses == test.labels).numpy().astype(np.float64)
    return right


def draw(scores: Floats, models: int, images: int, generator: np.random.Generator, estimated: bool) -> list[float]:
    """Return the optimism of one choice; if ``estimated``, also its bootstrap estimate and the two bounds."""
    candidates = generator.choice(len(scores), models, replace=False)
    order = generator.permutation(scores.shape[1])
    sample, rest = scores[candidates][:, order[:images]], scores[candidates][:, order[images:]]
    accuracies = sample.mean(axis=1)
    best = int(accuracies.argmax())
    numbers = [float(accuracies[best] - rest[best].mean())]
    if estimated:
        noise = resampled(sample, seed=int(generator.integers(2**31)), resamples=500)
        numbers += [optimism(accuracies, noise), hoeffding(models, images), empirical_bernstein(sample[best], models)]
    return numbers


def run(bench: Bench) -> Finding:
    draws, estimates = bench.choose((20, 4), (400, 40))
    images = bench.choose(IMAGES[:1], IMAGES)
    keys = [(count, size) for count in MODELS for size in images]
    numbers: dict[str, dict[tuple[int, int], list[float]]] = {kind: {key: [] for key in keys} for kind in KINDS}
    for seed in range(bench.seeds):
        candidates = [(candidate, seed) for candidate in range(MODELS[-1])]
        scores = np.stack(bench.map(partial(answers, bench), candidates))
        generator = np.random.default_rng(seed)
        for key in keys:
            results = [draw(scores, *key, generator, number < estimates) for number in range(draws)]
            for index, kind in enumerate(KINDS):
                numbers[kind][key].append(statistics.mean(each[index] for each in results if len(each) > index))
    true, mean = numbers["optimism"], {kind: means(groups) for kind, groups in numbers.items()}
    few, many = MODELS
    grows = all(more > less for size in images for less, more in zip(true[few, size], true[many, size], strict=True))
    falls = len(images) == 1 or all(
        large < small
        for count in MODELS
        for small, large in zip(true[count, images[0]], true[count, images[-1]], strict=True)
    )
    ratios, widths = ([mean[kind][key] / mean["optimism"][key] for key in keys] for kind in ("bootstrap", "Hoeffding"))
    close = min(ratios) >= 2 / 3 and max(ratios) <= 3 / 2
    worst, least = mean["optimism"][many, images[0]], mean["optimism"][few, images[-1]]
    sentence = (
        f"The true accuracy of the best of {many} models on {images[0]} images is {100 * worst:.2f} points below its "
        f"score. For the best of {few} on {images[-1]:,} images it is {100 * least:.2f} points. The bootstrap estimate "
        f"is {min(ratios):.2f} to {max(ratios):.2f} times the optimism, and Hoeffding's bound {min(widths):.0f} to "
        f"{max(widths):.0f} times."
    )
    columns = {"N": {(count, size): f"{size:,}" for count, size in keys}}
    columns |= {kind: spreads(groups) for kind, groups in numbers.items()}
    figure, axes = panels(2, width=4.6)
    for axis, count in zip(axes, MODELS, strict=True):
        for kind in KINDS:
            draw_band(axis, images, np.transpose([numbers[kind][count, size] for size in images]), kind)
        axis.set(xscale="log", yscale="log", title=f"the best of {count}", xlabel="validation images")
        axis.set_ylabel("optimism, estimate or bound")
    axes[0].legend()
    record = {"M={}, N={}".format(*key): {kind: numbers[kind][key] for kind in KINDS} for key in keys}
    held = min(map(min, true.values())) > 0 and grows and falls and close
    return Finding(held, sentence, rows("M", {key: str(key[0]) for key in keys}, columns), figure, record)
