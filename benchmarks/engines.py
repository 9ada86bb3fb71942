"""Engines that run a bundle: the largest difference of a probability from those that the bundle records.

    python benchmarks/engines.py [ENGINE ...] [--bundle FOLDER] [--quick]

Each engine is installed from its registry, PyPI or npm, into a folder of its own. It classifies the samples of the
bundle in one batch. The exit code is 1 if an engine does not agree in a precision in which it should.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shared import ROOT, command_line, heading, row

from upright.images import decode
from upright.runtime.bundle import Bundle
from upright.runtime.speed import machine

START = "import sys, numpy; model, images = sys.argv[1], numpy.load(sys.argv[2])\n"
END = "\nnumpy.save(sys.argv[3], probabilities)"
ONNX_RUNTIME = """
import onnxruntime
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
(probabilities,) = session.run(["probabilities"], {"images": images})
"""
OPENVINO = """
import openvino
compiled = openvino.Core().compile_model(model, "CPU", %s)
probabilities = compiled({"images": images})[compiled.output("probabilities")]
"""
OPENCV = """
import cv2
net = cv2.dnn.readNetFromONNX(model)
net.setInput(images, "images")
probabilities = net.forward("probabilities")
"""
MNN = """
import MNN.expr, MNN.nn, MNN.tools.mnnconvert
file = sys.argv[3] + ".mnn"
MNN.tools.mnnconvert.convert(["", "-f", "ONNX", "--modelFile", model, "--MNNModel", file, "--bizCode", "upright"])
net = MNN.nn.load_module_from_file(file, ["images"], ["probabilities"])
values = MNN.expr.const(images.ravel().tolist(), list(images.shape), MNN.expr.NCHW, MNN.expr.uint8)
probabilities = net.forward([values])[0].read()
"""
TRACT = """
import tract
model = tract.onnx().load(model).into_model().into_runnable()
probabilities = model.run([images])[0].to_numpy()
"""


class Engine(NamedTuple):
    """An engine at one version.

    Args:
        name: name in the table.
        package: ``package==version`` of PyPI, or ``package@version`` of npm.
        program: Python code that computes ``probabilities`` from ``model`` and ``images``; empty for npm.
        agrees: precisions in which the engine has to agree with the bundle.
        requirements: further packages of PyPI.
    """

    name: str
    package: str
    program: str
    agrees: Sequence[str] = ("fp32", "int8")
    requirements: Sequence[str] = ("numpy",)


ENGINES = [
    *(
        Engine("ONNX Runtime", f"onnxruntime=={version}", ONNX_RUNTIME, requirements=["numpy<2"])
        for version in ("1.17.3", "1.18.1")
    ),
    *(
        Engine("ONNX Runtime", f"onnxruntime=={version}", ONNX_RUNTIME)
        for version in ("1.20.1", "1.22.1", "1.24.4", "1.27.0", "1.30.0", "1.32.0")
    ),
    Engine("ONNX Runtime for Node.js", "onnxruntime-node@1.17.3", ""),
    Engine("ONNX Runtime for Node.js", "onnxruntime-node@1.30.0", ""),
    Engine("ONNX Runtime for the web (wasm)", "onnxruntime-web@1.17.3", ""),
    Engine("ONNX Runtime for the web (wasm)", "onnxruntime-web@1.30.0", ""),
    *(
        Engine("OpenVINO, hint f32", f"openvino=={version}", OPENVINO % {"INFERENCE_PRECISION_HINT": "f32"})
        for version in ("2024.6.0", "2026.4.1")
    ),
    Engine("OpenVINO, its default", "openvino==2026.4.1", OPENVINO % {}, agrees=()),
    Engine("OpenCV dnn", "opencv-python-headless==4.13.0.92", OPENCV, agrees=()),
    Engine("OpenCV dnn", "opencv-python-headless==5.0.0.93", OPENCV, agrees=["fp32"]),
    Engine("MNN", "mnn==3.6.1", MNN, agrees=["fp32"]),
    Engine("tract", "tract==0.23.9", TRACT),
]
QUICK = ("onnxruntime==1.17.3", "tract==0.23.9")


def install(engine: Engine, folder: Path) -> None:
    """Install an engine into a folder."""
    if "==" in engine.package:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(folder)]
    else:
        command = ["npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(folder)]
    requirements = engine.requirements if engine.program else ()
    subprocess.run([*command, engine.package, *requirements], check=True, capture_output=True, text=True)


def run(engine: Engine, folder: Path, model: Path, images: np.ndarray) -> np.ndarray:
    """Return the probabilities ``(B, K)`` of an installed engine for decoded images ``(B, H, W, C)``."""
    if not engine.program:
        name = engine.package.partition("@")[0]
        command = ["node", str(ROOT / "tests/runtime/engine.cjs"), name, str(model), *map(str, images.shape[1:])]
        node = subprocess.run(command, input=images.tobytes(), cwd=folder, check=True, capture_output=True)
        return np.array(json.loads(node.stdout), np.float32).reshape(len(images), -1)
    inputs, outputs = folder / "images.npy", folder / "probabilities.npy"
    outputs.unlink(missing_ok=True)
    np.save(inputs, images)
    # -S hides the packages of this environment.
    command = [sys.executable, "-S", "-c", START + engine.program + END, str(model), str(inputs), str(outputs)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    # Some engines leave files in the working directory.
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    probabilities: np.ndarray = np.load(outputs)
    return probabilities


def compare(engine: Engine, bundle: Bundle) -> Iterator[tuple[str, str, bool]]:
    """Yield each precision, its largest difference or the reason why there is none, and whether the engine agrees."""
    images = np.stack([decode(path, bundle.spec) for path in bundle.sample_files])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            install(engine, folder)
        except subprocess.CalledProcessError as error:
            yield "-", f"not installed: {reason(error)}", False
            return
        for precision in bundle.precisions:
            try:
                probabilities = run(engine, folder, Path(str(bundle.model(precision))).resolve(), images)
            except subprocess.CalledProcessError as error:
                yield precision, f"fails: {reason(error)}", False
            else:
                difference = float(np.abs(probabilities - bundle.expected(precision)).max())
                yield precision, f"{difference:.0e}", difference <= bundle.tolerance(precision)


def reason(error: subprocess.CalledProcessError) -> str:
    """Return the last line of a process's messages that has letters."""
    text = error.stderr if isinstance(error.stderr, str) else error.stderr.decode()
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    return (lines or [f"exit code {error.returncode}"])[-1][:200].replace("|", "/")


def main() -> int:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="such as onnxruntime==1.17.3; by default all")
    parser.add_argument("--bundle", type=Path, default=ROOT / "export/digits", help="by default export/digits")
    options = parser.parse_args()
    packages = options.engines or (QUICK if options.quick else [engine.package for engine in ENGINES])
    if unknown := set(packages) - {engine.package for engine in ENGINES}:
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(engine.package for engine in ENGINES)}")
    bundle, here = Bundle.open(options.bundle), machine()
    print(f"{here['processor']} ({', '.join(here['instructions'])}); {len(bundle.samples)} images\n")
    heading("engine", "version", "precision", "largest difference", "allowed", "agrees")
    agreement = True
    for engine in ENGINES:
        if engine.package not in packages:
            continue
        version = engine.package.replace("@", "==").partition("==")[2]
        for precision, difference, agrees in compare(engine, bundle):
            allowed = "-" if precision == "-" else f"{bundle.tolerance(precision):.0e}"
            row(engine.name, version, precision, difference, allowed, "yes" if agrees else "no")
            agreement &= agrees or precision not in (*engine.agrees, "-")
    return 0 if agreement else 1


if __name__ == "__main__":
    sys.exit(main())
