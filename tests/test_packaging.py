"""Tests of the lock, the sdist, the release notes, and the files that GitHub reads."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
PACKAGES = {package["name"]: package for package in LOCK["package"]}


def required() -> set[tuple[str, ...]]:
    """Extra, name, extras and versions of every dependency in pyproject.toml."""
    extras = {"": PROJECT["project"]["dependencies"]} | PROJECT["project"]["optional-dependencies"]
    pairs = ((extra, Requirement(text)) for extra, texts in extras.items() for text in texts)
    return {(extra, canonicalize_name(each.name), *sorted(each.extras), str(each.specifier)) for extra, each in pairs}


def locked() -> set[tuple[str, ...]]:
    """The same of uv.lock, which writes the extra as a marker."""
    rows = set()
    for each in PACKAGES["upright"]["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(.+?)'", each.get("marker", ""))
        requirement = Requirement(f"{each['name']}{each.get('specifier', '')}")
        rows.add((extra[1] if extra else "", each["name"], *sorted(each.get("extras", [])), str(requirement.specifier)))
    return rows


def test_the_lock_agrees_with_pyproject() -> None:
    assert locked() == required(), "run `make lock`"
    assert PACKAGES["upright"]["version"] == PROJECT["project"]["version"], "run `make lock`"
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"], "run `make lock`"


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: PACKAGES[name]["version"] for name in pins} == pins, "run `make lock`"


def test_the_lock_installs_from_pypi() -> None:
    sources = [package["source"] for package in PACKAGES.values() if package["name"] != "upright"]
    assert sources == [{"registry": "https://pypi.org/simple"}] * (len(PACKAGES) - 1)
    urls = re.findall(r'url = "([^"]+)"', (ROOT / "uv.lock").read_text())
    assert len(urls) > len(sources) and all(url.startswith("https://files.pythonhosted.org/packages/") for url in urls)


def closure(names: set[str]) -> set[str]:
    """The packages that a set of packages needs, with themselves, by uv.lock."""
    needed = {each["name"] for name in names for each in PACKAGES[name].get("dependencies", [])}
    return names if needed <= names else closure(names | needed)


def test_the_container_installs_the_lock_by_hashes() -> None:
    text = (ROOT / "container.txt").read_text()
    blocks = re.findall(r"^([\w-]+)==(\S+).*((?:\n    --hash=\S+(?: \\)?)+)$", text, flags=re.M)
    assert len(blocks) == text.count("==") - text.count(" == ") and "://" not in text, "run `make lock`"
    for name, version, hashes in blocks:
        files = [*PACKAGES[name]["wheels"], *filter(None, [PACKAGES[name].get("sdist")])]
        assert version == PACKAGES[name]["version"], "run `make lock`"
        assert set(re.findall(r"--hash=(\S+)", hashes)) == {file["hash"] for file in files}, "run `make lock`"
    upright = PACKAGES["upright"]
    direct = {each["name"] for each in upright["dependencies"] + upright["optional-dependencies"]["serve"]}
    assert {name for name, *_ in blocks} == closure(direct | {"setuptools"}), "run `make lock`"
    commands = (ROOT / "Containerfile").read_text()
    assert "--require-hashes -r /source/container.txt" in commands and "--no-deps --no-build-isolation" in commands


@pytest.fixture
def tracked() -> list[str]:
    """The files of the repository that git does not ignore."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("the checkout is not a git repository")
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture
def sdist(tracked: list[str], tmp_path: Path) -> Path:
    """An sdist, built in a copy of the repository."""
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "src/upright/__pycache__").mkdir()
    (tmp_path / "src/upright/__pycache__/cli.pyc").touch()
    program = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    return tmp_path / f"dist/upright-{PROJECT['project']['version']}.tar.gz"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_sdist_passes_its_tests(sdist: Path, tmp_path: Path) -> None:
    """A part of them, which reads files of every kind."""
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    folder = tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz")
    names = (
        "test_cli",
        "test_examples",
        "test_packaging",
        "test_reference",
        "exporting/test_bom",
        "runtime/test_bundle",
    )
    command = [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}.py" for name in names)]
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-3000:]


