"""The pages of docs/how-to, executed: their YAMLs are written, and their commands are typed, in order."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright

QUICK = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--wandb", "off")


@pytest.mark.usefixtures("fewer_digits")
@pytest.mark.parametrize("name", ["presets", "track-others"])
def test_as_documented(name: str, upright: Upright, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    page = (ROOT / f"docs/how-to/{name}.md").read_text()
    for block in re.findall(r"^```yaml\n(.*?)^```", page, flags=re.M | re.S):
        (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", page, flags=re.M | re.S) for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "upright"
        answer = upright(*arguments, *QUICK)
        assert answer.code == 0, (line, answer.err)
