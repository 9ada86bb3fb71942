"""Every benchmark runs with its smallest size, and every benchmark that the docs name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Arguments in addition to --quick. The default suite runs FAST, which takes a few seconds.
FAST = {"augmentation": [], "serving": []}
SLOW = {
    "engines": [],  # installs two engines
    "loading": [],
    "recipes": [],
    "runtime": [],
    "startup": [],
    "studies": ["xor"],
    "threads": [],
    "training": [],
    "transformer": [],
}
ELSEWHERE = {
    "backbones": "tests/ecosystem/test_timm.py",
    "many_images": "tests/ecosystem/test_ray.py",
    "straighten": "tests/runtime/test_straighten.py",
}


def test_every_benchmark_is_tested() -> None:
    scripts = {path.stem for path in ROOT.glob("benchmarks/*.py")} - {"__init__", "shared"}
    assert scripts == FAST.keys() | SLOW.keys() | ELSEWHERE.keys()
    assert all(f"benchmarks/{name}.py" in (ROOT / test).read_text() for name, test in ELSEWHERE.items())


def test_the_docs_name_benchmarks_that_exist() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.yaml")]
    names = {name for page in pages for name in re.findall(r"benchmarks/(\w+)\.py", page.read_text(encoding="utf-8"))}
    assert names and names <= FAST.keys() | SLOW.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(600)]) for name in SLOW)]
)
def test_the_smallest_size_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / f"benchmarks/{name}.py", "--quick", *(FAST | SLOW)[name]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| .*\d", result.stdout, re.MULTILINE), result.stdout
