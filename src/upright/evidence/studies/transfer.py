"""On few images a network that learnt from more before does better than one from scratch, the fewer the better.

Protocol: a ResNet-14 of width 8 learns the digits 0 to 4 of MNIST (27,500 images, 3 epochs). Its target are the digits
5 to 9, none of which it has seen, of 20, 100, 500 and 2,500 training images: from scratch; fine-tuned, all at one
learning rate; fine-tuned, the body at a tenth of the rate; and with a frozen body, the head alone. All have the same
number of steps (about 300, batches of at most 32) and one schedule; a tenth of the digits 5 to 9 is for validation,
which picks the checkpoint, after every epoch or at 20 to 24 of them. The test images are those of 5 to 9.

It holds if at every target size the best way of fine-tuning has the higher mean accuracy than the training from
scratch, and its lead is greater at the smallest size than at the largest.
"""

import statistics
from functools import partial
from typing import Any, ClassVar

import numpy as np

from upright.architectures.resnet import SmallResNet
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.mnist import MNIST
from upright.data.source import Source
from upright.evidence.bench import Bench, Experiment
from upright.evidence.plots import draw_band, panels
from upright.evidence.study import Finding, mean_and_spread, values
from upright.images import ImageSpec
from upright.training.finetuning import Freeze


class Half(ImageDataModule):
    """Five of the ten digits of another data set."""

    whole: ClassVar[type[ImageDataModule]]
    chosen: ClassVar[tuple[int, ...]]

    @property
    def spec(self) -> ImageSpec:
        """With their names alone."""
        spec = self.whole().spec
        return ImageSpec(spec.channels, spec.height, spec.width, tuple(map(str, self.chosen)), spec.mean, spec.std)

    def read(self) -> Source:
        """Their images."""
        source = self.whole().read()
        kept = np.flatnonzero(np.isin(source.labels, self.chosen))
        labels = np.asarray(source.labels)[kept] - self.chosen[0]
        splits = source.splits and {
            name: np.searchsorted(kept, np.intersect1d(part, kept)).tolist() for name, part in source.splits.items()
        }
        images = [source.images[index] for index in kept.tolist()]
        return Source(images, labels.tolist(), [source.names[index] for index in kept.tolist()], splits)


class FirstMNIST(Half):
    """0 to 4."""

    whole, chosen = MNIST, tuple(range(5))


class SecondMNIST(Half):
    """5 to 9."""

    whole, chosen = MNIST, tuple(range(5, 10))


class FirstDigits(Half):
    """0 to 4."""

    whole, chosen = Digits, tuple(range(5))


class SecondDigits(Half):
    """5 to 9."""

    whole, chosen = Digits, tuple(range(5, 10))


TIMES = 20
WAYS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "fine-tuned": {},
    "fine-tuned, body at a tenth": {"callbacks": (partial(Freeze, lr_factor=0.1),)},
    "head alone": {"callbacks": (partial(Freeze, until_epoch=10_000),)},
}


def run(bench: Bench) -> Finding:
    """Learn from the first half, then from a little of the second in four ways."""
    ways = bench.choose(tuple(WAYS)[:2], tuple(WAYS))
    sizes = bench.choose((20,), (20, 100, 500, 2500))
    first, second = bench.choose((FirstDigits, SecondDigits), (FirstMNIST, SecondMNIST))
    available = bench.choose(610, 26_500)
    body = partial(SmallResNet, depth=bench.choose(8, 14), width=bench.choose(4, 8))
    common: dict[str, Any] = {"val_fraction": 0.1}
    larger = bench.train({"source": Experiment(body, partial(first, batch_size=128, **common), bench.choose(1, 3))})

    def epochs(size: int) -> int:
        return max(round(bench.choose(4, 300) * min(32, size) / size), 1)

    def every(size: int) -> int:
        return max(epochs(size) // TIMES, 1)

    def target(size: int, way: str, seed: int) -> Experiment:
        data = partial(second, batch_size=min(32, size), train_fraction=size / available, **common)
        start = None if way == "from scratch" else larger["source"][seed].folder / "best.ckpt"
        return Experiment(body, data, epochs(size), validate_every=every(size), start_from=start, **WAYS[way])

    names = {(size, way): f"{way.replace(', ', '_').replace(' ', '_')}_{size}" for size in sizes for way in ways}
    runs = bench.train({name: partial(target, *key) for key, name in names.items()})
    accuracy = {key: values(runs[name], "test/accuracy") for key, name in names.items()}
    mean = {key: statistics.mean(found) for key, found in accuracy.items()}
    lead = {size: max(mean[size, way] for way in ways if way != "from scratch") for size in sizes}
    lead = {size: best - mean[size, "from scratch"] for size, best in lead.items()}
    held = min(lead.values()) > 0 and lead[sizes[0]] > lead[sizes[-1]]
    sentence = "The best way of fine-tuning, by this measure, is ahead of training from scratch by " + ", ".join(
        f"{100 * lead[size]:.1f} points with {size:,} images" for size in sizes
    )
    table = [
        {"way": way} | {f"{size:,} images": mean_and_spread(accuracy[size, way]) for size in sizes} for way in ways
    ]
    figure, axes = panels(2, width=4.8)
    shown = sizes[len(sizes) // 3]
    for way in ways:
        draw_band(axes[0], sizes, list(zip(*(accuracy[size, way] for size in sizes), strict=True)), way)
        curves = [each.column("val/accuracy") for each in runs[names[shown, way]]]
        draw_band(axes[1], range(every(shown), epochs(shown) + 1, every(shown)), curves, way)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("training images of the target", fontsize=9)
    axes[0].set_ylabel("test accuracy", fontsize=9)
    axes[0].legend(fontsize=8)
    axes[1].set_xlabel(f"epoch, {shown} images", fontsize=9)
    axes[1].set_ylabel("validation accuracy", fontsize=9)
    numbers = {f"{way}, {size}": found for (size, way), found in accuracy.items()}
    source = values(larger["source"], "test/accuracy")
    return Finding(held, f"{sentence}.", table, figure, {"test/accuracy": numbers, "source": source})
