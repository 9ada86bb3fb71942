import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.architectures.variants import VARIANTS, Variant
from tests.conftest import CONFIGS, ROOT, Upright
from upright.anatomy import describe
from upright.recipes import build

LENET = ROOT / "configs/lenet.yaml"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config(config: Path, upright: Upright) -> None:
    answer = upright("describe", config)
    assert answer.code == 0 and answer.err == ""
    assert all(len(line) <= 120 for line in answer.out.splitlines()), answer.out
    description = json.loads(upright("describe", config, "--format", "json").out)
    for column in ("parameters", "multiply_adds", "activations"):
        assert sum(layer[column] for layer in description["layers"]) == description["totals"][column]


def test_the_table(upright: Upright) -> None:
    lines = upright("describe", LENET).out.splitlines()
    rows = {number: " ".join(lines[number].split()) for number in (0, 2, 8, 15)}
    assert rows == {
        0: "layer type f s p output field jump parameters multiply-adds activations dense %",
        2: "features.0 Conv2d 5 1 2 6 x 28 x 28 5 1 156 117,600 4,704 3.19",
        8: "classifier.0 Flatten 400 all 400",
        15: "total 61,706 416,520 15,002",
    }
    assert lines[17] == "input 1 x 28 x 28; 61,706 of 61,706 parameters are trained; 0.25 MB as float32"
    # The numbers of a column end at the same position.
    end = lines[0].index("parameters") + len("parameters")
    assert [line[:end].split()[-1] for line in (lines[2], lines[5], lines[15])] == ["156", "2,416", "61,706"]


def test_long_names_lose_their_beginning(upright: Upright) -> None:
    out = upright("describe", ROOT / "configs/stn_lenet.yaml").out
    assert re.search(r"^….*0\.layers\.2 +Conv2d", out, flags=re.M)


def test_markdown(upright: Upright) -> None:
    table, notes = upright("describe", LENET, "--format", "markdown").out.split("\n\n")
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert {len(row) for row in rows} == {12} and set("".join(rows[1])) == set(" -:")
    assert rows[2][0].strip() == "features.0" and rows[2][9].strip() == "117,600"
    assert all(line.startswith("- ") for line in notes.splitlines())


def test_json(upright: Upright) -> None:
    description = json.loads(upright("describe", LENET, "--format", "json").out)
    assert description["input"] == [1, 28, 28] and description["warnings"] == []
    assert description["totals"]["parameters"] == 61_706
    assert description["layers"][0] == {
        "name": "features.0",
        "kind": "Conv2d",
        "window": {"kernel": [5, 5], "stride": [1, 1], "padding": [2, 2]},
        "output": [6, 28, 28],
        "receptive_field": [5, 5],
        "jump": [1, 1],
        "parameters": 156,
        "multiply_adds": 117_600,
        "activations": 4704,
        "connections": pytest.approx(25 / 784),
        "weights": pytest.approx(150 / (784 * 4704)),
    }


def test_a_checkpoint_is_described_like_its_config(upright: Upright, run_folder: Path) -> None:
    from_config = upright("describe", ROOT / "configs/stn_lenet.yaml").out
    for source in (run_folder, run_folder / "last.ckpt", run_folder / "config.yaml"):
        assert upright("describe", source).out == from_config


def test_other_data(upright: Upright, run_folder: Path) -> None:
    data = yaml.safe_load((ROOT / "configs/data/digits.yaml").read_text())
    data["init_args"]["size"] = 40
    Path("data.yaml").write_text(yaml.safe_dump(data))
    for source in (LENET, run_folder):
        assert "input 1 x 40 x 40;" in upright("describe", source, "--data", "data.yaml").out


OWN = """
from torch import nn

class Careful(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(input_shape[0] * 49, num_classes))

    def forward(self, images):
        assert images.sum().item() == 0
        return super().forward(images)
"""


