"""Every page of the documentation is executed from top to bottom in an empty folder, as a reader would.

A file is written for a block whose first line is its name, and for one with a title. Other Python blocks run in one
namespace per page. Each line of a shell block runs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.cli import COMMANDS
from upright.options import LIGHTNING, parse

DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("README*.md")), *sorted(DOCS.rglob("*.md"))]
}
SLOW = {
    "README.md",
    "README.zh-CN.md",
    "docs/how-to/compare.md",
    "docs/how-to/export.md",
    "docs/how-to/fine-tune.md",
    "docs/how-to/multi-label.md",
    "docs/how-to/orientation.md",
    "docs/how-to/sweep.md",
    "docs/how-to/track.md",
    "docs/tutorials/spatial-transformer.md",
    "docs/tutorials/your-training-step.md",
}
ELSEWHERE = {
    "docs/how-to/attach.md": "tests/exporting/test_attach.py",
    "docs/how-to/many-images.md": "tests/ecosystem/test_ray.py",
    "docs/how-to/other-languages.md": "tests/runtime/test_clients.py",
    "docs/how-to/timm.md": "tests/ecosystem/test_timm.py",
    "docs/tutorials/your-project.md": "tests/test_new.py",
}
"""Pages that another test executes."""

LANGUAGES = {"python", "sh", "yaml", "csv", "json", "text", "js", "cpp", "java", "xml", ""}
"""``text`` is output, and a block without a language is a drawing: neither runs."""

QUICK = {
    "fit": {"--trainer.max_epochs": "1", "--trainer.limit_train_batches": "2", "--wandb": "off"},
    "sweep": {"--trials": "2", "--": "--trainer.limit_train_batches=2"},
    "report": {"--images": "20"},
    "study": {"--seeds": "2"},
}
"""Options of a command that its line does not set itself."""
NOT_RUN = {
    "model_signing": "needs the extra sign, see tests/runtime/test_signature.py",
    "opentelemetry-instrument": "a server, see tests/runtime/test_traces.py",
    "openssl": "keys of a signature, see tests/runtime/test_signature.py",
    "upright verify https://example.org/digits.upright.zip": "a download, see tests/runtime/test_address.py",
    "upright export checkpoints/stn --name signed": "needs the extra sign, see tests/runtime/test_signature.py",
    "upright verify export/signed": "needs the extra sign, see tests/runtime/test_signature.py",
    "upright verify export/signed.upright.zip": "needs the extra sign, see tests/runtime/test_signature.py",
    "curl": "asks a server that does not run",
    "for": "a loop of the shell over files that W&B sends to its server",
    "done": "the end of that loop",
    "pip": "the packages are installed",
    "python -m http.server": "a server",
    "tensorboard": "a server",
    "uvx mlflow server": "a server",
    "upright serve": "a server, see tests/runtime",
    "upright fit --config configs/lenet.yaml --config schedule_free.yaml": "needs schedulefree, see "
    "tests/training/test_schedule_free.py",
    "upright preview my-transforms.yaml": "needs albumentations, see tests/ecosystem/test_image_transforms.py",
    "upright straighten": "needs a bundle of the orientation, see tests/runtime/test_straighten.py",
    "upright web": "downloads onnxruntime-web, see tests/runtime/test_web.py",
    "wandb": "needs an account",
}
LAUNCHERS = ("torchrun", "srun")
PARSED = {"--trainer.devices", "configs/presets/gpu.yaml"}
"""Runs with several processes (see tests/runs/test_processes.py) or on a GPU: only their options are parsed."""


class Block(NamedTuple):
    language: str
    name: str | None
    """The file that it is."""
    content: str


def blocks(page: str) -> Iterator[Block]:
    for info, content in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page, flags=re.M):
        language, _, title = info.partition(" ")
        name = re.match(r"# (\S+\.\w+)$", content.partition("\n")[0]) or re.match(r'title="(\S+)"$', title)
        yield Block(language, name[1] if name else None, content)


def lines(block: Block) -> list[str]:
    """The commands of a shell block; a backslash at the end of a line joins it with the next."""
    text = block.content.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


class Reader:
    """Does what a page asks for, in the working directory."""

    def __init__(self, upright: Upright) -> None:
        self.upright = upright
        self.namespace: dict[str, Any] = {"__name__": "page"}

    def read(self, page: str) -> None:
        for block in blocks(page):
            if block.name:
                Path(block.name).parent.mkdir(parents=True, exist_ok=True)
                Path(block.name).write_text(block.content, encoding="utf-8")
            elif block.language == "python":
                exec(block.content, self.namespace)
            elif block.language == "sh":
                for line in lines(block):
                    self.type(line)
            elif block.language == "json":
                json.loads(block.content)
            else:
                assert block.language in ("text", ""), f"No name for {block}"

    def type(self, line: str) -> None:
        program, *arguments = shlex.split(line, comments=True)
        if program == "upright":
            self.run(line, arguments)
        elif program in LAUNCHERS:
            self.run(line, arguments[arguments.index("upright") + 1 :])
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.M), line
        elif program == "python" and arguments[0].endswith(".py"):
            environment = os.environ | {"PYTHONWARNINGS": "ignore"}
            result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{line}: {result.stderr[-3000:]}"
        else:
            assert reason(line), line

    def run(self, line: str, arguments: list[str]) -> None:
        name, *options = arguments
        if reason(line):
            if name not in LIGHTNING:  # Lightning's parser imports the classes of the config
                parse(name, COMMANDS[name].options, options)
            return
        if PARSED & set(options):
            with pytest.raises(SystemExit, match=r"^0$"):
                self.upright(name, *options, "--print_config")
            return
        for option, value in QUICK.get(name, {}).items():
            options += [] if option in options else [option, value]
        answer = self.upright(name, *options)
        assert answer.code == 0, f"{line}: {answer.err}"


def reason(line: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if f"{line} ".startswith(f"{start} ")), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout without its code, with images of one's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "export/digits", tmp_path / "export/digits")
    for name in ("cat", "dog"):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((20 + number, 30, 3), 10 * number + 5 * (name == "dog"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my-images" / name / f"{number}.jpg")
    return tmp_path


@pytest.mark.usefixtures("folder", "traced_once")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PAGES if name not in ELSEWHERE],
)
def test_a_page_runs_from_top_to_bottom(page: str, upright: Upright, request: pytest.FixtureRequest) -> None:
    if "\npython " not in PAGES[page]:  # a script has all digits, in a process of its own
        request.getfixturevalue("fewer_digits")
    Reader(upright).read(PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page: str) -> None:
    kinds = [block.language for block in blocks(PAGES[page])]
    assert set(kinds) <= LANGUAGES
    assert len(re.findall(r"^\s*(?:```|~~~)", PAGES[page], flags=re.M)) == 2 * len(kinds)
    if page not in ELSEWHERE:
        output = "".join(block.content for block in blocks(PAGES[page]) if block.language in ("text", ""))
        assert not re.search(r"^(?:upright|make|pip) ", output, flags=re.M)


def test_pages_that_are_slow_or_executed_elsewhere_exist() -> None:
    assert PAGES.keys() >= SLOW
    for page, test in ELSEWHERE.items():
        assert page not in PAGES or page in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for link in re.findall(r"\]\(([^):#\s]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"(?<![\w/])configs/[\w/]+\.yaml", text):
        assert (ROOT / path).is_file() or f"# {path}\n" in PAGES[page] or page in ELSEWHERE, path
    for command in re.findall(r"`upright ([a-z]\w+)", text):
        assert command in LIGHTNING or command in COMMANDS, command


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text())
        assert not loaded, f"{page} loads {loaded}"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "tutorials/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