def test_the_sdist_has_every_file_and_the_wheel_stands_alone(tracked: list[str], sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as tar:
        packed = {member.name.partition("/")[2] for member in tar if member.isfile()}
    assert set(tracked) - packed == set(), "MANIFEST.in leaves these out"
    # Docker and Podman copy only what .dockerignore allows. A wheel of these files has all that a user needs.
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    context = [name for name in tracked if any(name == each or name.startswith(f"{each}/") for each in allowed)]
    for name in context:
        (tmp_path / "context" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "context" / name)
    assert "container.txt" in context and not (ROOT / ".containerignore").exists()
    program = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "context", capture_output=True, check=True)
    (wheel,) = (tmp_path / "context/dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    commands = "main(['configs', 'list']); main(['configs', 'copy']); sys.exit(main(['verify', 'export/digits']))"
    command = [sys.executable, "-c", f"import sys; from upright.cli import main; {commands}"]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert names <= {line.split("  ")[0] for line in result.stdout.splitlines()}
    assert "site/upright/examples_data/export/digits\n" in result.stdout and "Verified 'export/digits'" in result.stdout
    assert {path.name for path in folder.glob("configs/*.yaml")} == {path.name for path in ROOT.glob("configs/*.yaml")}
    generated = re.compile(r"PKG-INFO|setup\.cfg|src/upright\.egg-info/")
    assert [name for name in packed - set(tracked) if not generated.match(name)] == []


CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-03-01

Two lines,
### and a heading

## [1.1.0] - 2026-02-01

Older.
"""


@pytest.mark.parametrize(
    ("version", "tag", "changelog", "answer"),
    [
        ("1.2.0", "v1.2.0", CHANGELOG, "Two lines,\n### and a heading\n"),
        ("1.1.0", "v1.1.0", CHANGELOG, "Older.\n"),
        (
            "1.2.0",
            "v1.2.1",
            CHANGELOG,
            "The tag is 'v1.2.1', and pyproject.toml has version 1.2.0: the tag must be",
        ),
        ("1.3.0", "v1.3.0", CHANGELOG, "CHANGELOG.md needs a section '## [1.3.0] - YYYY-MM-DD' with text."),
        ("1.2.0", "v1.2.0", CHANGELOG.replace(" - 2026-03-01", ""), "needs a section '## [1.2.0] - YYYY-MM-DD'"),
        ("1.2.0", "v1.2.0", "## [1.2.0] - 2026-03-01\n\n## [1.1.0] - 2026-02-01\n\nOlder.\n", "with text"),
        ("1.2.0", "v1.2.0", CHANGELOG.replace("1.2.0", "1x2.0"), "needs a section"),
    ],
)
def test_the_notes_of_a_release(version: str, tag: str, changelog: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release_notes.py", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    process = subprocess.run(
        [sys.executable, tmp_path / ".ci/release_notes.py", tag], capture_output=True, text=True, check=False
    )
    if process.returncode == 0:
        assert process.stdout == answer
    else:
        assert answer in process.stderr and process.stderr.count("\n") == 1 and process.stdout == ""


def test_the_release_checks_before_it_publishes() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    jobs = workflow["jobs"]
    assert jobs["pypi"]["needs"] == "build" and jobs["github"]["needs"] == "pypi"
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["pypi"]
    commands = " ".join(step.get("run", "") for step in jobs["build"]["steps"])
    for command in (".ci/release_notes.py", "python -m build", "twine check --strict", "upright verify"):
        assert command in commands
    actions = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_for_issues(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    needed = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert needed >= ({"version", "command", "output"} if name == "bug" else {"goal"})
