"""A figure has one source: README and configs repeat what benchmarks and studies wrote; the translation agrees."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import CONFIGS, ROOT

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
RECIPES = (ROOT / "docs/reference/recipes.md").read_text(encoding="utf-8")
STUDIES = (ROOT / "docs/explanation/studies.md").read_text(encoding="utf-8")
SPREAD = re.compile(r"\d+\.\d+ ± \d+\.\d+")
ROWS = {name: SPREAD.findall(line) for line, name in re.findall(r"^(\| `(\w+)` \|.*)$", RECIPES, flags=re.M)}


def blocks(page: str) -> list[list[list[str]]]:
    """The code of a page without its comments: words of lines of blocks; drawings have no language and are left out."""
    code = re.findall(r"^```(?:sh|python|yaml|text)\n(.*?)^```", page, flags=re.M | re.S)
    return [[shlex.split(line.replace("'", ""), comments=True) for line in block.splitlines()] for block in code]


def numbers(page: str) -> Counter[str]:
    return Counter(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_repeats_its_row_of_the_recipes(path: Path) -> None:
    head = " ".join(re.findall(r"^# (.*)$", path.read_text(encoding="utf-8"), flags=re.M))
    assert head.startswith(f"upright fit --config configs/{path.name} ")
    assert head.endswith(f"python benchmarks/recipes.py {path.stem}")
    assert SPREAD.findall(head) == ROWS[path.stem] != []


@pytest.mark.parametrize("line", [line for line in README.splitlines() if "±" in line and line[:1] == "|"])
def test_a_row_of_the_readme_stands_in_the_recipes_or_in_one_study(line: str) -> None:
    config = re.search(r"`(\w+)`", line)
    figures = SPREAD.findall(line)
    if config:
        assert figures == ROWS[config[1]][: len(figures)]
    else:
        assert any(not Counter(figures) - Counter(SPREAD.findall(study)) for study in STUDIES.split("\n## "))


def test_every_figure_of_the_readme_stands_in_a_table() -> None:
    assert {*SPREAD.findall(README)} == {*SPREAD.findall("\n".join(re.findall(r"^\|.*$", README, flags=re.M)))}


def test_the_readme_is_short_and_the_translation_agrees() -> None:
    assert len(README.splitlines()) <= 150
    assert blocks(README) == blocks(CHINESE) != []
    assert numbers(README) == numbers(CHINESE)
    links = [set(re.findall(r"\]\(([^)]+)\)", page)) for page in (README, CHINESE)]
    assert links[0] - {"README.zh-CN.md"} == links[1] - {"README.md"}


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^):#]+)(?:#\w+)?\)", README):
        assert (ROOT / link).exists(), link
