"""README and docs are typed in as they stand: their files are written, their commands are run, section by section."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CONFIGS, ROOT, Upright
from upright.cli import COMMANDS
from upright.options import LIGHTNING

README = (ROOT / "README.md").read_text()
PAGES = ("data", "training", "deployment", "evidence")
DOCS = README + "".join((ROOT / f"docs/{name}.md").read_text() for name in PAGES)
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", DOCS, flags=re.M | re.S))
SECTIONS_TO_TYPE = (
    "The line",
    "Networks",
    "The spatial transformer",
    "Training",
    "Options",
    "It goes on",
    "Forms and precisions",
    "A report",
    "A choice",
    "Data",
    "Your own architecture",
    "Your own images",
    "Your own dataset",
    "Look first",
    "Images in a table",
    "Splits",
    "Cache",
    "Augmentation",
)
LONG = ("The spatial transformer",)
"""It exports a residual network with a transformer."""
QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--wandb", "off"]


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.M | re.S)


def commands(section: str) -> list[list[str]]:
    lines = (line for block in blocks(section, "sh") for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.usefixtures("fewer_digits", "traced_once")
@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SECTIONS_TO_TYPE]
)
def test_as_documented(section: str, upright: Upright, checkout: Path) -> None:
    for name in ("cat", "dog"):
        (checkout / "my-images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((20 + number, 30, 3), 10 * number + 5 * (name == "dog"), np.uint8)
            Image.fromarray(pixels).save(checkout / "my-images" / name / f"{number}.jpg")
    for block in blocks(section, "python") + blocks(section, "yaml"):
        name = block.partition("\n")[0].removeprefix("# ")
        (checkout / name).write_text(block)
    for block in blocks(section, "csv"):
        (checkout / "my-images.csv").write_text(block)
    found = commands(section)
    assert found
    for program, *arguments in found:
        assert program == "upright"
        answer = upright(*arguments, *(QUICK if arguments[0] == "fit" else []))
        assert answer.code == 0, (arguments, answer.err)


def test_python_as_documented(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("In Python", "python")
    exec(code.replace("export/stn_lenet", str(bundle)))
    assert capsys.readouterr().out.startswith("[('")


def test_every_command_exists() -> None:
    for command in re.findall(r"`upright (\w+)", DOCS):
        assert command in LIGHTNING or command in COMMANDS
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for target in re.findall(r"`?make (\w+)`?", " ".join(re.findall(r"`make \w+|^make \w+", README, flags=re.M))):
        assert target in targets
    for path in re.findall(r"configs/[a-z_/]+\.yaml", DOCS):
        assert (ROOT / path).is_file() or f"# {path}\n" in DOCS


def test_every_recipe_says_its_command_and_its_result() -> None:
    for path in CONFIGS:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert head[0] == f"# upright fit --config configs/{path.name}"
        assert re.search(r"test accuracy 0\.\d+ ± 0\.\d+ \(\d+ seeds\)", " ".join(head)), path.name
