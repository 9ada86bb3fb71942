"""A project of your own: what `upright new` writes passes its own checks, and copier writes and updates the same."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from email.message import Message
from glob import glob
from pathlib import Path

import copier
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.new import NAME, TEMPLATE, render

PAGE = (ROOT / "docs/tutorials/your-project.md").read_text()


@pytest.fixture
def project(upright: Upright, tmp_path: Path) -> Path:
    answer = upright("new", "my-project")
    assert answer.code == 0, answer.err
    assert answer.out.endswith("Next:\n  cd my-project\n  make demo\n")
    return tmp_path / "my-project"


def run(*command: object, cwd: Path, **environment: str) -> str:
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_a_project_passes_ruff_and_its_config_goes_down_the_line(project: Path) -> None:
    for arguments in (["check"], ["format", "--check"]):
        run(sys.executable, "-m", "ruff", *arguments, "--no-cache", ".", cwd=project)
    # In a process of its own: jsonargparse lists all subclasses of a datamodule, and imports their modules.
    out = run(sys.executable, "-m", "pytest", "-v", "-k", "not network", cwd=project, PYTHONPATH=str(ROOT / "src"))
    assert "test_contracts.py::test_fit_test_export_and_verify_run[digits] PASSED" in out
    assert "test_data.py::test_every_class_is_in_every_split PASSED" in out and "1 deselected" in out


def test_a_broken_contract_is_named() -> None:
    from upright.testing import check_gradients, check_logits, check_memory, check_rows, check_state, example_spec

    class Broken(torch.nn.Module):
        """One logit too many, of the whole batch, without a gradient for the bias, and always the same class."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = torch.nn.Linear(4, 8), torch.nn.Linear(1, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images.flatten(1)) * 0 + images.mean()

    spec = example_spec((1, 2, 2))
    for check, text in (
        (check_logits, r"logits have shape \(5, 8\), expected \(5, 7\)"),
        (check_rows, "Tensor-likes are not close"),
        (check_gradients, "the gradient of parameter layer.weight is zero"),
        (check_memory, "after 400 steps on one batch of 5 images, . are classified wrongly"),
        (check_state, "the logits do not depend on the parameters"),
    ):
        with pytest.raises(AssertionError, match=text):
            check(Broken(), spec)


