"""The LightningModule and the datamodule with a stock Trainer, with other modules, and with other data."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import upright
from upright.data.batch import Batch
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.training.classifier import ImageClassifier
from upright.training.module import as_batch
from upright.training.restoring import restore

ROTATED = [partial(upright.RandomAffine, rotate=60)]
SGD = partial(torch.optim.SGD, lr=0.1)
LENET = partial(upright.LeNet, widths=(2, 4, 8, 8))
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def data(**options: Any) -> upright.Digits:
    return upright.Digits(size=16, batch_size=128, **({"augment": ROTATED} | options))


def classifier(spec: upright.ImageSpec, network: Any = LENET, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(spec, network, SGD, **options)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **(QUIET | {"max_epochs": 1} | options))


class Recorder(L.LightningModule):
    """A module of the user that records its batches."""

    def __init__(self, views: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 10)
        self.views, self.batches, self.validated = views, [], []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        images, labels, *_ = batch
        return nn.functional.cross_entropy(self.layer(images.flatten(1) / 255), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_stock_checkpoint_is_complete(tmp_path: Path) -> None:
    module, images = classifier((source := data()).spec), None
    stock = trainer(tmp_path, enable_checkpointing=True)
    stock.fit(module, source)
    path = stock.checkpoint_callback.best_model_path
    images = source.samples("test")[:].images
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert not loaded.training and torch.equal(loaded(images), module.eval()(images))
    restored = restore(path)
    assert restored.data.manifest.digest == source.manifest.digest and restored.contents["run"]["name"] == "lenet"
    (before,) = stock.test(module, source, verbose=False)
    (after,) = stock.test(module, source, ckpt_path=path, verbose=False)
    assert before == after and restored.contents["metrics"]["val/accuracy"] > 0


def test_arguments_of_load_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    module = classifier((source := data()).spec)
    stock = trainer(tmp_path)
    stock.fit(module, source)
    stock.save_checkpoint(tmp_path / "x.ckpt")
    other = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", optimizer=partial(torch.optim.Adam, lr=0.5))
    assert other.lr == 0.5


@pytest.mark.parametrize("views", [1, 2])
def test_any_module_gets_augmented_batches_only_in_training(tmp_path: Path, views: int) -> None:
    module, source = Recorder(views), data()
    trainer(tmp_path, limit_train_batches=2, enable_checkpointing=False).fit(module, source)
    stored = source.samples("train")[:].images
    for batch in module.batches:
        assert len(batch.views) == views and torch.equal(batch.views[0].images, batch.images)
        assert not torch.equal(batch.images, stored[batch.position].float())
        points = torch.zeros(1, 2)
        assert batch.views[0].transforms(points).shape == (len(batch.images), 1, 2)
    if views == 2:
        assert not torch.equal(batch.views[0].images, batch.views[1].images)
    validation = module.validated[0]
    assert torch.equal(validation.images, source.samples("val")[validation.position].images) and not validation.views


def test_augmentation_is_a_function_of_seed_epoch_batch_and_process(tmp_path: Path) -> None:
    def batches_of(epochs: int, seed: int = 0) -> list[Tensor]:
        L.seed_everything(seed, verbose=False)
        module = Recorder()
        trainer(tmp_path, max_epochs=epochs, limit_train_batches=3, enable_checkpointing=False).fit(module, data())
        return [batch.images for batch in module.batches]

    first = batches_of(2)
    assert all(map(torch.equal, first, batches_of(2))) and all(map(torch.equal, first, batches_of(1)))
    assert not torch.equal(first[0], first[3]) and not torch.equal(first[0], batches_of(1, seed=1)[0])


def test_a_plain_loop_gets_the_batches_of_a_trainer(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, source = Recorder(), data()
    trainer(tmp_path, limit_train_batches=3, enable_checkpointing=False).fit(module, source)
    plain = data()
    plain.setup("fit")
    loader = plain.train_dataloader()
    loader.sampler.set_epoch(0)
    for batch, expected in zip(loader, module.batches, strict=False):
        assert torch.equal(plain.augment(batch).images, expected.images)


@pytest.mark.parametrize("read", [False, True])
def test_a_datamodule_pickles(read: bool) -> None:
    source = data()
    if read:
        source.setup("fit")
        _ = source.samples("train"), source.manifest
    again = pickle.loads(pickle.dumps(source))
    assert again.manifest.digest == source.manifest.digest and again.recipe == source.recipe
    assert torch.equal(again.samples("val")[:].images, source.samples("val")[:].images)


class Pairs(L.LightningDataModule):
    """Data of the user: (images, labels), floats in [0, 1]."""

    def __init__(self, count: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.spec = upright.ImageSpec(1, 16, 16, ("a", "b"), (0.5,), (0.5,))

    def loader(self) -> DataLoader[Any]:
        images = torch.rand(self.hparams["count"], 1, 16, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0.5).long()), batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


@pytest.mark.parametrize("loaders", [False, True])
def test_data_of_the_user(tmp_path: Path, loaders: bool) -> None:
    pairs = Pairs(count=48)
    module, stock = classifier(pairs.spec), trainer(tmp_path)
    if loaders:
        stock.fit(module, pairs.loader(), pairs.loader())
        (measured,) = stock.test(module, pairs.loader(), verbose=False)
    else:
        stock.fit(module, pairs)
        (measured,) = stock.test(module, pairs, verbose=False)
        stock.save_checkpoint(tmp_path / "pairs.ckpt")
        restored = restore(tmp_path / "pairs.ckpt")
        assert isinstance(restored.data, Pairs) and restored.data.hparams["count"] == 48
        with pytest.raises(
            UserError, match=r"Parity needs originals, but the checkpoint was trained on a Pairs, which is not"
        ):
            restored.image_data("Parity needs originals")
    labels, probabilities = (torch.cat(parts) for parts in zip(*stock.predict(module, pairs.loader()), strict=True))
    assert labels.shape == (48,) and probabilities.shape == (48, 2)
    accuracy = (probabilities.argmax(1) == labels).float().mean()
    assert measured["test/accuracy"] == pytest.approx(float(accuracy))


def test_floats_in_0_to_1_equal_bytes() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    labels = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(as_batch([pixels / 255, labels]).images, as_batch((pixels, labels)).images.float())


def test_a_batch_of_another_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"takes batches of \(images, labels\), got dict: give tensors"):
        as_batch({"images": 1})


def test_the_upright_loss_needs_two_views(tmp_path: Path) -> None:
    module = classifier(Pairs().spec, partial(upright.TransformerNetwork, network=LENET), upright_weight=1.0)
    with pytest.raises(UserError, match="two augmented views of each image, which only an ImageDataModule yields"):
        trainer(tmp_path).fit(module, Pairs())


def test_the_tuner_finds_a_rate_and_a_batch_size(tmp_path: Path) -> None:
    source = data()
    module = classifier(source.spec)
    finder = Tuner(trainer(tmp_path)).lr_find(module, datamodule=source, num_training=8, early_stop_threshold=None)
    assert finder is not None
    module.lr = 0.25
    assert module.recipe["init_args"]["optimizer"]["init_args"] == {"lr": 0.25}
    size = Tuner(trainer(tmp_path)).scale_batch_size(
        module, datamodule=source, init_val=4, max_trials=1, steps_per_trial=1
    )
    assert source.batch_size == size and source.recipe["init_args"]["batch_size"] == size
    trainer(tmp_path).fit(module, source)


# Lightning recognises only torch's own samplers; the datamodule has turned off shuffling itself.
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_uses_the_same_batches_in_every_epoch(tmp_path: Path) -> None:
    module, source = Recorder(), data(augment=[])
    trainer(tmp_path, overfit_batches=2, max_epochs=2, enable_checkpointing=False).fit(module, source)
    first, second = module.batches[:2], module.batches[2:]
    assert [b.position.tolist() for b in first] == [b.position.tolist() for b in second]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "16-true"])
def test_a_true_precision_is_refused(tmp_path: Path, precision: Any) -> None:
    source = data()
    with pytest.raises(UserError, match=rf"precision {precision} stores the weights .* use 32-true, bf16-mixed"):
        trainer(tmp_path, precision=precision).fit(classifier(source.spec), source)


def test_fast_dev_run(tmp_path: Path) -> None:
    source: ImageDataModule = data()
    trainer(tmp_path, fast_dev_run=True).fit(classifier(source.spec), source)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_group_after")
def test_two_spawned_processes(tmp_path: Path) -> None:
    source = data()
    stock = trainer(tmp_path, strategy="ddp_spawn", devices=2)
    stock.fit(classifier(source.spec), source)
    # The module of this process was never attached to the trainer; the spawned processes wrote the checkpoints.
    assert restore(stock.checkpoint_callback.best_model_path).data.manifest.digest == source.manifest.digest
