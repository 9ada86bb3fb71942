"""Other engines load a bundle's models and give the same predictions. Engines that are not installed are skipped.

OpenVINO is a wheel (`pip install openvino`), the others are packages of npm (`npm install --no-save --ignore-scripts
onnxruntime-node onnxruntime-web`, in the checkout).
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import ROOT
from upright.images import decode
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import open_session, run_batch

Images = npt.NDArray[np.uint8]
Engine = Callable[[Path, Images], npt.NDArray[np.float32]]


def openvino(model: Path, images: Images) -> npt.NDArray[np.float32]:
    (probabilities,) = run_batch(open_session(model, threads=1, engine="openvino"), images)
    return probabilities


def node(package: str) -> Engine:
    def run(model: Path, images: Images) -> npt.NDArray[np.float32]:
        command = ["node", str(ROOT / "tests/runtime/engine.cjs"), package, str(model), *map(str, images.shape[1:])]
        process = subprocess.run(command, input=images.tobytes(), capture_output=True, cwd=ROOT, check=False)
        assert process.returncode == 0, process.stderr.decode()
        return np.array(json.loads(process.stdout), np.float32).reshape(len(images), -1)

    return run


@pytest.fixture(params=["openvino", "onnxruntime-node", "onnxruntime-web"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "openvino":
        pytest.importorskip("openvino")
        return openvino
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    resolves = f"require.resolve('{request.param}', {{ paths: [process.cwd()] }})"
    if subprocess.run(["node", "-e", resolves], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"{request.param} is not installed")
    return node(request.param)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A folder with the bundles `transformer`, `cnn` and `fixed`, which accepts four images of one size.

    Tests do not write into it.
    """
    from upright.cli import main

    folder = tmp_path_factory.mktemp("engines")
    data = ["--data", str(ROOT / "configs/data/digits.yaml"), "--trainer.max_epochs", "1", "--wandb", "off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(ROOT / "export/digits", "export/transformer")
        assert main(["fit", "--config", str(ROOT / "configs/lenet_mnist.yaml"), "--name", "cnn", *data]) == 0
        assert main(["export", "checkpoints/cnn", "--precision", "int8", "--max-drop", "5"]) == 0
        fixed = ["--name", "fixed", "--size", "28x28", "--batch", "4"]
        assert main(["export", str(trained / "checkpoints/small"), *fixed]) == 0
    return folder / "export"


@pytest.mark.slow  # the default tests of OpenVINO are in test_openvino.py
def test_other_engines_give_the_same_predictions(engine: Engine, bundles: Path, record_property) -> None:
    for name in ("transformer", "cnn", "fixed"):
        bundle = Bundle.open(bundles / name)
        images = np.stack([decode(bundle.folder / sample["file"], bundle.spec) for sample in bundle.samples])
        count = 4 if name == "fixed" else len(images)
        assert bundle.precisions == (["fp32"] if name == "fixed" else ["fp32", "int8"])
        for precision in bundle.precisions:
            probabilities = engine(bundle.model(precision), images[:count])
            difference = np.abs(probabilities - bundle.expected(precision)[:count]).max()
            record_property(f"{name} {precision}", float(difference))
            print(f"{name} {precision}: {difference:.1e}")
            assert difference <= bundle.tolerance(precision), (name, precision)
    # A graph without a fixed size accepts other sizes.
    larger = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    transformer = Bundle.open(bundles / "transformer")
    (one,) = engine(transformer.model("fp32"), larger[:1])
    assert one.shape == (10,) and one.sum() == pytest.approx(1, abs=1e-5)
