"""The best of M models on N validation images is worth less than it scores there, the more so for large M and small N.

Protocol: 24 MLPs, of a width of 16 to 256, a learning rate of 0.0003 to 0.01 and a dropout of 0 to 0.5 drawn at random,
learn 5,000 images of MNIST for 3 epochs (Adam, batches of 64). In 400 draws N of the 10,000 test images choose the best
of M of them, and the other test images say what it is worth: the difference is the optimism. Beside it, over 40 of
these draws, what the bootstrap of `upright select` makes of the N images alone, and how far the two bounds reach that
hold with 95 %. M is 4 or 24; N is 100, 400 or 1,600. The seeds change candidates, weights and draws.

It holds if the mean optimism of every seed is above 0, greater for 24 models than for 4, and smaller for 1,600 images
than for 100; and if the bootstrap's mean over seeds is within two thirds and three halves of it.
"""

import statistics
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from upright.architectures.mlp import MLP
from upright.evidence.bench import Bench
from upright.evidence.plots import draw_band, panels
from upright.evidence.selecting.optimism import Floats, empirical_bernstein, hoeffding, optimism, resampled
from upright.evidence.study import Finding, mean_and_spread

MODELS, IMAGES = (4, 24), (100, 400, 1600)
KINDS = ("optimism", "bootstrap", "Hoeffding", "Maurer and Pontil")


def answers(bench: Bench, candidate: int, seed: int) -> Floats:
    """Which test images a candidate is right about, ``(N,)``."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 * seed + candidate)
    data = bench.data()()
    learnt, shown = data.samples("train"), data.samples("test")
    chosen = learnt[torch.randperm(len(learnt))[: bench.choose(500, 5000)]]
    width, rate = int(16 * 16 ** float(torch.rand(()))), 0.0003 * (0.01 / 0.0003) ** float(torch.rand(()))
    network = MLP(data.spec.input_shape, 10, widths=(width,), dropout=0.5 * float(torch.rand(())))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for _ in range(3):
        for some in torch.split(torch.randperm(len(chosen.labels)), 64):
            optimizer.zero_grad()
            logits = network(chosen.images[some].float() / 255)
            cross_entropy(logits, chosen.labels[some]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    everything = shown[:]
    with torch.no_grad():
        guesses = network.eval()(everything.images.float() / 255).argmax(1)
    right: Floats = (guesses == everything.labels).numpy().astype(np.float64)
    return right


def draw(scores: Floats, models: int, images: int, generator: np.random.Generator, estimated: bool) -> list[float]:
    """The optimism of one choice; the bootstrap's estimate of it, and how far the bounds reach."""
    some = generator.choice(len(scores), models, replace=False)
    order = generator.permutation(scores.shape[1])
    seen, rest = scores[some][:, order[:images]], scores[some][:, order[images:]]
    means = seen.mean(axis=1)
    best = int(means.argmax())
    found = [float(means[best] - rest[best].mean())]
    if estimated:
        noise = resampled(seen, seed=int(generator.integers(2**31)), resamples=500)
        found += [optimism(means, noise), hoeffding(models, images), empirical_bernstein(seen[best], models)]
    return found


def run(bench: Bench) -> Finding:
    """Train the candidates, then choose among them again and again."""
    draws, estimates = bench.choose((20, 4), (400, 40))
    images = bench.choose(IMAGES[:1], IMAGES)
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for seed in range(bench.seeds):
        candidates = [(candidate, seed) for candidate in range(MODELS[-1])]
        scores = np.stack(bench.map(partial(answers, bench), candidates))
        generator = np.random.default_rng(seed)
        for key in ((count, size) for count in MODELS for size in images):
            drawn = [draw(scores, *key, generator, number < estimates) for number in range(draws)]
            columns = [[each[place] for each in drawn if len(each) > place] for place in range(len(KINDS))]
            for kind, column in zip(KINDS, columns, strict=True):
                found.setdefault(key, {}).setdefault(kind, []).append(statistics.mean(column))
    true = {key: each["optimism"] for key, each in found.items()}
    few, many = MODELS
    grows = all(more > less for size in images for less, more in zip(true[few, size], true[many, size], strict=True))
    falls = len(images) == 1 or all(
        large < small
        for count in MODELS
        for small, large in zip(true[count, images[0]], true[count, images[-1]], strict=True)
    )
    ratios = [statistics.mean(each["bootstrap"]) / statistics.mean(each["optimism"]) for each in found.values()]
    told = min(ratios) >= 2 / 3 and max(ratios) <= 3 / 2
    held = min(map(min, true.values())) > 0 and grows and falls and told
    worst, least = statistics.mean(true[many, images[0]]), statistics.mean(true[few, images[-1]])
    widths = [statistics.mean(each["Hoeffding"]) / statistics.mean(each["optimism"]) for each in found.values()]
    sentence = (
        f"The winner of {many} on {images[0]} images is worth {100 * worst:.2f} points less than it scored, that of "
        f"{few} on {images[-1]:,} {100 * least:.2f}; the bootstrap says {min(ratios):.2f} to {max(ratios):.2f} times "
        f"as much, Hoeffding's bound is {min(widths):.0f} to {max(widths):.0f} times as wide."
    )
    table = [
        {"M": str(count), "N": f"{size:,}"} | {kind: mean_and_spread(each[kind]) for kind in KINDS}
        for (count, size), each in found.items()
    ]
    figure, axes = panels(2, width=4.6)
    for axis, count in zip(axes, MODELS, strict=True):
        for kind in KINDS:
            draw_band(axis, images, list(zip(*(found[count, size][kind] for size in images), strict=True)), kind)
        axis.set(xscale="log", yscale="log", title=f"the best of {count}", xlabel="validation images")
        axis.set_ylabel("accuracy lost, or bound")
    axes[0].legend(fontsize=8)
    numbers = {f"M={count}, N={size}": each for (count, size), each in found.items()}
    return Finding(held, sentence, table, figure, numbers)
