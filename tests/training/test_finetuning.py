"""Weights to start from, and a frozen body: which weights are loaded, and which files are refused."""

import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from tests.architectures.variants import VARIANTS, WITHOUT_HEAD, Variant
from tests.conftest import CONFIGS, ROOT, Upright
from tests.runs.killing import differences, last, run_to_end
from tests.runs.killing import fit as fit_process
from tests.training.test_checkpoint import Exploit
from tests.training.test_published_weights import random_weights, resnet_forward, resnet_layout, vgg_forward, vgg_layout
from upright.architectures.lenet import LeNet
from upright.architectures.perceptron import Perceptron
from upright.architectures.polar import PolarNetwork
from upright.architectures.resnet import ResNet, SmallResNet
from upright.architectures.spatial_transformer import SpatialTransformer, observing
from upright.architectures.timm import Pretrained
from upright.architectures.transformer_network import TransformerNetwork
from upright.architectures.vgg import VGG
from upright.architectures.voting import NetworkLocaliser
from upright.checkpoint import read_checkpoint
from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.errors import UprightError
from upright.files import file_hash
from upright.images import ImageSpec
from upright.recipes import build
from upright.training.classifier import ImageClassifier
from upright.training.finetuning import Freeze, head, start_from
from upright.training.orientation import OrientationEstimator, votes
from upright.training.poses import prior_loss
from upright.training.restoring import restore
from upright.warp import pixel_centres, project_points, rotation, rotation_angle

SPEC = Digits(size=12, margin=0).spec
FEW = replace(SPEC, classes=("7", "8", "9"))
RGB = ImageSpec(3, 64, 64, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3)
SGD = partial(torch.optim.SGD, lr=0.01)
SMALL = partial(SmallResNet, depth=8, width=4)


def classifier(network: object = SMALL, spec: ImageSpec = SPEC, seed: int = 0, **options: object) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier(spec, network, SGD, **options)


def save(model: ImageClassifier, path: Path) -> Path:
    model.run = {"name": "one", "id": "1"}
    state = {"state_dict": model.state_dict(), "upright": model.contents(None, {})}
    torch.save(state, path)
    return path


def network_state(model: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.network.state_dict().items()}


# --- The head ---------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A network with a parameter beside its layers, and a head of several parts."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(144))
        self.body = nn.Linear(144, 8)
        self.logits = nn.Linear(8, num_classes)
        self.scale = nn.Parameter(torch.ones(num_classes))
        # This line fails on the meta device.
        self.half = float(self.token.detach().abs().max()) / 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(self.body(images.flatten(1) + self.token)) * self.scale


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if not v.slow and v.name not in WITHOUT_HEAD],
    ids=lambda variant: variant.name,
)
def test_the_head_of_any_network_depends_on_the_number_of_classes(variant: Variant) -> None:
    # No other size in these networks is 11 or 13.
    spec = ImageSpec(
        *variant.input_shape,
        tuple(map(str, range(11))),
        (0.5,) * variant.input_shape[0],
        (0.25,) * variant.input_shape[0],
    )
    model = classifier(build(variant.recipe), spec)
    names = head(model)
    other = build(variant.recipe)(spec.input_shape, 13).state_dict()
    assert names == {name for name, value in network_state(model).items() if other[name].shape != value.shape}
    assert names and all(11 in network_state(model)[name].shape for name in names)


def test_the_head_may_have_several_parts_and_finding_it_draws_no_random_number() -> None:
    model = classifier(Tokens)
    before = torch.get_rng_state()
    assert head(model) == {"logits.weight", "logits.bias", "scale"}
    assert torch.equal(before, torch.get_rng_state())


# --- From an Upright checkpoint ---------------------------------------------------------------------------------------


def test_other_classes_replace_the_head_and_nothing_else(tmp_path: Path) -> None:
    one, two = classifier(), classifier(spec=FEW, seed=1)
    own, path = network_state(two), save(one, tmp_path / "one.ckpt")
    start, *rest = start_from(two, path)
    assert start == f"Start: '{path}' (run one, 1), {len(own) - 2} of {len(own)} tensors."
    assert rest == ["classifier starts from scratch: 3 classes in place of 10."]
    theirs = network_state(one)
    for name, value in network_state(two).items():
        assert torch.equal(value, (own if name.startswith("classifier.") else theirs)[name]), name
    assert two.start["anew"] == ["classifier.bias", "classifier.weight"] and len(two.start["sha256"]) == 64


def test_the_head_is_loaded_only_for_the_same_classes(tmp_path: Path) -> None:
    one, two, other = classifier(), classifier(seed=1), classifier(spec=replace(SPEC, classes=SPEC.classes[::-1]))
    path = save(one, tmp_path / "one.ckpt")
    assert len(start_from(two, path)) == 1 and two.start["anew"] == []
    assert all(
        torch.equal(*pair) for pair in zip(network_state(one).values(), network_state(two).values(), strict=True)
    )
    assert start_from(other, path)[1] == "classifier starts from scratch: 10 other classes."