def test_a_network_that_depends_on_its_values_and_a_warning(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "careful.py").write_text(OWN)
    config = {"model": {"network": {"class_path": "careful.Careful"}}, "data": str(ROOT / "configs/data/digits.yaml")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    texts = {format: upright("describe", "own.yaml", "--format", format).out for format in ("table", "markdown")}
    assert "\nwarning: 0 (MaxPool2d) keeps 49 of 784 positions, 1 in 16; smaller strides" in texts["table"]
    assert "\n- warning: 0 (MaxPool2d) keeps" in texts["markdown"]
    assert json.loads(upright("describe", "own.yaml", "--format", "json").out)["warnings"]


NETWORK = "model: {network: {class_path: upright.architectures.lenet.LeNet%s}}\n"
DIGITS = "data: {class_path: upright.data.digits.Digits, init_args: {size: %d, margin: 0}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "'own.yaml' cannot be read as YAML: while parsing"),
        ("- 1", "'own.yaml' needs a model.network with class_path and init_args, like configs/lenet.yaml."),
        (DIGITS % 28, "'own.yaml' needs a model.network"),
        ("model: {network: LeNet}", "'own.yaml' needs a model.network"),
        (NETWORK % "", "'own.yaml' does not name its data; give a YAML of data with --data."),
        (NETWORK % "" + "data: 3", "'own.yaml' needs a class_path and init_args, like configs/data/digits.yaml."),
        (NETWORK % "" + "data: nope.yaml", "'nope.yaml' cannot be read: No such file or directory. Give a YAML file."),
        (
            NETWORK % "t" + DIGITS % 28,
            "module 'upright.architectures.lenet' has no class 'LeNett'. Did you mean 'LeNet'?",
        ),
        (NETWORK % ", init_args: {wide: 1}" + DIGITS % 28, "'own.yaml': LeNet.__init__() got an unexpected keyword"),
        (NETWORK % "" + DIGITS % 8, "LeNet needs images of at least 12x12 pixels, got 8x8."),
    ],
)
def test_a_bad_config_is_one_line(text: str, message: str, upright: Upright) -> None:
    Path("own.yaml").write_text(text)
    answer = upright("describe", "own.yaml")
    assert answer.code == 2 and answer.out == "" and message in answer.err
    assert answer.err.startswith("upright: error: ") and answer.err.count("\n") == 1


def test_a_bad_file_is_one_line(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "lenet.yaml").touch()
    (tmp_path / "folder").mkdir()
    torch.save({}, tmp_path / "other.ckpt")
    for source, message in {
        "lenet.yml": "'lenet.yml' does not exist. Did you mean 'lenet.yaml'? Give a YAML like configs/lenet.yaml",
        "folder": "Folder 'folder' holds no best.ckpt",
        "other.ckpt": "'other.ckpt' holds weights, but it is not a checkpoint",
    }.items():
        answer = upright("describe", source)
        assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert "invalid choice: 'csv'" in upright("describe", LENET, "--format", "csv").err


@pytest.mark.parametrize("case", [*CONFIGS, *VARIANTS], ids=lambda case: getattr(case, "stem", None) or case.name)
def test_every_network_is_described_without_being_run(case: Path | Variant) -> None:
    if isinstance(case, Path):
        recipe, shape = yaml.safe_load(case.read_text())["model"]["network"], (1, 28, 28)
    else:
        recipe, shape = case.recipe, case.input_shape
    with torch.device("meta"):
        network = build(recipe)(shape, 7)
        description = describe(network, shape)
    assert description.totals.parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("{class_path: upright.architectures.lenet.LeNet, init_args: {activation: gelu}}", "must be one of relu, tanh"),
        ("{class_path: upright.architectures.lenet.LeNet, init_args: {widths: [1, 2, 3]}}", "got 3"),
        ("{class_path: upright.architectures.vgg.VGG, init_args: {units: [10]}}", "got 1 units"),
        ("{class_path: upright.architectures.mlp.MLP, init_args: {widths: [-3]}}", "cannot be built for images of"),
    ],
)
def test_a_network_that_cannot_be_built_is_one_line(recipe: str, text: str, upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"model:\n  network: {recipe}\ndata: {ROOT}/configs/data/digits.yaml\n")
    answer = upright("describe", "x.yaml")
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1