def test_a_broken_line_names_its_command(upright: Upright, tmp_path: Path) -> None:
    from upright.testing import check_line

    (tmp_path / "empty.yaml").touch()
    with pytest.raises(AssertionError, match=r"`upright fit --config \S+empty.yaml .* exits with 2; its error is on"):
        check_line(tmp_path / "empty.yaml", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("My Project", "Project name 'My Project' must be lower-case letters and digits, with single dashes or "),
        ("My Project", "Try 'my-project'."),
        ("2d-shapes", "and start with a letter.\n"),
        ("a--b", "Try 'a-b'."),
        ("é", "must be lower-case letters and digits"),
        ("..", "Project name '..' must be"),
        ("lambda", "'lambda' is a keyword of Python"),
        ("tests", "'tests' is the name of another folder of the project"),
        ("upright", "Python already imports 'upright' from '"),
        ("statistics", "Python already imports 'statistics'"),
        ("scikit/torch", "Project name 'torch': Python already imports 'torch' from '"),
    ],
)
def test_a_name_that_cannot_be_used(name: str, text: str, upright: Upright, tmp_path: Path) -> None:
    answer = upright("new", name)
    assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        answer = upright("new", name)
        assert answer.code == 2 and f"'{name}' exists and is not an empty folder" in answer.err
    answer = upright("new", "file/inside")
    assert answer.code == 2 and "Not a directory" in answer.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_the_working_directory_can_be_an_empty_clone(
    upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_clone/.git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my_clone")
    answer = upright("new", ".")
    assert answer.code == 0 and answer.out.endswith("Next:\n  make demo\n")
    assert (tmp_path / "my_clone/my_clone/network.py").is_file()


def test_the_template_is_complete(project: Path) -> None:
    written = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert {".copier-answers.yml", ".gitignore", ".github/workflows/ci.yml", "my_project/network.py"} <= written
    # The wheel has the files that these patterns match; there, * matches no dot at the beginning of a name.
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["upright"]
    packaged = {path for pattern in patterns for path in glob(pattern, root_dir=TEMPLATE.parent, recursive=True)}
    sources = {path.relative_to(TEMPLATE.parent).as_posix() for path in TEMPLATE.rglob("*") if path.is_file()}
    assert sources <= packaged and len(sources) == len(written)
    assert NAME in yaml.safe_load((ROOT / "copier.yml").read_text())["project"]["validator"]
    # `upright.testing` and the template are of one version.
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"].rpartition(".")[0]
    assert f'"upright[train]>={version}"' in (project / "pyproject.toml").read_text()
    assert f"'upright[serve]>={version}'" in (project / "Containerfile").read_text()


def git(folder: Path, *arguments: str) -> None:
    person = {f"GIT_{role}_{key}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    run("git", "-c", "commit.gpgsign=false", *arguments, cwd=folder, **person)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the template in two versions: the second one changes the Makefile."""
    folder = tmp_path / "repository"
    shutil.copytree(TEMPLATE, folder / "src/upright/template")
    shutil.copy(ROOT / "copier.yml", folder)
    git(folder, "init", "--quiet")
    for version, change in (("v0.1.0", ""), ("v0.2.0", "\n# changed upstream\n")):
        with open(folder / "src/upright/template/Makefile.jinja", "a") as file:
            file.write(change)
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--allow-empty", "--message", version)
        git(folder, "tag", version)
    return folder


def test_copier_writes_and_updates_the_same_project(
    repository: Path, upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = Message()
    about["Version"], about["Project-URL"] = "0.1.0", f"Repository, {repository}"
    monkeypatch.setattr("upright.new.metadata", lambda _: about)
    ours, theirs = tmp_path / "my-project", tmp_path / "copied"
    assert upright("new", "my-project").code == 0
    copier.run_copy(str(repository), theirs, {"project": "my-project"}, vcs_ref="v0.1.0", quiet=True)
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    assert files == {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert all((ours / path).read_bytes() == (theirs / path).read_bytes() for path in files)

    with open(ours / "my_project/network.py", "a") as file:
        file.write("# changed here\n")
    git(ours, "init", "--quiet")
    git(ours, "add", "--all")
    git(ours, "commit", "--quiet", "--message", "one")
    copier.run_update(ours, defaults=True, overwrite=True, quiet=True)
    assert yaml.safe_load((ours / ".copier-answers.yml").read_text())["_commit"] == "v0.2.0"
    assert (ours / "Makefile").read_text().endswith("# changed upstream\n")
    assert (ours / "my_project/network.py").read_text().endswith("# changed here\n")


def test_without_an_address_the_answers_ask_for_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (project / ".copier-answers.yml").read_text()
    assert set(yaml.safe_load(text)) >= {"_commit", "project"}
    assert ("_src_path" in yaml.safe_load(text)) != ("Add the git repository of Upright first" in text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_on_the_wheel_alone(tmp_path: Path) -> None:
    from upright.testing import QUICK

    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "src", sources / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    # Other packages are those of this environment, so that pip downloads setuptools alone.
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sources, cwd=tmp_path)
    (wheel,) = tmp_path.glob("upright-*.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    shutil.rmtree(sources)

    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    out = run("bash", "-euxc", script(PAGE), cwd=empty, **environment)
    assert "Verified 'export/digits'" in out and "3 passed" in out and "checkpoints/wide/best.ckpt" in out
    where = run(python, "-c", "import upright; print(upright.__file__)", cwd=empty, **environment)
    assert where.startswith(str(packages))
    project = empty / "my-project"
    assert all((project / path).is_file() for path in render("my-project", "my_project"))

    # The project's own README, with two classes of images.
    for number in range(20):
        image = project / "my-images" / ("cat", "dog")[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30 + number), (10 * number, 0, 0)).save(image)
    readme = (project / "README.md").read_text()
    lines = re.findall(r"^upright .*", readme, flags=re.M)
    assert len(lines) == 3
    for line in lines:
        quick = " " + " ".join(QUICK) if line.startswith("upright fit") else ""
        run("bash", "-euxc", line + quick, cwd=project, **environment)
    assert (project / "checkpoints/my-images/best.ckpt").is_file()


def script(page: str) -> str:
    """Return the shell lines of a page, with its files written in between."""
    parts = []
    for language, block in re.findall(r"^```(sh|python|yaml)\n(.*?)^```", page, flags=re.M | re.S):
        name, _, content = block.removeprefix("# ").partition("\n")
        parts.append(block if language == "sh" else f"cat > {name} <<'END'\n{content}END\n")
    return "".join(parts)
