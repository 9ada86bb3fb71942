"""Triton's configuration is checked with Triton's own message definition, which is in its client package."""

import shutil
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Upright
from tests.runtime.bundles import write_bundle, write_orientation_bundle
from upright.architectures.lenet import LeNet
from upright.errors import UprightError
from upright.exporting.graph import Form
from upright.exporting.triton import MAX_BATCH, check_labels, model_folders, write_models
from upright.files import replacing_folder
from upright.images import ImageSpec
from upright.runtime.bundle import MODELS, Bundle
from upright.runtime.predictor import open_session, run_batch

pytestmark = pytest.mark.usefixtures("traced_once")

SPEC = ImageSpec(3, 28, 28, ("a", "über b", 'c "d"'), (0.4,) * 3, (0.5,) * 3)


@pytest.fixture(scope="session")
def message() -> Any:
    """The module with ``ModelConfig``. It is loaded from its file, because its package would load gRPC."""
    package = Path(pytest.importorskip("tritonclient").__file__).parent
    spec = PathFinder.find_spec("model_config_pb2", [str(package / "grpc")])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(message: Any, folder: Path) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_bytes(), message.ModelConfig())


def check_config(message: Any, folder: Path) -> Any:
    """Check that the configuration matches the graph by the rules of Triton's backend, and return it."""
    config = read(message, folder)
    assert config.name == folder.name and config.backend == "onnxruntime" and config.default_model_filename == ""
    session = open_session(folder / "1/model.onnx")
    types = {"tensor(uint8)": message.TYPE_UINT8, "tensor(float)": message.TYPE_FP32}
    batch = [-1] if config.max_batch_size else []
    for tensors, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [one.name for one in tensors] == [node.name for node in nodes]
        for one, node in zip(tensors, nodes, strict=True):
            shape = [length if isinstance(length, int) else -1 for length in node.shape]
            assert batch + list(one.dims) == shape and one.data_type == types[node.type]
    (probabilities,) = (one for one in config.output if one.name == "probabilities")
    labels = (folder / probabilities.label_filename).read_text(encoding="utf-8").splitlines()
    assert len(labels) == probabilities.dims[-1]
    return config


@pytest.mark.parametrize(
    ("form", "dims"),
    [
        (Form(), [-1, -1, 3]),
        (Form(size=(28, 28), outputs=("logits",)), [28, 28, 3]),
        (Form(batch=4), [4, -1, -1, 3]),
        (Form(batch=1, size=(20, 24)), [1, 20, 24, 3]),
    ],
)
def test_every_form_is_valid_by_the_published_definition(
    message: Any, tmp_path: Path, form: Form, dims: list[int]
) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "bundle", SPEC, LeNet, form))
    folder = tmp_path / "models/small"
    write_models(bundle, {"fp32": folder})
    config = check_config(message, folder)
    assert config.input[0].dims == dims
    # Triton cannot combine requests for a graph with a fixed batch.
    assert config.max_batch_size == (0 if form.batch else MAX_BATCH)
    assert config.HasField("dynamic_batching") == (form.batch is None)
    assert (folder / "labels.txt").read_text(encoding="utf-8") == 'a\nüber b\nc "d"\n'
    assert (folder / "1/model.onnx").read_bytes() == (bundle.folder / MODELS["fp32"]).read_bytes()


def test_a_model_without_classes_has_no_labels(tmp_path: Path) -> None:
    write_models(Bundle.open(write_orientation_bundle(tmp_path / "sky")), {"fp32": tmp_path / "models/sky"})
    assert {path.name for path in (tmp_path / "models/sky").iterdir()} == {"config.pbtxt", "1"}
    config = (tmp_path / "models/sky/config.pbtxt").read_text()
    assert '{ name: "orientation" data_type: TYPE_FP32 dims: [2] }' in config and "label" not in config


def test_a_run_becomes_a_bundle_and_models(message: Any, run_folder: Path, upright: Upright) -> None:
    """Export two precisions with a transformer's outputs into a repository with another model."""
    other = Path("models/other/config.pbtxt")
    other.parent.mkdir(parents=True)
    other.touch()
    command = ["export", run_folder, "--triton", "models", "--outputs", "theta", "warped"]
    command += ["--precision", "int8", "--max-drop", 100]
    answer = upright(*command)
    assert answer.code == 0, answer.err
    assert "Triton: models/small, models/small_int8\n" in answer.out
    assert upright("verify", "export/small").code == 0
    assert {path.name for path in Path("models").iterdir()} == {"small", "small_int8", "other"}
    bundle = Bundle.open("export/small")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    for folder, precision in ((Path("models/small"), "fp32"), (Path("models/small_int8"), "int8")):
        config = check_config(message, folder)
        assert (folder / "1/model.onnx").read_bytes() == bundle.model(precision).read_bytes()
        # The dimensions in the configuration match the shapes of a run.
        outputs = run_batch(open_session(folder / "1/model.onnx"), pixels, [one.name for one in config.output])
        for one, value in zip(config.output, outputs, strict=True):
            assert all(dim in (-1, length) for dim, length in zip(one.dims, value.shape[1:], strict=True))
    answer = upright(*command, "--name", "small2", "--to", "models")
    assert (
        answer.code == 2
        and "need separate folders: change --triton" in answer.err
        and not Path("models/small2").exists()
    )
    shutil.rmtree("export")
    answer = upright(*command)
    assert answer.code == 2 and "Triton model 'models/small' exists: --force replaces it" in answer.err
    assert not Path("export").exists()


def test_only_force_replaces_existing_models(tmp_path: Path) -> None:
    bundle, repository = tmp_path / "export/x", tmp_path / "models"
    planned = model_folders(repository, "x", ("fp32", "fp16"), bundle, False)
    assert planned == {"fp32": repository / "x", "fp16": repository / "x_fp16"}
    with replacing_folder(repository / "x_fp16") as folder:
        (folder / "notes.txt").touch()
    for force in (False, True):
        with pytest.raises(UprightError, match=r"'.*x_fp16' is not a Triton model \(it has no config\.pbtxt\)"):
            model_folders(repository, "x", ("fp32", "fp16"), bundle, force)
    (repository / "x_fp16/config.pbtxt").touch()
    assert model_folders(repository, "x", ("fp32", "fp16"), bundle, True) == planned
    for inside in (bundle, bundle.parent, bundle / "models"):
        with pytest.raises(UprightError, match="need separate folders: change --triton"):
            model_folders(inside, "x", ("fp32",), bundle, True)


def test_a_class_with_a_line_break() -> None:
    check_labels(["a b", "ü"])
    with pytest.raises(UprightError, match=r"Triton reads one class per line, and 'a\\nb' has a line break; rename"):
        check_labels(["c", "a\nb"])


def test_the_published_definition_refuses_errors(message: Any, tmp_path: Path) -> None:
    from google.protobuf import text_format

    for text in ('max_batch: 3 name: "x"', "input [ { data_type: TYPE_FLOAT } ]", 'output [ { dims: "3" } ]'):
        (tmp_path / "config.pbtxt").write_text(text)
        with pytest.raises(text_format.ParseError):
            read(message, tmp_path)
