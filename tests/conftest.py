"""What many tests need: the checkout, a command line, one small trained run and its bundle."""

import io
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

# As many threads as cores in every one of several processes is many times slower; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Upright = Callable[..., Answer]


@pytest.fixture(scope="session", autouse=True)
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files where those of every published dataset would be found; MNIST's are 500 digits of scikit-learn's."""
    from tests.data.formats import write_all
    from upright.data.digits import Digits

    root = tmp_path_factory.mktemp("data")
    source = Digits().source
    write_all(root, np.stack(source.images[:500])[..., 0], np.array(source.labels[:500], np.uint8))
    os.environ["UPRIGHT_DATA"] = str(root)
    return root


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where decoded images are kept, instead of the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["UPRIGHT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def graphs() -> Iterator[None]:
    """`export` traces a model in a form once; what a test exports again is mostly the run that all have."""
    import torch

    from upright.exporting import export
    from upright.exporting.graph import Form
    from upright.training.model import Model

    class ByContent(pickle.Pickler):
        def persistent_id(self, given: object) -> object:
            if isinstance(given, torch.Tensor):
                return given.dtype, given.shape, given.detach().numpy().tobytes()
            return None

    written: dict[bytes, bytes] = {}
    write_graph = export.write_graph

    def write_once(model: Model, path: Path, form: Form) -> None:
        content = io.BytesIO()
        try:
            ByContent(content).dump((model, form))
        except (pickle.PicklingError, AttributeError):  # of a class that a test made
            return write_graph(model, path, form)
        key = content.getvalue()
        if key not in written:
            write_graph(model, path, form)
            written[key] = path.read_bytes()
        path.write_bytes(written[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_graph", write_once)
        yield


@pytest.fixture
def upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Upright]:
    """Run a verb in an empty folder: `upright("fit", "--config", path)`."""
    from upright.cli import main

    monkeypatch.chdir(tmp_path)
    # What a verb adds to it is this test's alone.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    yield run
    # Tests write modules of the same name into folders of their own.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `checkpoints/small` and the bundle `export/small`. Tests do not write into it."""
    from upright.cli import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = str(ROOT / "configs/stn_lenet.yaml")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = ["fit", "--config", config, "--name", "small", "--trainer.max_epochs", "2", "--wandb", "off"]
            assert main(fit) == 0
            assert main(["export", "checkpoints/small"]) == 0
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """An own copy of the trained run, of which nobody has opened the test split."""
    opened = shutil.ignore_patterns("test_openings.jsonl")
    shutil.copytree(trained / "checkpoints/small", tmp_path / "checkpoints/small", ignore=opened)
    return tmp_path / "checkpoints/small"


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """An own copy of the bundle."""
    shutil.copytree(trained / "export/small", tmp_path / "export/small")
    return tmp_path / "export/small"
