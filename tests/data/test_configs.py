"""Data options whose defaults come from the network."""

import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.data.configs import adopt_format
from upright.errors import UserError

TRANSFORMER = "upright.architectures.transformer_network.TransformerNetwork"


class Formatted(LeNet):
    @classmethod
    def image_format(cls, name: str) -> dict[str, Any]:
        if name != "known":
            raise ValueError(f"There is no '{name}'.")
        return dict(FORMAT)


def network(name: str = "known") -> dict[str, Any]:
    return {"class_path": f"{__name__}.Formatted", "init_args": {"name": name}}


FORMAT = {"size": 48, "mean": (0.1, 0.2, 0.6), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"root": "x"}, FORMAT),
        ({"root": "x", "size": None, "mean": None, "std": None}, FORMAT),
        ({"root": "x", "size": 32, "mean": [0.5]}, FORMAT | {"size": 32, "mean": [0.5]}),
        ({"root": "x", "interpolation": "bilinear"}, FORMAT | {"interpolation": "bilinear"}),
        ({"root": "x", "channels": 1}, FORMAT | {"mean": (pytest.approx(0.3),), "std": (0.5,)}),
    ],
)
def test_missing_options_are_those_of_the_network(own: dict[str, Any], expected: dict[str, Any]) -> None:
    around = {"class_path": TRANSFORMER, "init_args": {"network": network()}}
    for model in ({"network": network()}, {"class_path": "x.Model", "init_args": {"network": around}}):
        data = {"class_path": "upright.data.folder.Folder", "init_args": dict(own)}
        adopt_format(model, data)
        assert data["init_args"] == own | expected
    parsed = Namespace(class_path="upright.data.folder.Folder", init_args=Namespace(**own))
    adopt_format(
        Namespace(network=Namespace(class_path=f"{__name__}.Formatted", init_args=Namespace(name="known"))), parsed
    )
    assert parsed.init_args.as_dict() == own | expected


def test_other_data_and_other_networks_do_not_change() -> None:
    for model, path in (
        ({"network": network()}, "upright.data.digits.Digits"),
        ({"network": {"class_path": "upright.architectures.lenet.LeNet"}}, "upright.data.folder.Folder"),
    ):
        data: dict[str, Any] = {"class_path": path}
        adopt_format(model, data)
        assert not data.get("init_args")


def test_a_network_without_a_format_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^There is no 'other'\.$"):
        adopt_format({"network": network("other")}, {"class_path": "upright.data.folder.Folder"})


def test_the_missing_package_is_named(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    config = ROOT / "configs/finetuning/timm.yaml"
    for command in (("describe", config), ("fit", "--config", config, "--data.root", tmp_path)):
        answer = upright(*command)
        assert answer.code == 2
        assert answer.err == "upright: error: Timm needs the package timm: pip install 'upright[timm]'.\n"
