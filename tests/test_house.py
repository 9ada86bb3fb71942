"""Rules of the package: the direction of imports, light modules, and pinned dependencies."""

import ast
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT
from upright.cli import COMMANDS
from upright.options import LIGHTNING

PACKAGE = ROOT / "src/upright"
# A module may import modules of its own group and of earlier groups (CONTRIBUTING.md).
ORDER = (
    ("cores", "errors", "files", "intervals", "options", "recipes", "tables"),
    ("examples",),
    ("images", "image_paths"),
    ("runtime",),
    ("internals",),
    ("warp", "anatomy", "checkpoint"),
    ("architectures",),
    ("data",),
    ("training",),
    ("runs",),
    ("describe", "preview", "exporting"),
    ("evidence",),
    ("new", "cli"),
    ("demo", "testing", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = (
    *("torch", "lightning", "torchmetrics", "onnx", "openvino"),
    *("sklearn", "matplotlib", "wandb", "jsonargparse", "optuna"),
)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the parts of upright that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("upright.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert imported(path) == set()
        return
    above = {other for other in imported(path) if RANK[other] > RANK[part(path)]}
    assert not above, f"{path.relative_to(ROOT)} imports {above}, which come after it in ORDER"


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages that a new interpreter has loaded after ``code``."""
    program = f"import sys\n{code}\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(process.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module",
    [
        "images",
        "runtime.bundle",
        "runtime.predictor",
        "runtime.infer",
        "runtime.straighten",
        "runtime.verify",
        "runtime.benchmark",
        "runtime.serving.server",
        "runtime.web",
        "cli",
    ],
)
def test_the_runtime_loads_no_heavy_package(module: str) -> None:
    assert loaded_by(f"import upright.{module}") == set()


def test_the_test_above_can_fail() -> None:
    assert "torch" in loaded_by("import upright.warp")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([command, "--help"] for command in [*LIGHTNING, *COMMANDS]),
    ],
)
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    code = f"from upright.cli import main\ntry:\n  main({arguments!r})\nexcept SystemExit:\n  pass"
    assert loaded_by(code) == set()


def test_verify_and_infer_load_no_heavy_package(bundle: Path) -> None:
    for arguments in (["verify", str(bundle)], ["infer", str(bundle), str(bundle / "samples")]):
        assert loaded_by(f"from upright.cli import main\nassert main({arguments!r}) == 0") == set()


def test_the_error_names_a_missing_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; from upright.cli import main; sys.exit(main(['fit', '-c', 'x']))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "needs the package 'lightning': pip install 'upright[train]'" in process.stderr


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("sweep", "optuna", "sweep"),
        *(("serve", package, "serve") for package in ("msgspec", "prometheus_client", "starlette", "uvicorn")),
    ],
)
def test_the_error_names_the_extra_of_a_command(command: str, package: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None; from upright.cli import main; sys.exit(main(['{command}', 'x']))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        process.returncode == 2 and f"needs the package '{package}': pip install 'upright[{extra}]'" in process.stderr
    )


def test_constraints_pin_every_direct_dependency() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements} - {"upright"}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert set(pins) == names and pins["torch"] == "2.13.0"


@pytest.mark.slow
def test_the_base_install_verifies_and_infers_without_torch(bundle: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT], check=True)
    packages = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.lower()
    assert "onnxruntime" in packages and not any(name in packages for name in ("torch", "lightning", "scikit"))
    upright = tmp_path / "venv/bin/upright"
    subprocess.run([upright, "verify", bundle], check=True)
    subprocess.run([upright, "infer", bundle, bundle / "samples"], check=True)
    subprocess.run([upright, "benchmark", bundle, "--batches", "1", "--to", tmp_path / "report"], check=True)


def test_the_tree_of_contributing_has_every_file() -> None:
    """One line per file; the studies, one claim per file, share a line."""
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("src/upright/\n")[2]
    listed = re.findall(r"^ +(\w+\.py) ", tree, flags=re.M)
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "studies" and path.name[:2] != "__"]
    assert sorted(listed) == sorted(path.name for path in files)
