"""A network pretrained on more images beats one trained from scratch on few images, more so with fewer images.

Protocol: Pretrain a ResNet-14 of width 8 on the digits 0 to 4 of MNIST (27,500 images, 3 epochs). The target task is
the digits 5 to 9, which it has not seen, with 20, 100, 500 or 2,500 training images. Compare four ways: training from
scratch; fine-tuning all weights at one learning rate; fine-tuning the body at a tenth of that rate; and training the
head alone with a frozen body. All have the same schedule and about 300 steps in batches of at most 32. A tenth of the
digits 5 to 9 is the validation split. It chooses the checkpoint, after every epoch or at 20 to 24 of them. The test
images are those of the digits 5 to 9.

The claim holds if both are true:

- At every target size, the best of the three fine-tuning ways has a higher mean accuracy than training from scratch.
- Its lead is larger at the smallest size than at the largest.
"""

from functools import partial
from typing import Any

import numpy as np

from upright.architectures.resnet import SmallResNet
from upright.data.datamodule import ImageDataModule
from upright.data.digits import Digits
from upright.data.mnist import MNIST
from upright.data.source import Source
from upright.evidence.bench import Bench, Experiment
from upright.evidence.finding import Finding, draw_band, means, metric, panels, spreads
from upright.images import ImageSpec
from upright.training.finetuning import Freeze


class Half(ImageDataModule):
    """Five of the ten digits of another dataset.

    Args:
        first: the first of the five digits.
        embedded: use the embedded digits in place of MNIST.
        **options: options of `ImageDataModule`.
    """

    def __init__(self, *, first: int, embedded: bool, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types
        self.digits = range(first, first + 5)
        self.whole: type[ImageDataModule] = Digits if embedded else MNIST

    @property
    def spec(self) -> ImageSpec:
        spec = self.whole().spec
        return ImageSpec(spec.channels, spec.height, spec.width, tuple(map(str, self.digits)), spec.mean, spec.std)

    def read(self) -> Source:
        source = self.whole().read()
        indices = np.flatnonzero(np.isin(source.labels, self.digits))
        labels = np.asarray(source.labels)[indices] - self.digits[0]
        splits = source.splits and {
            name: np.searchsorted(indices, np.intersect1d(part, indices)).tolist()
            for name, part in source.splits.items()
        }
        images = [source.images[index] for index in indices.tolist()]
        names = [source.names[index] for index in indices.tolist()]
        return Source(images, labels.tolist(), names, splits)


VALIDATIONS = 20
SCRATCH = "from scratch"
WAYS: dict[str, dict[str, Any]] = {
    SCRATCH: {},
    "fine-tuned": {},
    "fine-tuned, body at a tenth": {"callbacks": (partial(Freeze, lr_factor=0.1),)},
    "head alone": {"callbacks": (partial(Freeze, until_epoch=10_000),)},
}


def run(bench: Bench) -> Finding:
    ways = bench.choose(tuple(WAYS)[:2], tuple(WAYS))
    sizes = bench.choose((20,), (20, 100, 500, 2500))
    embedded, available = bench.choose((True, 610), (False, 26_500))
    half = partial(Half, embedded=embedded, val_fraction=0.1)
    body = partial(SmallResNet, depth=bench.choose(8, 14), width=bench.choose(4, 8))
    source = Experiment(body, partial(half, first=0, batch_size=128), bench.choose(1, 3))
    sources = bench.train({"source": source})["source"]
    epochs = {size: max(round(bench.choose(4, 300) * min(32, size) / size), 1) for size in sizes}
    every = {size: max(epochs[size] // VALIDATIONS, 1) for size in sizes}

    def target(size: int, way: str, seed: int) -> Experiment:
        data = partial(half, first=5, batch_size=min(32, size), train_fraction=size / available)
        start = None if way == SCRATCH else sources[seed].folder / "best.ckpt"
        return Experiment(body, data, epochs[size], validate_every=every[size], start_from=start, **WAYS[way])

    runs = bench.train({(size, way): partial(target, size, way) for size in sizes for way in ways})
    accuracy = metric(runs, "test/accuracy")
    mean = means(accuracy)
    lead = {size: max(mean[size, way] for way in ways if way != SCRATCH) - mean[size, SCRATCH] for size in sizes}
    held = min(lead.values()) > 0 and lead[sizes[0]] > lead[sizes[-1]]
    sentence = (
        "The lead of the best fine-tuning way, chosen by test accuracy, over training from scratch is "
        + ", ".join(f"{100 * lead[size]:.1f} points with {size:,} images" for size in sizes)
    )
    cells = spreads(accuracy)
    table = [{"way": way} | {f"{size:,} images": cells[size, way] for size in sizes} for way in ways]
    figure, axes = panels(2, width=4.8)
    plot_size = sizes[len(sizes) // 3]
    for way in ways:
        draw_band(axes[0], sizes, np.transpose([accuracy[size, way] for size in sizes]), way)
        curves = [each.column("val/accuracy") for each in runs[plot_size, way]]
        draw_band(axes[1], range(every[plot_size], epochs[plot_size] + 1, every[plot_size]), curves, way)
    axes[0].set(xscale="log", xlabel="training images of the target", ylabel="test accuracy")
    axes[0].legend()
    axes[1].set(xlabel=f"epoch, {plot_size} images", ylabel="validation accuracy")
    numbers = {"test/accuracy": accuracy, "source": [run.metrics["test/accuracy"] for run in sources]}
    return Finding(held, f"{sentence}.", table, figure, numbers)
