"""timm and torchvision as a user installs them: `make test-ecosystem`. Weights are random files in a cache of the Hub.

The environment has no test of the default suite to repeat; it needs torchvision, because timm imports it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import ROOT
from upright.architectures.resnet import ResNet
from upright.checkpoint import read_checkpoint
from upright.exporting.export import write_weights
from upright.images import ImageSpec
from upright.training.model import Model
from upright.training.restoring import restore

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1800)]

CONFIG = ROOT / "configs/finetuning/timm.yaml"
MEAN = [0.485, 0.456, 0.406]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def timm() -> Any:
    return import_module("timm")


@pytest.fixture
def hub(tmp_path: Path, timm: Any) -> Path:
    """A cache of the Hub with random weights of two networks, as a download leaves it."""
    from safetensors.torch import save_file

    for name in ("test_efficientnet", "mobilenetv3_small_100", "convnext_atto"):
        torch.manual_seed(1)
        model = timm.create_model(name)
        folder = tmp_path / "hub/hub" / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
        (folder / "snapshots/0").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0")
        save_file(model.state_dict(), folder / "snapshots/0/model.safetensors")
    return tmp_path / "hub"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my-images" / name / f"{number}.png")
    return tmp_path


def upright(folder: Path, *arguments: object) -> Answer:
    """Run a command in a process of its own, offline, because huggingface_hub reads its environment once."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "upright", *map(str, arguments)]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Answer(process.returncode, process.stdout, process.stderr)


def fit(folder: Path, *options: object, network: str = "test_efficientnet") -> Answer:
    options = ("--data.root", "my-images", "--wandb", "off", "--trainer.max_epochs", 2, *options)
    return upright(folder, "fit", "--config", CONFIG, "--model.network.name", network, "--name", "a", *options)


@pytest.mark.usefixtures("hub")
def test_a_pretrained_network_from_fit_to_a_verified_bundle(images: Path, timm: Any) -> None:
    answer = fit(images)
    assert answer.code == 0, answer.err
    start, new = answer.out.splitlines()[:2]
    assert re.fullmatch(r"Start: timm/test_efficientnet\.\w+, (\d+) of \d+ tensors\.", start)
    assert new == "backbone.classifier starts from scratch: 2 classes in place of 1000."
    assert "Warning" not in answer.err
    shutil.rmtree(images / "hub")
    for command in (
        ("test", "--ckpt_path", "checkpoints/a"),
        ("describe", "checkpoints/a"),
        ("export", "checkpoints/a", "--precision", "int8", "--max-drop", 100, "--safetensors"),
        ("verify", "export/a"),
        ("fit", "--ckpt_path", "checkpoints/a/last.ckpt", "--trainer.max_epochs", 3, "--wandb", "off"),
    ):
        answer = upright(images, *command)
        assert answer.code == 0, answer.err
    assert (images / "export/a.safetensors").is_file()
    spec = read_checkpoint(images / "checkpoints/a")["upright"]["spec"]
    assert (spec["height"], spec["mean"], spec["interpolation"]) == (160, MEAN, "bicubic")


