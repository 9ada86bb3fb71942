"""Rotation through the slow tests: `.ci/run` adds one part of them to the default tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SLOW_PARTS, slow_part


@pytest.mark.parametrize("count", [0, 1, SLOW_PARTS, 163])
def test_every_slow_test_is_in_exactly_one_part(count: int) -> None:
    parts = [slow_part(range(count), f"{number:x}") for number in range(SLOW_PARTS)]
    assert sorted(test for part in parts for test in part) == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_commit_chooses_one_part() -> None:
    commit = "597297dbeefbeefbeefbeefbeefbeefbeefbee00"
    assert slow_part(range(100), commit) == slow_part(range(100), f"{int(commit, 16) % SLOW_PARTS:x}")


def collected(folder: Path, *options: str) -> tuple[list[str], str]:
    """Return the names of the tests that pytest collects from ``folder``, and its output."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", "--collect-only", *options, folder]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"<Function (\w+(?:\[\w+\])?)>", output), output


def test_the_option_adds_one_part_in_front_of_the_default_tests(tmp_path: Path) -> None:
    (tmp_path / "test_many.py").write_text(
        "import pytest\n\n\ndef test_quick(): pass\n\n\n"
        f"@pytest.mark.slow\n@pytest.mark.parametrize('n', range({2 * SLOW_PARTS}))\ndef test_slow(n): pass\n"
    )
    assert collected(tmp_path)[0] == ["test_quick"]
    names, output = collected(tmp_path, "-m", "", "--slow-part", "c0ffee3")
    assert names == ["test_slow[3]", f"test_slow[{SLOW_PARTS + 3}]", "test_quick"]
    assert f"slow tests: part 3 of 0 to {SLOW_PARTS - 1}, by commit c0ffee3" in output
    assert f"{2 * SLOW_PARTS - 2} deselected" in output


def test_ci_passes_the_commit_to_make_and_returns_its_exit_code(tmp_path: Path) -> None:
    # Run it in a shallow clone, with a `make` that prints its arguments and fails.
    subprocess.run(["git", "init", "-q", tmp_path / "origin"], check=True)
    git = ["git", "-C", tmp_path / "origin", "-c", "user.name=a", "-c", "user.email=a@b"]
    for message in ("one", "two"):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{tmp_path}/origin", tmp_path / "clone"], check=True)
    run = tmp_path / "clone/.ci/run"
    run.parent.mkdir()
    run.write_bytes((ROOT / ".ci/run").read_bytes())
    run.chmod(0o755)
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}"}
    process = subprocess.run([run], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert process.returncode == 3 and process.stdout == f"test\nPYTEST_OPTIONS=-m '' --slow-part {commit}\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.stem)
def test_workflows_are_yaml_and_their_shell_parses(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    scripts = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
