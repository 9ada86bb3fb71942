from dataclasses import replace
from functools import partial
from pathlib import Path

import kornia.augmentation as kornia
import lightning as L
import pytest
import torch
from torch import nn

from upright.architectures.lenet import LeNet
from upright.architectures.mlp import MLP
from upright.architectures.recurrent import Recurrent
from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import (
    DenseLocaliser,
    Regression,
    SpatialTransformer,
    observe,
    observing,
)
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.augmentation import RandomAffine, RandomElastic, RandomPerspective
from upright.data.digits import Digits
from upright.data.mixing import CutMix, MixUp
from upright.errors import CheckpointError, UprightError
from upright.training.classifier import ImageClassifier
from upright.training.losses import CrossEntropy, PerceptronLoss
from upright.training.schedules import OneCycle

SPEC = Digits(size=12, margin=0).spec
ADAM = partial(torch.optim.Adam, lr=0.01)
COMMON = {f"test/{name}" for name in ("loss", "accuracy", "top5", "precision", "recall", "f1", "calibration_error")}
UPRIGHT = {"test/uprightness"} | {
    f"test/{deviation}_degrees_{statistic}"
    for deviation in ("relative", "absolute")
    for statistic in ("median", "mean", "p95")
}
METRICS = COMMON | UPRIGHT
VOTING = partial(TransformerNetwork, network=LeNet)
STN = partial(
    TransformerNetwork, network=LeNet, transformer=partial(SpatialTransformer, transform="affine", lr_factor=0.1)
)


def trainer(**options: object) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **(quiet | {"max_epochs": 1} | options))


def digits(**options: object) -> Digits:
    options = {"augment": [partial(RandomAffine, rotate=30)]} | options
    return Digits(size=12, margin=0, angles=(-30, 30), **options)


def test_lr_factor_sets_the_rate_of_its_group_and_the_schedule_keeps_the_ratio() -> None:
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    classifier = ImageClassifier(SPEC, STN, ADAM)
    trainer(callbacks=[Rates()], limit_val_batches=0).fit(classifier, digits())
    peak = max(rate for pair in rates for rate in pair)
    assert peak == pytest.approx(0.01, rel=0.05)
    assert all(slow == pytest.approx(0.1 * fast) for slow, fast in (sorted(pair) for pair in rates[:-1]))
    groups = classifier.optimizers().param_groups
    slow = {id(parameter) for group in groups if group["initial_lr"] < 0.005 for parameter in group["params"]}
    assert slow == {id(parameter) for parameter in classifier.model.network.transformer.parameters()}


class Recording(nn.Module):
    """Record the inputs after dropout."""

    inputs: list[torch.Tensor] = []  # noqa: RUF012  # shared: the classifier builds the network

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(input_shape[1] ** 2, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.inputs.append(self.layers[0](images).detach().clone())
        return self.layers(images)


def inputs(seed: int, **options: object) -> list[torch.Tensor]:
    Recording.inputs.clear()
    L.seed_everything(seed)
    classifier = ImageClassifier(SPEC, Recording, ADAM)
    torch.manual_seed(torch.seed())  # earlier random numbers must not matter
    trainer(limit_train_batches=3, limit_val_batches=0, **options).fit(classifier, digits())
    return list(Recording.inputs)


def test_the_inputs_of_training_are_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    first, again, other = inputs(1, max_epochs=2), inputs(1, max_epochs=2), inputs(2, max_epochs=2)
    assert len(first) == 6 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len({float(batch.sum()) for batch in first}) == 6


def test_the_upright_loss_runs_the_localiser_twice_and_the_network_once() -> None:
    calls = {"localiser": 0, "network": 0}
    classifier = ImageClassifier(SPEC, STN, ADAM, upright_weight=1.0)
    network = classifier.model.network
    network.transformer.localisation.register_forward_hook(lambda *_: calls.update(localiser=calls["localiser"] + 1))
    network.network.register_forward_hook(lambda *_: calls.update(network=calls["network"] + 1))
    fit = trainer(limit_train_batches=4, limit_val_batches=0)
    fit.fit(classifier, digits())
    assert calls == {"localiser": 8, "network": 4}
    assert {"train/loss", "train/upright_loss"} <= set(fit.callback_metrics)


def test_the_prior_brings_every_view_to_the_pose_of_the_stored_image() -> None:
    network = partial(TransformerNetwork, network=LeNet, transformer=UndoesRotation)
    data = digits(augment=[partial(RandomAffine, rotate=180)], batch_size=256)
    images = data.images.pixels.pixels
    images[..., :6, :], images[..., 6:, :] = 255, 0
    for weights, views in (({"prior_weight": 1.0}, 1), ({"prior_weight": 2.0, "upright_weight": 1.0}, 2)):
        classifier = ImageClassifier(SPEC, network, ADAM, **weights)
        assert classifier.views == views
        fit = trainer(max_steps=1, limit_val_batches=0)
        fit.fit(classifier, data)
        assert float(fit.callback_metrics["train/prior_loss"]) < 0.03
    # Bright halves that are below are upside down: the prior knows the data's own up, and the upright loss does not.
    images[..., :6, :], images[..., 6:, :] = 0, 255
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(ImageClassifier(SPEC, network, ADAM, upright_weight=1.0, prior_weight=1.0), data)
    assert float(fit.callback_metrics["train/prior_loss"]) == pytest.approx(2, abs=0.05)
    assert float(fit.callback_metrics["train/upright_loss"]) < 0.03


def test_votes_learn_the_up_of_images_that_were_never_rotated() -> None:
    data = Digits(angles=(-160, -120, -80, -40, 0, 40, 80, 120, 160), batch_size=32, cache="memory")
    torch.manual_seed(0)
    classifier = ImageClassifier(data.spec, VOTING, partial(torch.optim.Adam, lr=0.003), prior_weight=2.0)
    fit = trainer(max_epochs=8)
    fit.fit(classifier, data)
    # Half a circle apart on average, if the angle were arbitrary.
    assert fit.callback_metrics["val/absolute_degrees_median"] < 45


@pytest.mark.parametrize(("transform", "size"), [("rotation", 2), ("similarity", 5)])
def test_weights_of_an_angle_are_refused(transform: str, size: int, tmp_path: Path) -> None:
    transformer = partial(SpatialTransformer, transform=transform, localiser=DenseLocaliser)
    classifier = ImageClassifier(SPEC, partial(TransformerNetwork, network=LeNet, transformer=transformer), ADAM)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(classifier, digits())
    fit.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for name in ("weight", "bias"):
        key = f"model.network.transformer.localisation.2.{name}"
        assert len(checkpoint["state_dict"][key]) == size
        checkpoint["state_dict"][key] = checkpoint["state_dict"][key][1:]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"another network: Upright 0.2 described a rotation by one angle, and"):
        ImageClassifier.load_from_checkpoint(tmp_path / "old.ckpt")


