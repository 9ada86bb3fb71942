"""`upright fit` compared with the loop that an expert would write, and with the usual Lightning pipeline.

    python benchmarks/training.py [--rounds 7] [--images 12800] [--only lenet] [--quick]

All train in one process and take turns after every epoch. The rivals' epochs run inside a hook of the measured `upright
fit`. From one such hook to the next, `fit` runs only its own epoch: training, validation, checkpoints, metrics,
schedule, logging. Images are random, in memory, 28 x 28; a seventh as many are validated. The ratio is that of each
round, without the first one.

The bare loop has the same network, augmentation, fused AdamW and one-cycle schedule. Its uint8 images are in one
tensor, normalised by two operations. It sums the loss without waiting for the device, and computes accuracy and loss of
the validation images without gradients. It saves nothing and has no other metrics.

The usual pipeline is that of lightning-hydra-template: a Dataset that returns one normalised image at a time from
Pillow, a DataLoader without workers (two were slower), torchmetrics for loss and accuracy at every step, a progress bar
(of rich, if it is installed), and Adam. It has its own network, 784-64-128-64-10 with batch normalisation.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from PIL import Image
from shared import command_line, heading, row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from upright.architectures.lenet import LeNet
from upright.architectures.resnet import SmallResNet
from upright.cli import main as upright
from upright.data.augmentation import Augmentation, RandomAffine
from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.images import ImageSpec

MEAN, STD = 0.1307, 0.3081
VALIDATED = 7


class Noise(ImageDataModule):
    """Random images in three splits."""

    def __init__(self, *, count: int = 12800, **options: object) -> None:
        super().__init__(**options)
        self.count = count

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(1, 28, 28, tuple("0123456789"), mean=(MEAN,), std=(STD,))

    def read(self) -> Source:
        counts = (self.count, self.count // VALIDATED, 10)
        ends = np.cumsum(counts)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (ends[-1], 28, 28, 1), dtype=np.uint8)
        labels = generator.integers(0, 10, ends[-1])
        labels[-10:] = np.arange(10)
        parts = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
        names = [str(number) for number in range(ends[-1])]
        return Source(list(images), labels, names, splits=dict(zip(("train", "val", "test"), parts, strict=True)))


class Dense(nn.Sequential):
    """The example network of lightning-hydra-template."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, width in ((784, 64), (64, 128), (128, 64)):
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(64, num_classes))


