"""The page docs/lightning.md, executed: its scripts are written where they say, and its commands are typed there."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright

PAGE = (ROOT / "docs/lightning.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE, flags=re.M | re.S)
SCRIPTS = {code.splitlines()[0].removeprefix("# "): code for kind, code in BLOCKS if kind == "python"}
COMMANDS = [code.splitlines() for kind, code in BLOCKS if kind == "sh"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, code in SCRIPTS.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def script(name: str) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, name], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def typed(upright: Upright, lines: list[str]) -> None:
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":
            script(*arguments)
        else:
            quiet = ("--wandb", "off") if arguments[0] == "fit" else ()
            answer = upright(*arguments, *quiet)
            assert answer.code == 0, f"{line}: {answer.err}"


def test_every_block_is_here() -> None:
    assert set(SCRIPTS) == {"stock.py", "own.py", "loop.py", "distil.py", "focal.py"} and len(COMMANDS) == 3


@pytest.mark.parametrize("commands", COMMANDS, ids=["stock", "distil", "focal"])
def test_the_line(upright: Upright, folder: Path, commands: list[str]) -> None:
    typed(upright, commands)
    assert len(list((folder / "export").glob("*/SHA256SUMS"))) == 1


@pytest.mark.parametrize("name", ["own.py", "loop.py"])
def test_a_script(folder: Path, name: str) -> None:
    script(name)


def test_readme_has_the_same_script() -> None:
    assert SCRIPTS["stock.py"] in (ROOT / "README.md").read_text()


def test_the_stock_script_is_short() -> None:
    assert len([line for line in SCRIPTS["stock.py"].splitlines()[1:] if line.strip()]) <= 15