def test_metrics_of_each_stage() -> None:
    data, classifier = digits(), ImageClassifier(SPEC, STN, ADAM)
    metrics = trainer().test(classifier, data, verbose=False)[0]
    assert set(metrics) == METRICS
    # An untrained transformer is the identity: the views stay at -30 and 30 degrees.
    assert metrics["test/uprightness"] == pytest.approx(1, abs=1e-3)
    assert [metrics[name] for name in UPRIGHT - {"test/uprightness"}] == pytest.approx([30] * 6, abs=0.01)
    samples = data.samples("test")[:]
    with torch.no_grad():
        logits = classifier(samples.images)
    assert metrics["test/accuracy"] == pytest.approx(float((logits.argmax(1) == samples.labels).float().mean()))
    assert metrics["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, samples.labels)), rel=1e-4)


def test_uprightness_needs_views_and_a_transformer() -> None:
    for network, data in ((STN, Digits(size=12, margin=0)), (LeNet, digits())):
        metrics = trainer().test(ImageClassifier(SPEC, network, ADAM), data, verbose=False)[0]
        assert set(metrics) == COMMON


def test_images_of_any_size_and_type() -> None:
    classifier = ImageClassifier(SPEC, LeNet, ADAM).eval()
    images = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    assert torch.equal(classifier(images), classifier(images.float()))
    assert classifier(torch.zeros(1, 1, 40, 7)).shape == (1, 10)


def test_an_upright_loss_without_a_transformer_is_refused() -> None:
    with pytest.raises(UprightError, match=r"upright_weight 1.0 needs a SpatialTransformer"):
        ImageClassifier(SPEC, LeNet, ADAM, upright_weight=1.0)
    with pytest.raises(UprightError, match=r"prior_weight -1.0 needs a SpatialTransformer"):
        ImageClassifier(SPEC, LeNet, ADAM, prior_weight=-1.0)


def test_an_upright_loss_without_rotated_data_is_refused() -> None:
    classifier = ImageClassifier(SPEC, STN, ADAM, upright_weight=1.0)
    with pytest.raises(UprightError, match=r"the data are not rotated: add"):
        trainer().fit(classifier, Digits(size=12, margin=0))


class AngleOfBrightHalf(nn.Module):
    """Return the angle of the bright half of each image as every feature."""

    def __init__(self, input_shape: object, num_outputs: int) -> None:
        super().__init__()
        self.features = num_outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        line = torch.arange(12) - 5.5
        down, across = (images * line[:, None]).mean(dim=(1, 2, 3)), (images * line).mean(dim=(1, 2, 3))
        return torch.atan2(-across, -down)[:, None].expand(-1, self.features)


class UndoesRotation(SpatialTransformer):
    """A transformer that undoes the rotation that its localiser returns, whatever its weights are."""

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        super().__init__(input_shape, transform="rotation", localiser=AngleOfBrightHalf)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        angle = -self.localisation[0](images)[:, :1]
        theta = 0 * self.localisation(images) + torch.cat([angle.cos() - 1, angle.sin()], dim=1)
        return observe(self, theta, lambda: self.sample(images, partial(self.points, theta)))


@pytest.mark.parametrize(
    "augment",
    [
        [partial(RandomAffine, rotate=40), RandomElastic, partial(RandomPerspective, distortion=0.02)],
        [partial(kornia.RandomRotation, degrees=40.0, p=1.0)],
        [partial(kornia.RandomRotation, degrees=30.0), kornia.ColorJitter, partial(RandomAffine, rotate=30)],
    ],
)
def test_the_upright_loss_uses_the_transforms_of_every_part(augment: list[object]) -> None:
    network = partial(TransformerNetwork, network=LeNet, transformer=UndoesRotation)
    data = digits(augment=augment, batch_size=256)
    # If the transformer undoes the rotation of each part, the loss is near zero.
    images = data.images.pixels.pixels
    images[..., :6, :], images[..., 6:, :] = 255, 0
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(ImageClassifier(SPEC, network, ADAM, upright_weight=1.0), data)
    assert float(fit.callback_metrics["train/upright_loss"]) < 0.03


class HiddenRotation(nn.Module):
    """A module that rotates images without reporting it."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = [kornia.RandomRotation(40.0, p=1.0)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.rotation[0](images)


def test_the_upright_loss_refuses_a_part_that_hides_its_rotation() -> None:
    network = partial(TransformerNetwork, network=LeNet, transformer=UndoesRotation)
    model = ImageClassifier(SPEC, network, ADAM, upright_weight=1.0)
    with pytest.raises(UprightError, match="the transform of each image, but HiddenRotation does not report it"):
        trainer(max_steps=1).fit(model, digits(augment=[RandomAffine, HiddenRotation]))


@pytest.mark.parametrize("part", [MixUp, CutMix])
def test_mixed_images_are_trained_with_soft_targets(part: type[nn.Module]) -> None:
    calls = []

    class RecordingLoss(CrossEntropy):
        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            calls.append((self.training, targets))
            return super().forward(logits, targets)

    classifier = ImageClassifier(SPEC, LeNet, ADAM)
    classifier.loss = RecordingLoss(10, label_smoothing=0.1)
    fit = trainer(max_steps=2, limit_val_batches=1)
    fit.fit(classifier, digits(augment=[partial(RandomAffine, rotate=10), part]))
    # The first call, before training, checks whether the loss accepts probabilities.
    trained = [targets for training, targets in calls[1:] if training]
    assert all(targets.shape == (64, 10) and (targets.amax(dim=1) < 1).any() for targets in trained)
    # Validation has labels, as training has without mixing.
    assert all(targets.dtype == torch.int64 for training, targets in calls if not training)
    calls.clear()
    trainer(max_steps=1, limit_val_batches=0).fit(classifier, digits())
    assert calls[0][1].dtype == torch.int64


@pytest.mark.parametrize(
    ("network", "augment", "options", "text"),
    [
        (
            LeNet,
            [MixUp],
            {"loss": PerceptronLoss},
            "MixUp gives an image several classes, but PerceptronLoss takes",
        ),
        (STN, [RandomAffine, CutMix], {"upright_weight": 1.0}, "but CutMix mixes two images: remove it from"),
        (
            STN,
            [RandomAffine, kornia.RandomElasticTransform],
            {"upright_weight": 1.0},
            "needs the transform of each image, but RandomElasticTransform does not report it: use",
        ),
        (STN, [kornia.ColorJitter], {"upright_weight": 1.0}, "The upright loss .* the data are not rotated: add"),
        (VOTING, [kornia.ColorJitter], {"upright_weight": 1.0}, "The upright loss .* the data are not rotated: add"),
        (STN, [], {"prior_weight": 1.0}, "The prior compares .* not rotated: add .* or set prior_weight 0"),
        (VOTING, [RandomAffine, CutMix], {"prior_weight": 1.0}, "The prior .* but CutMix mixes two images"),
    ],
)
def test_an_augmentation_that_the_loss_does_not_support_is_refused(
    network: object, augment: list[object], options: dict[str, object], text: str
) -> None:
    options = {"scheduler": OneCycle} | options
    with pytest.raises(UprightError, match=text) as refusal:
        trainer().fit(ImageClassifier(SPEC, network, ADAM, **options), digits(augment=augment))
    assert "\n" not in str(refusal.value)


def test_an_error_of_an_architecture_is_a_user_error() -> None:
    with pytest.raises(UprightError, match=r"at least 12x12 pixels, got 8x8"):
        ImageClassifier(Digits(size=8, margin=0).spec, LeNet, ADAM)


def test_a_network_that_cannot_be_rebuilt_is_refused() -> None:
    with pytest.raises(UprightError, match=r"cannot be written into a checkpoint.*functools.partial"):
        ImageClassifier(SPEC, lambda shape, classes: LeNet(shape, classes), ADAM)


def test_resize_none_does_not_resize_images() -> None:
    spec = replace(SPEC, resize="none")
    classifier = ImageClassifier(spec, partial(SmallResNet, depth=8, width=4), ADAM).eval()
    images = torch.rand(2, 1, 30, 17) * 255
    network, model = classifier.model.network, classifier.model
    assert torch.equal(classifier(images), network((images - model.mean) / model.std))
    stretched = ImageClassifier(SPEC, partial(SmallResNet, depth=8, width=4), ADAM).eval()
    stretched.load_state_dict(classifier.state_dict())
    assert not torch.allclose(classifier(images), stretched(images))


@pytest.mark.parametrize("network", [LeNet, partial(MLP, widths=(8,)), Recurrent])
def test_resize_none_is_refused_for_a_network_of_one_size(network: object) -> None:
    with pytest.raises(UprightError, match=r"resize none needs a network for images of any size.*Use stretch"):
        ImageClassifier(replace(SPEC, resize="none"), network, ADAM)


def test_init_initialises_any_network() -> None:
    for scheme in ("he_normal", "orthogonal"):
        torch.manual_seed(0)
        classifier = ImageClassifier(SPEC, STN, ADAM, init=scheme)
        assert classifier.recipe["init_args"]["init"] == scheme
        weights = classifier.model.network.network.classifier[1].weight
        products = weights @ weights.T if weights.shape[0] < weights.shape[1] else weights.T @ weights
        assert torch.allclose(products, torch.eye(len(products)), atol=1e-4) == (scheme == "orthogonal")
        with observing() as observations:
            classifier(torch.rand(2, 1, 12, 12))
        assert (observations[0].theta == 0).all()


def test_the_upright_loss_trains_every_transformer() -> None:
    network = partial(
        TransformerNetwork,
        network=LeNet,
        places=["input", "features.3"],
        transformer=partial(SpatialTransformer, transform="affine", localiser=DenseLocaliser),
    )
    classifier = ImageClassifier(SPEC, network, ADAM, upright_weight=1.0)
    # With equal logits, classification has no gradient, so only the upright loss trains.
    for name in ("classifier", "features"):
        for parameter in getattr(classifier.model.network.network, name)[-1].parameters():
            nn.init.zeros_(parameter)
    before = [
        parameter.clone()
        for module in classifier.modules()
        if isinstance(module, Regression)
        for parameter in module.parameters()
    ]
    trainer(max_steps=3, limit_val_batches=0).fit(classifier, digits())
    after = [
        parameter
        for module in classifier.modules()
        if isinstance(module, Regression)
        for parameter in module.parameters()
    ]
    assert len(before) == 4 and all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_perceptron_loss_counts_mistakes_only() -> None:
    loss = PerceptronLoss(3)
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    assert loss(logits, torch.tensor([0, 1])).item() == 0
    wrong = loss(logits, torch.tensor([0, 2]))
    wrong.backward()
    # The gradients of the true and the predicted class are opposite; all others are zero.
    assert wrong.item() == 1.0
    assert logits.grad.tolist() == [[0, 0, 0], [0, 0.5, -0.5]]


def test_mixed_precision_does_not_change_uprightness() -> None:
    torch.manual_seed(0)
    classifier = ImageClassifier(SPEC, STN, ADAM, upright_weight=1.0)
    mixed = trainer(precision="bf16-mixed", max_steps=4)
    mixed.fit(classifier, digits())
    half = mixed.validate(classifier, digits(), verbose=False)[0]["val/uprightness"]
    # Weights are rounded to bfloat16 and coordinates are not, so only theta may differ a little.
    exact = trainer().validate(classifier, digits(), verbose=False)[0]["val/uprightness"]
    assert half == pytest.approx(exact, rel=0.05)


def test_a_network_that_cannot_be_built_is_an_error_of_one_line() -> None:
    with pytest.raises(UprightError, match=r"The network cannot be built for images of \(1, 12, 12\): .*negative"):
        ImageClassifier(SPEC, partial(MLP, widths=(-3,)), ADAM)


def test_resize_none_is_refused_with_a_transformer() -> None:
    with pytest.raises(UprightError, match=r"resize none does not work with a spatial transformer"):
        ImageClassifier(replace(SPEC, resize="none"), STN, ADAM)
