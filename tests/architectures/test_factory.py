"""Networks of other packages: arguments by name, configs, and one line for what cannot be built."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Upright
from upright.architectures.factory import Factory, wrap_foreign
from upright.errors import UserError
from upright.recipes import recipe

OWN = """
from torch import nn

class Convolutional(nn.Sequential):
    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = 8):
        super().__init__(
            nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, num_classes),
        )

class Patches(nn.Sequential):
    def __init__(self, image_size: int, patch_size: int, num_classes: int = 1000, channels: int = 3):
        places = (image_size // patch_size) ** 2
        super().__init__(
            nn.Conv2d(channels, 4, patch_size, patch_size), nn.Flatten(), nn.Linear(4 * places, num_classes)
        )

class Auxiliary(Convolutional):
    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits

def convolutional(weights: str | None = None, **options: object) -> nn.Module:
    return Convolutional(**options)

def untyped(num_classes=1000, in_chans=3):
    return Convolutional(num_classes, in_chans)

def no_classes(width: int) -> nn.Module:
    return nn.Identity()

def no_module(num_classes):
    return num_classes

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, upright: Upright) -> None:
    (tmp_path / "own_factories.py").write_text(OWN)
    sys.path.insert(0, str(tmp_path))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Convolutional", {}),
        ("Convolutional", {"width": 5}),
        ("Patches", {"patch_size": 4}),
        ("convolutional", {"in_channels": 3, "num_classes": 1000}),
        ("untyped", {}),
    ],
)
def test_parameters_are_matched_by_name(name: str, options: dict[str, Any]) -> None:
    network = Factory((1, 12, 12), 7, path=f"own_factories.{name}", options=options)
    assert network(torch.zeros(2, 1, 12, 12)).shape == (2, 7)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("path", "options", "text"),
    [
        ("own_factories.nope", {}, r"'own_factories.nope' cannot be imported \(.*\): give package.module.Name."),
        ("nope.nope", {}, r"'nope.nope' cannot be imported \(No module named 'nope'\)"),
        ("own_factories.number", {}, "'own_factories.number' is a int, not a class or a function."),
        ("own_factories.no_classes", {}, "has no parameter for the number of classes; it needs one named num_classes"),
        ("own_factories.no_module", {}, "returns a int; a network is a torch.nn.Module."),
        ("own_factories.Patches", {}, "cannot be built with num_classes, channels, image_size: .*'patch_size'"),
        (
            "own_factories.convolutional",
            {},
            r"no parameter for the 2 channel\(s\) of these images .*--data.channels 3",
        ),
        (
            "own_factories.convolutional",
            {"weights": "DEFAULT"},
            "`weights` would load weights each time .*--start_from",
        ),
        ("own_factories.untyped", {"widht": 3}, "unexpected keyword argument 'widht'"),
    ],
)
def test_what_cannot_be_built_is_one_line(path: str, options: dict[str, Any], text: str) -> None:
    channels = 3 if path.endswith("no_module") else 2
    with pytest.raises(ValueError, match=text) as error:
        Factory((channels, 12, 12), 7, path=path, options=options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.usefixtures("own")
def test_logits_must_be_a_tensor() -> None:
    network = Factory((1, 12, 12), 7, path="own_factories.Auxiliary")
    assert network.eval()(torch.zeros(2, 1, 12, 12)).shape == (2, 7)
    with pytest.raises(UserError, match=r"Auxiliary returns a tuple in forward, not logits \(B, 7\)\."):
        network.train()(torch.zeros(2, 1, 12, 12))
    network.num_classes = 8
    with pytest.raises(UserError, match=r"Auxiliary returns a tensor \(B, 7\) in forward, not logits \(B, 8\)\."):
        network.eval()(torch.zeros(2, 1, 12, 12))


@pytest.mark.usefixtures("own")
def test_only_foreign_networks_are_wrapped() -> None:
    lenet = {"class_path": "upright.architectures.lenet.LeNet", "init_args": {"activation": "relu"}}
    missing, foreign = {"class_path": "own_factories.nope"}, {"class_path": "own_factories.Patches"}
    around = "upright.architectures.transformer_network.TransformerNetwork"
    config = {"network": {"class_path": around, "init_args": {"network": foreign}}, "other": lenet}
    wrap_foreign(config)
    inner = {"path": "own_factories.Patches", "options": {}}
    assert config["network"]["init_args"]["network"] == {
        "class_path": "upright.architectures.factory.Factory",
        "init_args": inner,
    }
    for network in (lenet, missing, config["network"]):
        before = {"network": network}
        wrap_foreign(before)
        assert before == {"network": network}


CONFIG = """
model:
  network: NETWORK
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data: {class_path: upright.data.digits.Digits, init_args: {size: 12, margin: 0, batch_size: 500}}
trainer: {max_epochs: 1}
"""


@pytest.mark.usefixtures("own", "fewer_digits")
@pytest.mark.parametrize(
    "network",
    [
        "own_factories.Convolutional",
        "{class_path: own_factories.untyped, init_args: {in_chans: 3}}",
        "{class_path: own_factories.convolutional, init_args: {in_channels: 3}}",
    ],
)
def test_a_config_names_them_directly(upright: Upright, tmp_path: Path, network: str) -> None:
    (tmp_path / "own.yaml").write_text(CONFIG.replace("NETWORK", network))
    for command in (
        ("fit", "--config", "own.yaml", "--wandb", "off"),
        ("test", "--ckpt_path", "checkpoints/own"),
        ("describe", "own.yaml"),
        ("describe", "checkpoints/own"),
    ):
        answer = upright(*command)
        assert answer.code == 0, answer.err
    assert "class_path: upright.architectures.factory.Factory" in (tmp_path / "checkpoints/own/config.yaml").read_text()
    (tmp_path / "own.yaml").write_text(CONFIG.replace("NETWORK", "own_factories.no_classes"))
    answer = upright("fit", "--config", "own.yaml", "--force", "--wandb", "off")
    assert answer.code == 2 and answer.err.count("\n") == 1 and "no parameter for the number of classes" in answer.err
    answer = upright("fit", "--config", "own.yaml", "--model.network", "own_factories.untyped", "--force")
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "'own_factories.untyped' is a function that is not annotated to return a Module" in answer.err


def test_a_network_in_place_of_its_class_is_not_printed() -> None:
    with pytest.raises(UserError, match="For a network of a function, give partial") as error:
        recipe(nn.Sequential(*(nn.Linear(3, 3) for _ in range(100))))
    assert "\n" not in str(error.value) and len(str(error.value)) < 450
    assert recipe(partial(Factory, path="a.b"))["init_args"] == {"path": "a.b"}