class Bare:
    """The training loop that an expert would write."""

    def __init__(self, network: nn.Module, batch: int, data: Noise, steps: int, augmentation: Augmentation) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.batch, self.augmentation = batch, augmentation
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=0.001, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.001, total_steps=steps)
        self.train, self.val = (
            (data.samples(split)[:].images, data.samples(split)[:].labels) for split in ("train", "val")
        )

    def epoch(self) -> None:
        images, labels = self.train
        self.network.train()
        total = torch.zeros(())
        for indices in torch.randperm(len(labels)).split(self.batch)[: len(labels) // self.batch]:
            batch = self.augmentation(images[indices]).images
            loss = cross_entropy(self.network(batch.float().sub_(255 * MEAN).div_(255 * STD)), labels[indices])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()
        images, labels = self.val
        self.network.eval()
        right = 0
        with torch.no_grad():
            for batch, truth in zip(images.split(self.batch), labels.split(self.batch), strict=True):
                logits = self.network(batch.float().sub_(255 * MEAN).div_(255 * STD))
                total += cross_entropy(logits, truth)
                right += int((logits.argmax(dim=1) == truth).sum())


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Dataset that returns one image at a time, in the steps of torchvision: MNIST, ``ToTensor`` and ``Normalize``."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images[:, 0], labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        tensor = torch.from_numpy(np.array(image, np.uint8)).view(28, 28, 1).permute(2, 0, 1).contiguous()
        tensor = tensor.float().div(255)
        mean, std = torch.as_tensor([MEAN]).view(-1, 1, 1), torch.as_tensor([STD]).view(-1, 1, 1)
        return tensor.clone().sub_(mean).div_(std), int(self.labels[index])


class Usual(L.LightningModule):
    """Module that logs loss and accuracy with torchmetrics at every step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.ModuleDict({f"_{stage}": MeanMetric() for stage in ("train", "val")})
        self.accuracy = nn.ModuleDict({f"_{stage}": MulticlassAccuracy(10) for stage in ("train", "val")})

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        logits = self.network(batch[0])
        loss = cross_entropy(logits, batch[1])
        self.loss[f"_{stage}"](loss)
        self.accuracy[f"_{stage}"](logits.argmax(dim=1), batch[1])
        for name, metric in (("loss", self.loss), ("acc", self.accuracy)):
            self.log(f"{stage}/{name}", metric[f"_{stage}"], on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


class UsualPipeline:
    """Usual pipeline in a separate Trainer, whose start-up is not counted."""

    def __init__(self, batch: int, data: Noise) -> None:
        self.module = Usual(Dense((1, 28, 28), 10))
        self.loaders = [
            DataLoader(OneByOne(*data.samples(split)[:][:2]), batch, shuffle=split == "train", num_workers=0)
            for split in ("train", "val")
        ]

    def epoch(self) -> float:
        """Return the seconds of training and validation."""
        clock = Clock()
        trainer = L.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            accelerator="cpu",
            callbacks=[RichProgressBar() if find_spec("rich") else TQDMProgressBar(), clock],
        )
        trainer.fit(self.module, *self.loaders)
        return clock.seconds


class Clock(Callback):
    """Measure the seconds of an epoch with its validation."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.started


RIVALS: dict[str, Callable[[], float | None]] = {}
SECONDS: dict[str, list[float]] = defaultdict(list)


class Interleave(Callback):
    """Run an epoch of every rival between two epochs of `upright fit`."""

    def __init__(self) -> None:
        self.started = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.started:
            SECONDS["upright fit"].append(time.perf_counter() - self.started)
            for name, epoch in RIVALS.items():
                start = time.perf_counter()
                with torch.random.fork_rng():
                    seconds = epoch()
                SECONDS[name].append(seconds or time.perf_counter() - start)
        self.started = time.perf_counter()


def measure(network: nn.Module, config: dict[str, Any], batch: int, options: argparse.Namespace, what: str) -> None:
    """Print the rows of one network."""
    data = Noise(count=options.images, batch_size=batch)
    augment = [{"class_path": "upright.data.augmentation.RandomAffine", "init_args": {"rotate": 15}}]
    augmented = what == "augmented"
    augmentation = Augmentation([RandomAffine(rotate=15)] if augmented else [])
    steps = (options.rounds + 2) * (options.images // batch)
    RIVALS.clear()
    SECONDS.clear()
    RIVALS["bare loop"] = Bare(network, batch, data, steps, augmentation).epoch
    if what == "usual":
        RIVALS["usual pipeline"] = UsualPipeline(batch, data).epoch
    experiment = {
        "model": {"network": config, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}},
        "data": {
            "class_path": "training.Noise",
            "init_args": {"count": options.images, "batch_size": batch, "augment": augment if augmented else []},
        },
        "trainer": {
            "max_epochs": options.rounds + 2,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "training.Interleave"}],
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        path.write_text(yaml.safe_dump(experiment))
        arguments = ["--config", str(path), "--trainer.default_root_dir", folder, "--wandb", options.wandb]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            assert upright(["fit", *arguments]) == 0
    ours = SECONDS["upright fit"][1:]
    rate = f"{options.images / statistics.median(ours):,.0f}"
    for name in RIVALS:
        ratios = [theirs / mine for mine, theirs in zip(ours, SECONDS[name][1:], strict=True)]
        cells = (f"**{statistics.median(ratios):.2f}**", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        row(config["class_path"].rpartition(".")[2], batch, what, rate, name, *cells)


SMALL_RESNET = {"depth": 14, "width": 8}
NETWORKS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "lenet": (LeNet, {"class_path": "upright.architectures.lenet.LeNet"}),
    "resnet": (
        partial(SmallResNet, **SMALL_RESNET),
        {"class_path": "upright.architectures.resnet.SmallResNet", "init_args": SMALL_RESNET},
    ),
    "dense": (Dense, {"class_path": "training.Dense"}),
}


def main() -> None:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; default: 7")
    parser.add_argument("--images", type=int, default=12800, help="images per epoch; default: 12800")
    parser.add_argument("--wandb", default="off", choices=("off", "offline"), help="default: off")
    parser.add_argument("--only", choices=tuple(NETWORKS), help="measure only this network")
    options = parser.parse_args()
    rows = [
        ("lenet", 128, "plain"),
        ("lenet", 128, "augmented"),
        ("resnet", 128, "plain"),
        ("resnet", 128, "augmented"),
    ]
    rows += [("dense", 64, "usual"), ("dense", 128, "usual")]
    if options.quick:
        options.rounds, options.images, rows = 1, 256, rows[1::2]
    print(f"{torch.get_num_threads()} thread(s), W&B {options.wandb}, {'rich' if find_spec('rich') else 'tqdm'} bar\n")
    heading("network", "batch", "", "upright, images/s", "rival", "upright / rival", "least", "greatest")
    for name, batch, what in rows:
        if options.only in (None, name):
            torch.manual_seed(0)
            network, config = NETWORKS[name]
            measure(network((1, 28, 28), 10), config, batch, options, what)


if __name__ == "__main__":
    # The experiment's config refers to the classes of this file under the module's name.
    import training

    training.main()
