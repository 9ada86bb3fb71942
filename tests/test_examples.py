from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright
from upright.examples import find_config


@pytest.mark.parametrize("name", ["stn_lenet", "stn_lenet.yaml", "configs/stn_lenet.yaml"])
def test_a_config_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "configs/stn_lenet.yaml"
    own = Path(name)
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    assert find_config(name) == own


@pytest.mark.parametrize("name", ["nope", "../stn_lenet", "/stn_lenet", "configs/../stn_lenet.yaml", ""])
def test_other_names_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == Path(name)


def test_commands_find_configs_by_name(upright: Upright) -> None:
    answer = upright("describe", "lenet_mnist", "--data", "data/digits")
    assert answer.code == 0 and "61,706" in answer.out
    with pytest.raises(SystemExit, match="0"):
        upright("fit", "--config=lenet", "--data", "data/digits", "--print_config")
    answer = upright("fit", "--config", "lenett")
    assert answer.code == 2 and "lenett" in answer.err


def test_a_misspelt_name_has_a_hint(upright: Upright) -> None:
    answer = upright("fit", "--config", "stn_lenett", "--wandb", "off")
    assert answer.code == 2
    assert "There is no config 'stn_lenett'. Did you mean 'stn_lenet'? `upright configs list` lists all." in answer.err


def test_existing_folders_are_not_replaced(upright: Upright) -> None:
    assert upright("configs", "copy", "--to", "here").code == 0
    assert Path("here/configs/data/digits.yaml").is_file() and Path("here/export/digits/model.onnx").is_file()
    answer = upright("configs", "copy", "--to", "here")
    assert answer.code == 2 and "'here/configs' exists and is not replaced; give another folder" in answer.err


def test_the_list_describes_every_config(upright: Upright) -> None:
    lines = upright("configs", "list").out.split("\n\n")[0].splitlines()
    assert len(lines) > 30 and not [line for line in lines if len(line.split()) < 2]