def test_a_head_of_several_parts_is_named(tmp_path: Path) -> None:
    lines = start_from(classifier(Tokens, FEW), save(classifier(Tokens), tmp_path / "one.ckpt"))
    assert lines[1] == "scale and logits start from scratch: 3 classes in place of 10."


def around(*places: str, network: object = SMALL, transform: str = "affine") -> object:
    transformer = partial(SpatialTransformer, transform=transform)
    return partial(TransformerNetwork, network=network, transformer=transformer, places=list(places))


@pytest.mark.parametrize("places", [("input",), ("blocks.1",), ("input", "blocks", "blocks.1")])
def test_weights_load_with_and_without_transformers(tmp_path: Path, places: tuple[str, ...]) -> None:
    bare, within = classifier(), classifier(around(*places), seed=1)
    images, own = torch.rand(2, 1, 12, 12) * 255, network_state(within)
    lines = start_from(within, save(bare, tmp_path / "bare.ckpt"))
    assert lines[1:] == [f"The transformer at {place} starts from scratch." for place in sorted(places)]
    new = set(within.start["anew"])
    assert all(torch.equal(own[name], network_state(within)[name]) for name in new)
    with torch.no_grad():
        # Untrained transformers are the identity.
        assert torch.allclose(within.eval()(images), bare.eval()(images), atol=1e-4)
    back = classifier(seed=2)
    lines = start_from(back, save(within, tmp_path / "within.ckpt"))
    assert lines[1] == f"The transformer at {min(places)} is ignored: the network has none there."
    assert all(torch.equal(value, network_state(bare)[name]) for name, value in network_state(back).items())


def test_transformers_at_the_same_place_are_loaded(tmp_path: Path) -> None:
    one, two = classifier(around("input", "blocks.0")), classifier(around("input", "blocks.1"), FEW, seed=1)
    nn.init.normal_(one.model.network.transformer.localisation[-1].bias)
    lines = start_from(two, save(one, tmp_path / "one.ckpt"))
    assert lines[1:] == [
        "network.classifier starts from scratch: 3 classes in place of 10.",
        "The transformer at blocks.1 starts from scratch.",
        "The transformer at blocks.0 is ignored: the network has none there.",
    ]
    ours, theirs = (model.model.network.transformer.state_dict() for model in (two, one))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_layers_of_another_shape_start_from_scratch(tmp_path: Path) -> None:
    attention, affine = classifier(around("input", transform="attention")), classifier(around("input"), seed=1)
    own = network_state(affine)
    lines = start_from(affine, save(attention, tmp_path / "one.ckpt"))
    assert lines[1] == (
        "From scratch, because of another shape: transformer at input: localisation.2.weight is 3x32 in place of 6x32, "
        "transformer at input: localisation.2.bias is 3 in place of 6."
    )
    new = ["transformer.localisation.2.bias", "transformer.localisation.2.weight"]
    assert affine.start["anew"] == new
    assert all(torch.equal(own[name], network_state(affine)[name]) for name in new)