def test_weights_as_safetensors_are_those_of_the_network(images: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    spec = ImageSpec(3, 32, 32, ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    network = ResNet(spec.input_shape, 2)
    write_weights(Model(spec, network), tmp_path / "weights.safetensors")
    other = ResNet(spec.input_shape, 2)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in other.state_dict().items())
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert ImageSpec.from_dict(json.loads(file.metadata()["upright"])) == spec


def test_the_weights_are_those_of_the_file_and_the_body_stays_frozen(images: Path, hub: Path) -> None:
    from safetensors.torch import load_file

    assert fit(images, "--trainer.max_epochs", 1).code == 0
    (file,) = hub.glob("hub/models--timm--test_efficientnet*/snapshots/0/model.safetensors")
    network = restore(images / "checkpoints/a").classifier.model.network.backbone.state_dict()
    for name, value in load_file(file).items():
        assert name.startswith("classifier") or torch.equal(network[name], value), name


@pytest.mark.usefixtures("hub")
def test_the_data_may_have_another_format(images: Path) -> None:
    answer = fit(images, "--data.size", 64, "--data.std", "[0.3]", "--data.channels", 1, "--trainer.max_epochs", 1)
    assert answer.code == 0, answer.err
    spec = read_checkpoint(images / "checkpoints/a")["upright"]["spec"]
    mean = pytest.approx([sum(MEAN) / 3])
    assert (spec["channels"], spec["height"], spec["std"], spec["mean"]) == (1, 64, [0.3], mean)


def test_weights_from_a_file(images: Path, hub: Path) -> None:
    (file,) = hub.glob("hub/models--timm--test_efficientnet*/snapshots/0/model.safetensors")
    options = ("--model.network.pretrained", "false", "--trainer.max_epochs", 1)
    answer = fit(images, *options, "--start_from", file)
    assert answer.code == 0, answer.err
    assert "(a state dict)" in answer.out and "backbone.classifier starts from scratch" in answer.out
    answer = fit(images, *options, "--start_from", file, "--force", network="test_resnet")
    assert answer.code == 2 and answer.err.count("\n") == 1 and "weights of another network" in answer.err
    file.write_bytes(file.read_bytes()[:5000])
    answer = fit(images, *options, "--start_from", file, "--force")
    assert answer.code == 2 and "is not a complete safetensors file" in answer.err


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mobilnetv3_small_100", "timm has no network 'mobilnetv3_small_100'. Did you mean mobilenetv3_small_100"),
        ("resnet18.nope", "timm has no weights 'resnet18.nope'"),
        ("test_efficientnet", "can neither be downloaded nor found in the cache"),
    ],
)
def test_what_cannot_be_used_is_one_line(images: Path, name: str, text: str) -> None:
    answer = fit(images, network=name)
    assert answer.code == 2 and text in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert not (images / "checkpoints/a").exists()


@pytest.mark.usefixtures("hub")
def test_the_page_runs(images: Path) -> None:
    """docs/how-to/timm.md, with one epoch each."""
    shutil.copytree(ROOT / "configs", images / "configs")
    for language, content in re.findall(
        r"^```(.*)\n((?:.*\n)*?)```$", (ROOT / "docs/how-to/timm.md").read_text(), re.M
    ):
        if language == "yaml":
            name = content.splitlines()[0].removeprefix("# ")
            assert yaml.safe_load(content)
            (images / name).write_text(content)
        for line in content.replace("\\\n", " ").splitlines() if language == "sh" else ():
            program, *arguments = shlex.split(line)
            if program == "pip":
                continue
            quick = {"fit": ("--trainer.max_epochs", 1, "--wandb", "off"), "export": ("--max-drop", 100)}
            answer = upright(images, *arguments, *quick.get(arguments[0], ()))
            assert program == "upright" and answer.code == 0, f"{line}: {answer.err}"


@pytest.mark.usefixtures("timm")
def test_torchvision_loads_weights_only_from_a_file(images: Path) -> None:
    import torchvision

    options = ("--model.network", "torchvision.models.resnet18", "--data.size", 64, "--wandb", "off")
    options += ("--data.root", "my-images", "--trainer.max_epochs", 1, "--trainer.callbacks", "[]", "--name", "b")
    torch.save(torchvision.models.resnet18().state_dict(), images / "resnet18.pth")
    start = upright(images, "fit", "--config", CONFIG, *options, "--start_from", "resnet18.pth")
    assert start.code == 0, start.err
    assert "network.fc starts from scratch: 2 classes in place of 1000." in start.out
    assert upright(images, "export", "checkpoints/b").code == 0
    googlenet = ("--model.network", "torchvision.models.googlenet", "--data.size", 96, "--force")
    answer = upright(images, "fit", "--config", CONFIG, *options, *googlenet)
    assert answer.code == 2 and "Traceback" not in answer.err  # torchvision adds a warning of its own
    assert "returns a GoogLeNetOutputs in forward, not logits (B, 2)" in answer.err.splitlines()[-1]


@pytest.mark.usefixtures("timm")
def test_the_pass_matrix_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/backbones.py", "--quick"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| `test_vit` \| transformer \| 64 \| \S+ \| 1 step \| .* \| yes \| ", result.stdout, re.M)
