"""The JSON schemas accept every config there is, and no mistake in one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import CONFIGS, ROOT, Upright

Validator = jsonschema.Draft202012Validator
DATA = sorted(ROOT.glob("configs/data/*.yaml"))
STRIP = """
from torch import nn

class Strip(nn.Sequential):
    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, *, columns: int = 16) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
"""


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from upright.runs.cli.schema import schema

    folder = tmp_path_factory.mktemp("schemas")
    assert schema(to=str(folder)) == 0
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("experiment", "data")}
    for one in found.values():
        Validator.check_schema(one)
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_is_valid(schemas: dict[str, Any], config: Path) -> None:
    Validator(schemas["experiment"]).validate(yaml.safe_load(config.read_text()))


@pytest.mark.parametrize("config", DATA, ids=lambda path: path.stem)
def test_every_data_yaml_is_valid(schemas: dict[str, Any], config: Path) -> None:
    Validator(schemas["data"]).validate(yaml.safe_load(config.read_text()))


def network(**init_args: object) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        config["model"]["network"]["init_args"].update(init_args)

    return change


@pytest.mark.parametrize(
    "change",
    [
        network(activaton="relu"),
        network(activation="relo"),
        network(widths="wide"),
        lambda config: config.update(modle={}),
        lambda config: config["trainer"].update(max_epoch=3),
        lambda config: config["model"]["optimizer"]["init_args"].update(learning_rate=0.1),
        lambda config: config["model"].update(upright_weight="much"),
    ],
)
def test_a_mistake_is_seen(schemas: dict[str, Any], change: Callable[[Any], None]) -> None:
    config = yaml.safe_load((ROOT / "configs/lenet.yaml").read_text())
    validator = Validator(schemas["experiment"])
    assert validator.is_valid(config)
    change(config)
    assert not validator.is_valid(config)


def test_each_place_is_offered_what_fits_there(schemas: dict[str, Any]) -> None:
    def offered(kind: str) -> set[str]:
        forms = schemas["experiment"]["$defs"][kind]["anyOf"]
        return {form["properties"]["class_path"].get("const") for form in forms if "properties" in form}

    assert "upright.architectures.resnet.ResNet" in offered("Module_of_tuple_int")
    assert "upright.training.losses.CrossEntropy" in offered("Module_of_int")
    assert "kornia.augmentation.RandomErasing" in offered("Module_of_nothing")
    for kind in ("Module_of_int", "Module_of_nothing"):
        assert "upright.architectures.resnet.ResNet" not in offered(kind)
    assert {"torch.optim.SGD", "torch.optim.AdamW"} <= offered("Optimizer_of_Iterable")


def test_an_own_network_may_have_any_arguments_until_its_module_is_named(
    upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schema_strip.py").write_text(STRIP)
    config = yaml.safe_load((ROOT / "configs/lenet.yaml").read_text())
    config["model"]["network"] = {"class_path": "schema_strip.Strip", "init_args": {"colums": 3}}

    def validator() -> Any:
        return Validator(json.loads((tmp_path / "schemas/experiment.json").read_text()))

    answer = upright("schema")
    assert answer.code == 0 and "../schemas/experiment.json" in answer.out and "yaml.schemas" in answer.out
    assert validator().is_valid(config)
    assert upright("schema", "schema_strip").code == 0
    assert not validator().is_valid(config)
    config["model"]["network"]["init_args"] = {"columns": 3}
    assert validator().is_valid(config)


def test_a_module_that_is_not_there(upright: Upright, tmp_path: Path) -> None:
    answer = upright("schema", "nowhere.strip")
    assert answer.code == 2 and "no module named 'nowhere'" in answer.err
    assert not (tmp_path / "schemas").exists()