def test_another_normalisation_is_reported(tmp_path: Path) -> None:
    lines = start_from(classifier(spec=replace(SPEC, std=(0.5,))), save(classifier(), tmp_path / "one.ckpt"))
    assert lines[-1] == (
        "The weights were trained on images of mean [0.306] and std [0.325]; "
        "these data have mean [0.306] and std [0.5]."
    )


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (partial(SmallResNet, depth=14, width=4), "it lacks blocks.3.body.0.0.weight, .* and 27 more; blocks.1"),
        (partial(SmallResNet, depth=8, width=8), "stem.0.0.weight is 4x1x3x3 in place of 8x1x3x3, .* more."),
        (LeNet, "it lacks .*; the network has no stem.0.0.weight, stem.0.1.weight, stem.0.1.bias and"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path: Path, network: object, text: str) -> None:
    model = classifier(network, seed=1)
    before = network_state(model)
    with pytest.raises(UprightError, match=rf"one.ckpt' holds the weights of another network: {text}") as refusal:
        start_from(model, save(classifier(), tmp_path / "one.ckpt"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert model.start is None and all(torch.equal(v, network_state(model)[n]) for n, v in before.items())


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda path: path.write_bytes(b""), "is not a complete checkpoint; it is damaged or truncated"),
        (
            lambda path: path.write_bytes(pickle.dumps(Exploit())),
            "not an Upright checkpoint or a state dict: .* would run",
        ),
        (lambda path: torch.save({"weight": Exploit()}, path), "would run code"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds neither an Upright checkpoint nor a state dict"),
        (lambda path: torch.save({}, path), "holds neither"),
        (lambda path: torch.save({"model": {"weight": "a string"}}, path), "holds neither"),
        (lambda path: torch.save({"upright": 3}, path), "not a checkpoint that `upright fit` wrote"),
        (
            lambda path: torch.save({"w": torch.zeros(1)}, path),
            "of another network: it lacks stem.0.0.weight, .* has no w. 0% of the tensors .*, and at least 80% must.",
        ),
        (lambda path: None, "does not exist"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, write: object, text: str) -> None:
    write(tmp_path / "x.pth")
    with pytest.raises(UprightError, match=text) as refusal:
        start_from(classifier(), tmp_path / "x.pth")
    assert "\n" not in str(refusal.value)


# --- From torchvision's -----------------------------------------------------------------------------------------------

RESNET_18 = resnet_layout(18)
NORMALISATION = (
    "The weights were trained on images of mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]; "
    "these data have mean [0.5, 0.5, 0.5] and std [0.25, 0.25, 0.25]."
)


def save_as_published(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file like the first published ones: parameters in torch's old format, without a number of batches."""
    published = {name: value for name, value in state.items() if "tracked" not in name}
    parameters = OrderedDict(
        (name, value if "running" in name else nn.Parameter(value)) for name, value in published.items()
    )
    torch.save(parameters, path, _use_new_zipfile_serialization=False)


@torch.no_grad()
def test_a_published_resnet_behind_a_transformer(tmp_path: Path) -> None:
    state = random_weights(RESNET_18)
    save_as_published(state, tmp_path / "resnet18.pth")
    model = classifier(around("input", network=partial(ResNet, depth=18)), RGB)
    lines = start_from(model, tmp_path / "resnet18.pth")
    assert lines[1:] == [
        "network.classifier starts from scratch: 3 classes in place of 1000.",
        "The transformer at input starts from scratch.",
        NORMALISATION,
    ]
    images = torch.randn(2, 3, 64, 64)
    resnet = model.model.network.network.eval()
    features = resnet.blocks(resnet.stem(images)).mean(dim=(2, 3))
    theirs = resnet_forward(state, images, 18)
    ours = features @ state["fc.weight"].T + state["fc.bias"]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
def test_a_vgg_is_adapted_to_the_image_size_and_recognises_imagenets_classes(tmp_path: Path) -> None:
    state = random_weights(vgg_layout(11, True, narrow=16, units=24))
    save_as_published(state, tmp_path / "vgg.pth")
    imagenet = replace(RGB, classes=tuple(f"n{number:08d}" for number in range(1000)))
    network = partial(VGG, depth=11, widths=(4, 8, 16, 32, 32), units=(24, 24), batch_norm=True)
    model = classifier(network, imagenet).eval()
    lines = start_from(model, tmp_path / "vgg.pth")
    assert lines[1:] == [
        "classifier.layers.1 was trained on 7x7 maps, but these images give 2x2: its weights now include torchvision's "
        "pooling.",
        NORMALISATION,
    ]
    images = torch.randn(2, 3, 64, 64)
    theirs = vgg_forward(state, images, 11, True)
    assert torch.allclose(model.model.network(images), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_another_mask_is_reported(tmp_path: Path) -> None:
    lines = start_from(classifier(spec=replace(SPEC, mask="disc")), save(classifier(), tmp_path / "one.ckpt"))
    assert lines[-1] == "The weights were trained on images with mask none; these data have mask disc."


@pytest.mark.parametrize(
    ("network", "spec", "text"),
    [
        (partial(ResNet, depth=34), RGB, "it lacks .* and 92 more; the network has no blocks.2.shortcut"),
        (partial(VGG, depth=11, units=(8, 8)), RGB, "it lacks .*; the network has no conv1.weight"),
    ],
)
def test_other_published_weights_are_refused(tmp_path: Path, network: object, spec: ImageSpec, text: str) -> None:
    torch.save({name: torch.zeros(shape) for name, shape in RESNET_18.items()}, tmp_path / "x.pth")
    with pytest.raises(UprightError, match=text) as refusal:
        start_from(classifier(network, spec), tmp_path / "x.pth")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("network", "spec", "text"),
    [
        (partial(ResNet, stem="small"), RGB, "stem.0.0.weight is 64x3x7x7 in place of 64x3x3x3."),
        (ResNet, replace(SPEC, height=64, width=64), "stem.0.0.weight is 64x3x7x7 in place of 64x1x7x7."),
    ],
)
def test_another_stem_starts_from_scratch(tmp_path: Path, network: object, spec: ImageSpec, text: str) -> None:
    torch.save({name: torch.zeros(shape) for name, shape in RESNET_18.items()}, tmp_path / "x.pth")
    model = classifier(network, spec)
    assert start_from(model, tmp_path / "x.pth")[2] == f"From scratch, because of another shape: {text}"
    assert "stem.0.0.weight" in model.start["anew"] and not model.model.network.blocks[0].body[0][0].weight.any()


# --- From any state dict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "model._orig_mod.", "module.network."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_a_state_dict_of_any_training_script(tmp_path: Path, prefix: str, container: str | None) -> None:
    theirs, ours = classifier(spec=FEW, seed=1), classifier(around("input"))
    state = {prefix + name: value for name, value in network_state(theirs).items()}
    state |= {f"{prefix}queue": torch.zeros(3)}
    torch.save({container: state, "epoch": 3, "args": {"lr": 0.1}} if container else state, tmp_path / "x.pth")
    before, after = network_state(ours), start_from(ours, tmp_path / "x.pth")
    body = [name for name in network_state(theirs) if not name.startswith("classifier")]
    assert after == [
        f"Start: '{tmp_path}/x.pth' (a state dict), {len(body)} of {len(before)} tensors.",
        "network.classifier starts from scratch: 10 classes in place of 3.",
        "Not used, because the network has none of this name: queue.",
        "The transformer at input starts from scratch.",
    ]
    assert all(torch.equal(network_state(theirs)[name], network_state(ours)[f"network.{name}"]) for name in body)


class Wrapped(nn.Module):
    """A network that holds the layers of another one under a name of its own."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.backbone = SMALL(input_shape, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)


def test_wrappers_on_either_side_do_not_matter(tmp_path: Path) -> None:
    bare, wrapped = classifier(), classifier(Wrapped, seed=1)
    torch.save(network_state(bare), tmp_path / "bare.pth")
    start_from(wrapped, tmp_path / "bare.pth")
    back = classifier(seed=2)
    start_from(back, save(wrapped, tmp_path / "wrapped.ckpt"))
    body = [name for name in network_state(bare) if not name.startswith("classifier")]
    assert all(torch.equal(network_state(bare)[name], network_state(back)[name]) for name in body)


# --- Published weights of a network -----------------------------------------------------------------------------------


class Published(SmallResNet):
    """A network with published weights: all ones."""

    loads, pretrained = 0, True

    def published(self) -> Pretrained:
        type(self).loads += 1
        weights = {name: torch.ones_like(value) for name, value in SMALL((1, 12, 12), 10).state_dict().items()}
        return Pretrained(weights, "ones", (0.5,), (0.25,))


def test_published_weights_load_when_training_begins_and_never_again(tmp_path: Path) -> None:
    Published.loads = 0
    network = around("input", "blocks.1", network=partial(Published, depth=8, width=4))
    model = classifier(network)
    assert Published.loads == 0 and not (model.model.network.network.stem[0][0].weight == 1).all()
    data = Digits(size=12, margin=0, batch_size=500)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    options |= {"enable_checkpointing": False}
    frozen = Freeze(until_epoch=1)
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[frozen], log_every_n_steps=1, **options)
    trainer.fit(model, data)
    stem = "network.stem.0.0.weight"
    assert Published.loads == 1 and model.start["path"] == "ones" and (network_state(model)[stem] == 1).all()
    assert {"transformer.localisation.2.bias", "network.blocks.1.0.localisation.2.bias"} < set(model.start["anew"])
    assert "network.blocks.1.1.body.0.0.weight" in frozen._body and not any("localis" in name for name in frozen._body)
    assert (network_state(model)["network.blocks.1.1.body.0.0.weight"] == 1).all()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    restored = restore(tmp_path / "x.ckpt").classifier
    assert Published.loads == 1 and torch.equal(network_state(restored)[stem], network_state(model)[stem])
    options |= {"max_epochs": 2}
    resumed = L.Trainer(default_root_dir=tmp_path, log_every_n_steps=1, callbacks=[Freeze(until_epoch=1)], **options)
    again = classifier(network)
    resumed.fit(again, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert Published.loads == 1 and again.start == model.start
    lines = start_from(classifier(partial(Published, depth=8, width=4), FEW))
    assert (
        lines[0].startswith("Start: ones, ") and lines[1] == "classifier starts from scratch: 3 classes in place of 10."
    )


def test_weights_that_cannot_be_loaded_are_one_line() -> None:
    class Missing(Published):
        def published(self) -> Pretrained:
            raise ValueError("No network.")

    model = classifier()
    model.model.network = Missing((1, 12, 12), 10, depth=8, width=4)
    with pytest.raises(UprightError, match=r"^No network\.$"):
        start_from(model)


# --- Weights of an orientation for the localiser ----------------------------------------------------------------------

POLAR = partial(PolarNetwork, angles=16, radii=6, widths=(8,), strides=(2,), blocks=1)
UPRIGHT = replace(SPEC, height=16, width=16, classes=(), mean=(0.5,), std=(0.25,), resize="crop", mask="disc")


def estimator(path: Path, **spec: object) -> OrientationEstimator:
    """Write the checkpoint of an untrained orientation estimator whose votes are not all equal."""
    torch.manual_seed(2)
    model = OrientationEstimator(replace(UPRIGHT, **spec), POLAR, SGD, turns=16).eval()
    model.model.network.classifier.weight.data.mul_(9)
    save(model, path)
    return model


def behind(weights: Path, **options: object) -> object:
    options = {"network": POLAR, "turns": 16, "size": 16, "mask": "disc"} | options
    localiser = partial(NetworkLocaliser, weights=str(weights), **options)
    return partial(TransformerNetwork, network=SMALL, transformer=partial(SpatialTransformer, localiser=localiser))


def test_a_localiser_has_the_answers_of_an_orientation_checkpoint(tmp_path: Path) -> None:
    theirs, path = estimator(tmp_path / "up.ckpt"), save(classifier(), tmp_path / "one.ckpt")
    model = classifier(behind(tmp_path / "up.ckpt"), seed=1)
    lines = start_from(model, path)
    count = len(network_state(theirs)) + 2
    assert lines[1:] == [f"Start of transformer.localisation.0: '{tmp_path}/up.ckpt' (run one, 1), {count} tensors."]
    record = {"path": str(tmp_path / "up.ckpt"), "sha256": file_hash(tmp_path / "up.ckpt")}
    assert model.start["localisers"] == [record | {"run": {"name": "one", "id": "1"}}]
    images = torch.rand(4, 1, 12, 12) * 255
    (tmp_path / "up.ckpt").unlink()  # the checkpoint of the whole is enough
    restored = ImageClassifier.load_from_checkpoint(save(model, tmp_path / "whole.ckpt"))
    for each in (model.eval(), restored):
        with torch.no_grad(), observing() as observations:
            each(images)
        (angles, confidence), (last,) = theirs.predict_step((images / 255, torch.zeros(4)), 0).T, observations
        points = pixel_centres(4, 4)
        poses = rotation_angle(last.points(points), points).rad2deg()
        assert torch.allclose(torch.remainder(poses + angles + 180, 360), torch.tensor(180.0), atol=0.01)
        assert torch.allclose(last.confidence, confidence, atol=1e-4) and angles.std() > 1
    # A file that has the transformer wins over the localiser's own weights.
    estimator(tmp_path / "up.ckpt", mean=(0.1,))
    again = classifier(behind(tmp_path / "up.ckpt"), seed=3)
    assert len(start_from(again, tmp_path / "whole.ckpt")) == 1 and "localisers" not in again.start
    shift = "transformer.localisation.0.shift"
    assert torch.equal(network_state(again)[shift], network_state(model)[shift])


def test_a_localiser_trains_in_place_before_a_frozen_classifier(tmp_path: Path) -> None:
    estimator(tmp_path / "up.ckpt")
    model = classifier(behind(tmp_path / "up.ckpt"), prior_weight=2.0, loss_weight=0.0)
    start_from(model, save(classifier(), tmp_path / "one.ckpt"))
    with pytest.raises(UprightError, match="The prior compares poses of an image, but the data are not rotated"):
        train(model, Freeze(until_epoch=None, head=True), epochs=1)
    rotate = {"augment": [partial(RandomAffine, rotate=180)]}
    watch = train(model, Freeze(until_epoch=None, head=True), epochs=1, **rotate)
    changed = {name for name, value in watch.states[0].items() if not torch.equal(value, watch.states[-1][name])}
    trained = {f"transformer.{name}" for name, _ in model.model.network.transformer.named_parameters()}
    # The softmax of the votes cancels what all scores have in common.
    assert {name for name in trained if not name.endswith("bias")} <= changed
    assert all(name.startswith("transformer.") for name in changed)


def test_the_prior_of_a_localiser_is_the_loss_of_the_task_orientation(tmp_path: Path) -> None:
    model = classifier(behind(tmp_path / "up.ckpt"), prior_weight=1.0, loss_weight=0.0).eval()
    images, angles = torch.rand(3, 1, 12, 12), torch.tensor([0.3, -2.0, 1.0])
    with observing() as observations:
        model(images)
    transforms, points = partial(project_points, rotation(angles)), pixel_centres(4, 4)
    loss = prior_loss(transforms, observations, points, 1.0)
    expected = torch.nn.functional.cross_entropy(observations[0].votes.log(), votes(angles, 16))
    torch.testing.assert_close(loss, expected)


def test_a_stock_trainer_loads_the_weights_of_a_localiser_once(tmp_path: Path) -> None:
    theirs = estimator(tmp_path / "up.ckpt")
    model = classifier(behind(tmp_path / "up.ckpt"))
    watch = train(model, Freeze(until_epoch=1), epochs=1)  # freezes the classifier
    weights = "transformer.localisation.0.network.layers.0.convolution.weight"
    assert torch.equal(watch.states[0][weights], network_state(theirs)["layers.0.convolution.weight"])
    assert torch.equal(watch.states[0]["network.stem.0.0.weight"], watch.states[-1]["network.stem.0.0.weight"])
    assert not torch.equal(watch.states[0][weights], watch.states[-1][weights])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"turns": 32, "mask": "none"}, r'{"turns": 16, "mask": "disc"}'),
        ({"size": None}, r'{"size": 16}'),
        ({"network": partial(POLAR, blocks=2)}, r'{"network": {"class_path": .* "blocks": 1}}}'),
    ],
)
def test_weights_of_another_localiser_are_refused_and_change_nothing(
    tmp_path: Path, options: dict[str, object], text: str
) -> None:
    estimator(tmp_path / "up.ckpt")
    model = classifier(behind(tmp_path / "up.ckpt", **options))
    before = network_state(model)
    with pytest.raises(
        UprightError, match=rf"another form than the NetworkLocaliser has. Give it .*: {text}."
    ) as refusal:
        start_from(model, save(classifier(seed=4), tmp_path / "one.ckpt"))
    assert "\n" not in str(refusal.value)
    assert model.start is None and all(torch.equal(v, network_state(model)[n]) for n, v in before.items())


def test_a_localiser_takes_no_classifier_and_no_other_channels(tmp_path: Path) -> None:
    model = classifier(behind(save(classifier(), tmp_path / "one.ckpt")))
    with pytest.raises(UprightError, match=r"one.ckpt' is a classifier; weights of NetworkLocaliser must be a run of"):
        start_from(model)
    estimator(tmp_path / "up.ckpt", channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(UprightError, match=r"up.ckpt' was trained on .*; the data have "):
        start_from(classifier(behind(tmp_path / "up.ckpt")))


# --- Freeze -----------------------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Record the network's state before every epoch and at the end, and the rates and states of the optimiser."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[list[float]] = []
        self.counts: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states.append(network_state(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.counts.append(len(trainer.optimizers[0].state))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states.append(network_state(pl_module))
        self.metrics = set(trainer.callback_metrics)


def train(model: ImageClassifier, freeze: Freeze, epochs: int = 3, **options: object) -> Recorder:
    watch = Recorder()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        enable_checkpointing=False,
        callbacks=[freeze, watch],
        limit_train_batches=4,
        limit_val_batches=1,
        # Validation within the epoch puts the network into evaluation mode and back.
        val_check_interval=2,
        **quiet,
    )
    trainer.fit(model, Digits(size=12, margin=0, batch_size=16, **options))
    return watch


def test_the_body_is_frozen_and_then_trained_at_its_rate() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(SPEC, SMALL, partial(torch.optim.Adam, lr=0.01))
    watch = train(model, Freeze(until_epoch=2, lr_factor=0.1))
    heads = {"classifier.weight", "classifier.bias"}
    for epoch, (before, after) in enumerate(zip(watch.states, watch.states[1:], strict=False)):
        for name, value in before.items():
            changed = not torch.equal(value, after[name])
            assert changed == (name in heads or epoch == 2), (epoch, name)
    count = len(list(model.model.network.parameters()))
    assert watch.counts == [2] * 8 + [count] * 4
    assert all(slow == pytest.approx(0.1 * fast) for slow, fast in watch.rates[:-1])
    assert max(fast for _, fast in watch.rates) == pytest.approx(0.01, rel=0.1)


def test_lr_factor_works_without_freezing() -> None:
    model = classifier(Tokens)
    watch = train(model, Freeze(lr_factor=0.5), epochs=1)
    assert not any(torch.equal(*pair) for pair in zip(watch.states[0].values(), watch.states[-1].values(), strict=True))
    groups = model.optimizers().param_groups
    rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
    # The body contains a parameter of the module that also has the head.
    slow = {name for name, value in model.model.network.named_parameters() if rates[id(value)] == 0.005}
    assert slow == {"token", "body.weight", "body.bias"}


def test_a_new_transformer_is_not_frozen(tmp_path: Path) -> None:
    model = classifier(around("input"))
    start_from(model, save(classifier(), tmp_path / "one.ckpt"))
    watch = train(model, Freeze(until_epoch=1), epochs=1)
    changed = {name for name, value in watch.states[0].items() if not torch.equal(value, watch.states[-1][name])}
    assert {name.split(".")[0] for name in changed} == {"transformer", "network"}
    assert {name for name in changed if name.startswith("network")} == {
        "network.classifier.weight",
        "network.classifier.bias",
    }


@pytest.mark.parametrize("loss_weight", [0.0, 1.0])
def test_a_transformer_trains_before_a_classifier_that_does_not_change(tmp_path: Path, loss_weight: float) -> None:
    model = classifier(around("input", transform="rotation"), prior_weight=2.0, loss_weight=loss_weight)
    start_from(model, save(classifier(), tmp_path / "one.ckpt"))
    watch = train(model, Freeze(until_epoch=None, head=True), epochs=2)
    changed = {name for name, value in watch.states[0].items() if not torch.equal(value, watch.states[-1][name])}
    transformer = model.model.network.transformer
    assert changed == {f"transformer.{name}" for name, value in transformer.named_parameters() if value.requires_grad}
    assert ("train/loss" in watch.metrics) == bool(loss_weight)


def test_a_loss_without_weight_needs_a_prior() -> None:
    with pytest.raises(UprightError, match=r"loss_weight 0.0 trains nothing: use 1, or 0 with a prior_weight"):
        classifier(around("input", transform="rotation"), loss_weight=0.0)


def test_a_network_without_a_body_has_nothing_to_freeze() -> None:
    with pytest.raises(UprightError, match="all parameters of Perceptron start from scratch, or depend on"):
        train(classifier(Perceptron), Freeze(until_epoch=1))


@pytest.mark.parametrize("options", [{"until_epoch": -1}, {"lr_factor": 0}])
def test_invalid_options_of_freeze_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UprightError, match=r"Freeze needs until_epoch of at least 0 and lr_factor above 0, got"):
        Freeze(**options)


# --- On the command line ----------------------------------------------------------------------------------------------

OWN = """
import os, signal
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from upright.data.digits import Digits
from upright.data.source import Source
from dataclasses import replace

class Subset(Digits):
    def __init__(self, *, classes: str = "0123456", **options):
        super().__init__(**options)
        self.classes = classes
    @property
    def spec(self):
        return replace(super().spec, classes=tuple(self.classes))
    def read(self):
        complete = super().read()
        others = [i for i, label in enumerate(complete.labels) if str(label) in self.classes]
        labels = [self.classes.index(str(complete.labels[i])) for i in others]
        return Source([complete.images[i] for i in others], labels, [complete.names[i] for i in others])

class Kill(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == int(os.environ.get("DIE_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

class Agree(Callback):
    def on_train_start(self, trainer, pl_module):
        self.before = pl_module.model.network.stem[0][0].weight.detach().clone()
    def on_train_epoch_end(self, trainer, pl_module):
        waits = torch.equal(self.before, pl_module.model.network.stem[0][0].weight)
        assert waits == (trainer.current_epoch == 0)
    def on_train_batch_end(self, trainer, pl_module, *_):
        mine = torch.stack([p.detach().double().sum() for p in pl_module.parameters()])
        both = pl_module.all_gather(mine)
        assert len(both) == 2
        assert torch.equal(both[0], both[-1])
"""
CONFIG = """
seed_everything: 3
model:
  network: {class_path: upright.architectures.resnet.SmallResNet, init_args: {depth: 8, width: 4}}
  optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data: {class_path: own.Subset, init_args: {size: 12, margin: 0}}
trainer: {max_epochs: 1, accelerator: cpu}
"""
FROM = ("--start_from", "checkpoints/first", "--wandb", "off")
OTHER = ("fit", "--config", "own.yaml", "--data.classes", "789", "--name", "second", *FROM)
QUICK = ("--trainer.limit_train_batches", 3)


@pytest.fixture
def first(upright: Upright, tmp_path: Path) -> Path:
    """A run on the digits from 0 to 6."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(CONFIG)
    sys.modules.pop("own", None)
    answer = upright("fit", "--config", "own.yaml", "--name", "first", "--wandb", "off", *QUICK)
    assert answer.code == 0, answer.err
    return tmp_path / "checkpoints/first"


def test_a_run_starts_from_another_and_records_it(upright: Upright, first: Path, tmp_path: Path) -> None:
    answer = upright(*OTHER, *QUICK)
    assert answer.code == 0, answer.err
    ours = read_checkpoint(first)["upright"]["run"]
    assert f"Start: 'checkpoints/first/best.ckpt' (run first, {ours['id']})" in answer.out
    assert "classifier starts from scratch: 3 classes in place of 7." in answer.out
    start = read_checkpoint(tmp_path / "checkpoints/second")["upright"]["run"]["start"]
    assert start["run"] == ours and start["path"] == "checkpoints/first/best.ckpt"
    config = yaml.safe_load((tmp_path / "checkpoints/second/config.yaml").read_text())
    assert config["start_from"] == "checkpoints/first"
    # The first run is not needed any more, but it is still recorded.
    (first / "best.ckpt").unlink()
    resume = ("fit", "--name", "second", "--ckpt_path", "last", "--trainer.max_epochs", 2, "--wandb", "off", *QUICK)
    answer = upright(*resume)
    assert answer.code == 0 and "Start:" not in answer.out, answer.err
    assert read_checkpoint(tmp_path / "checkpoints/second/last.ckpt")["upright"]["run"]["start"] == start
    # A command that starts and resumes may name the start, too.
    answer = upright(*OTHER, *QUICK, "--ckpt_path", "auto", "--trainer.max_epochs", 3)
    assert answer.code == 0 and "Start:" not in answer.out and "epoch 3/3" in answer.out, answer.err
    assert upright("test", "--ckpt_path", "checkpoints/second").code == 0
    assert restore(tmp_path / "checkpoints/second").classifier.start == start
    assert upright("export", "checkpoints/second").code == 0
    manifest = json.loads((tmp_path / "export/second/manifest.json").read_text())
    assert manifest["provenance"]["run"]["start"] == start


def test_a_start_loads_the_weights_but_not_the_optimiser(upright: Upright, first: Path, tmp_path: Path) -> None:
    still = ("--model.optimizer.lr", 0, "--trainer.limit_train_batches", 2)
    assert upright(*OTHER, *still).code == 0
    ours, theirs = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "checkpoints/second/last.ckpt", first / "best.ckpt")
    )
    trained = {name for name in ours if "running" not in name and "tracked" not in name and "classifier" not in name}
    assert len(trained) > 10 and all(torch.equal(ours[name], theirs[name]) for name in trained)
    checkpoint = torch.load(tmp_path / "checkpoints/second/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


def test_training_images_of_the_start_are_not_evaluated(upright: Upright, first: Path, tmp_path: Path) -> None:
    mixed = (*OTHER, "--data.classes", "5678", *QUICK)
    answer = upright(*mixed)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "in split 'val' of these data are images that 'checkpoints/first/best.ckpt' was trained on" in answer.err
    assert not (tmp_path / "checkpoints/second").exists()
    assert upright(*mixed, "--allow_seen_images").code == 0
    # The checkpoint of the next run still has their hashes.
    assert upright(*OTHER, "--name", "third", *QUICK).code == 0
    answer = upright("test", "--ckpt_path", "checkpoints/third", "--data.classes", "012")
    assert answer.code == 2
    third = read_checkpoint(tmp_path / "checkpoints/third")["upright"]
    assert torch.isin(read_checkpoint(first)["upright"]["split"]["hashes"]["train"], third["seen"]).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--start_from", "nope.ckpt"), "'nope.ckpt' does not exist"),
        (("--start_from", "own.py"), "is not an Upright checkpoint or a state dict"),
        (("--model.network.width", 8), "'checkpoints/first/best.ckpt' holds the weights of another network: stem.0.0"),
        (("--ckpt_path", "checkpoints/first/last.ckpt"), "resumes one that has its weights: give one of them."),
    ],
)
def test_an_invalid_start_leaves_no_run(
    upright: Upright, first: Path, tmp_path: Path, options: tuple[object, ...], text: str
) -> None:
    answer = upright(*OTHER, *options)
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["first"]


FREEZE = "[{class_path: own.Kill}, {class_path: upright.training.finetuning.Freeze, init_args: %s}]"


@pytest.mark.slow
def test_a_killed_frozen_run_ends_like_an_uninterrupted_one(first: Path, tmp_path: Path) -> None:
    freeze = FREEZE % "{until_epoch: 2, lr_factor: 0.1}"
    options = (*FROM, "--data.classes", "789", "--data.batch_size", "32", "--trainer.max_epochs", "3")
    options += ("--trainer.callbacks", freeze, "--save_every_n_steps", "4")
    run_to_end(tmp_path, "complete", *options)
    runs = tmp_path / "checkpoints"
    steps = last(runs / "complete")["global_step"] // 3
    # The run is killed in the middle of a frozen epoch, and again in the middle of another one.
    resumed = options[2:]
    assert steps > 6 and fit_process(tmp_path, "killed", *options, DIE_AT=str(steps + 5)).returncode < 0
    resume = (*resumed, "--ckpt_path", "last")
    assert fit_process(tmp_path, "killed", *resume, DIE_AT=str(2 * steps + 6)).returncode < 0
    run_to_end(tmp_path, "killed", *resume)
    assert differences(runs / "complete", runs / "killed") == []


def test_a_resumed_run_cannot_change_the_rate_of_its_body(upright: Upright, first: Path) -> None:
    assert upright(*OTHER, *QUICK, "--trainer.callbacks", FREEZE % "{lr_factor: 0.1}").code == 0
    for freeze, factor in ((FREEZE % "{lr_factor: 0.5}", 0.5), ("[]", 1.0)):
        resume = ("--name", "second", "--ckpt_path", "last", "--trainer.max_epochs", 2, "--trainer.callbacks", freeze)
        answer = upright("fit", *resume, "--wandb", "off")
        assert answer.code == 2 and answer.err.count("\n") == 1
        assert f"was trained with Freeze.lr_factor 0.1 and cannot resume with {factor}" in answer.err


@pytest.mark.slow
def test_two_processes_agree_on_a_frozen_body(first: Path, tmp_path: Path) -> None:
    callbacks = (FREEZE % "{until_epoch: 1}").replace("own.Kill", "own.Agree")
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    options = ("--data.batch_size", "32", "--trainer.max_epochs", "2", "--trainer.callbacks", callbacks)
    command = [sys.executable, "-m", "upright", *map(str, OTHER), *options, *two]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Start: ") == 1
    checkpoint = last(tmp_path / "checkpoints/second")
    state, start = checkpoint["state_dict"], torch.load(first / "best.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(state["model.network.stem.0.0.weight"], start["model.network.stem.0.0.weight"])
    counted = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    steps = checkpoint["global_step"] // 2
    assert counted == {steps + int(start["model.network.stem.0.1.num_batches_tracked"])}


def test_every_config_has_a_head() -> None:
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        data = build(yaml.safe_load((ROOT / "configs" / config["data"]).read_text()))()
        assert head(classifier(build(config["model"]["network"]), data.spec)), path
