"""Fixtures of many tests: a command line, a small trained run and its bundle; and the choice of slow tests."""

import hashlib
import io
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pytest
from filelock import FileLock

from tests.data.formats import write_all

# Several processes with a thread per core would be many times slower. Set this before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob("configs/*.yaml") if path.stem not in ("orientation", "multilabel"))

SLOW_PARTS = 16
"""`.ci/run` runs one part of the slow tests."""

T = TypeVar("T")


def slow_part(tests: Sequence[T], commit: str) -> Sequence[T]:
    """Return the part of the slow tests that the hash of a commit chooses.

    A part has every `SLOW_PARTS`-th test, so that long tests of one file are in different parts.
    """
    return tests[int(commit, 16) % SLOW_PARTS :: SLOW_PARTS]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-part", metavar="COMMIT", help="run only the part of the slow tests that this hash chooses")


def pytest_report_header(config: pytest.Config) -> str | None:
    commit = config.getoption("--slow-part")
    return commit and f"slow tests: part {int(commit, 16) % SLOW_PARTS} of 0 to {SLOW_PARTS - 1}, by commit {commit}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move slow tests to the front, so that no worker starts a long test last. Deselect tests of other parts."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    commit = config.getoption("--slow-part")
    part = slow_part(slow, commit) if commit else slow
    config.hook.pytest_deselected(items=[item for item in slow if item not in part])
    items[:] = [*part, *quick]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Upright = Callable[..., Answer]
WriteGraph = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 500 digits of scikit-learn in the format of every published dataset, and set UPRIGHT_DATA.

    This fixture imports no heavy package.
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    table = np.loadtxt(
        Path(package.origin).parent / "datasets/data/digits.csv.gz", np.uint8, delimiter=",", max_rows=500
    )
    pixels = (table[:, :64] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    # As in MNIST, a digit covers 20 of 28 pixels.
    digits = pixels.repeat(5, axis=1).repeat(5, axis=2)[:, ::2, ::2]
    images = np.pad(digits, ((0, 0), (4, 4), (4, 4)))
    root = tmp_path_factory.mktemp("data")
    write_all(root, images, table[:, 64])
    os.environ["UPRIGHT_DATA"] = str(root)
    return root


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set UPRIGHT_CACHE, where decoded images are stored, to an empty folder."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["UPRIGHT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def graph_store(session_folder: Path) -> WriteGraph:
    """Return a `write_graph` that traces a model once for each form. For equal weights, it copies the file."""
    import torch

    from upright.exporting.graph import write_graph

    class ByContent(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            if isinstance(value, torch.Tensor):
                return value.dtype, value.shape, value.detach().numpy().tobytes()
            return None

    folder = session_folder / "graphs"
    folder.mkdir(exist_ok=True)

    def write_once(model: object, path: Path, form: object) -> None:
        content = io.BytesIO()
        try:
            ByContent(content).dump((model, form))
        except (pickle.PicklingError, AttributeError):  # the class is local to a test
            return write_graph(model, path, form)
        stored = folder / hashlib.sha256(content.getvalue()).hexdigest()
        if not stored.exists():
            write_graph(model, path, form)
            part = stored.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, part)
            part.rename(stored)
        shutil.copyfile(stored, path)

    return write_once


@pytest.fixture
def traced_once(graph_store: WriteGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `upright export` reuse graphs of equal models: `pytestmark = pytest.mark.usefixtures("traced_once")`."""
    monkeypatch.setattr("upright.exporting.export.write_graph", graph_store)


@pytest.fixture
def fewer_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce `Digits` from 1,797 to 600 images, for tests that do not check numbers."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    digits.images, digits.target = digits.images[:600], digits.target[:600]
    monkeypatch.setattr("upright.data.digits.load_digits", lambda: digits)


@pytest.fixture
def upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Upright]:
    """Return a function that runs a command in an empty folder: `upright("fit", "--config", path)`."""
    from upright.cli import main

    monkeypatch.chdir(tmp_path)
    # Restore the path after the test, because commands append to it.
    monkeypatch.setattr(sys, "path", list(sys.path))
    # `export` measures speed; tests need no exact one.
    monkeypatch.setattr("upright.runtime.speed.TURN_SECONDS", 0.0)

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    yield run
    # Unload modules of this test, because other tests write modules with the same names.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def trained(session_folder: Path, graph_store: WriteGraph) -> Path:
    """A folder with the run `checkpoints/small` and the bundle `export/small`. Tests do not write into it."""
    from upright.cli import main

    folder = session_folder / "trained"
    config = ROOT / "configs/stn_lenet.yaml"
    fit = ["fit", "--config", str(config), "--name", "small", "--trainer.max_epochs", "2", "--wandb", "off"]
    fit += ["--data.angles", "[-120, 0, 120]"]  # fewer than in the config, because every export checks all of them
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not (folder / "export/small").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            patch.chdir(folder)
            patch.setattr("upright.exporting.export.write_graph", graph_store)
            assert main(fit) == 0
            assert main(["export", "checkpoints/small"]) == 0
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, which the test may change. It was not evaluated on the test split."""
    log = shutil.ignore_patterns("test_openings.jsonl")
    shutil.copytree(trained / "checkpoints/small", tmp_path / "checkpoints/small", ignore=log)
    return tmp_path / "checkpoints/small"


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, which the test may change."""
    shutil.copytree(trained / "export/small", tmp_path / "export/small")
    return tmp_path / "export/small"


@pytest.fixture
def no_process_group_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the settings of Lightning's strategies in this process: the process group and its environment variables."""
    import torch

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK"):
        # monkeypatch records the current value, and so restores it after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
