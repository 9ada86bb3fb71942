"""Speed in deployment: ONNX Runtime and PyTorch, int8, fp32 and OpenVINO, preprocessing, cold starts.

    python benchmarks/runtime.py [recipes] [engines] [int8] [preprocessing] [cold] [--quick]

By default all parts run. The engines take turns in one process, on one thread, measured in processor time (except for
``cold``). A ratio is the median of nine rounds, with the quartiles. Networks have random weights. PyTorch runs without
gradients, in the layout of Upright's models (channels last). ``engines`` and ``int8`` compare with OpenVINO if it is
installed.
"""

import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from shared import ROOT, UPRIGHT, command_line, heading, row
from shared import ratio as format_ratio
from torch import Tensor, nn

from upright.architectures.googlenet import GoogLeNet
from upright.architectures.lenet import LeNet
from upright.architectures.resnet import ResNet
from upright.architectures.vgg import VGG
from upright.data.configs import read_data, read_yaml
from upright.exporting.graph import OPSET, Form, Graph, write_graph
from upright.exporting.precision import Int8
from upright.images import ImageSpec
from upright.options import Engine
from upright.recipes import build
from upright.runtime import speed
from upright.runtime.predictor import open_session, run_batch
from upright.runtime.speed import Speed, machine, side_by_side, turn
from upright.training.model import Model


class Size(NamedTuple):
    """Extent of a measurement: configs, networks and batch sizes."""

    configs: list[Path]
    networks: dict[str, Callable[..., nn.Module]]
    batches: tuple[int, ...] = (1, 64)


FULL: dict[str, Callable[..., nn.Module]] = {
    "VGG-11": partial(VGG, depth=11, batch_norm=True),
    "ResNet-18": partial(ResNet, depth=18, stem="small"),
    "GoogLeNet": partial(GoogLeNet, stem=(3, 1, 1), batch_norm=True),
}
"""Networks at the widths of their papers."""


ENGINE_RECIPES = ("lenet", "resnet", "alexnet", "lstm")


def random_model(network: Callable[..., nn.Module], spec: ImageSpec) -> Model:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return Model(spec, network(spec.input_shape, len(spec.classes))).eval()


def colour(size: int = 32) -> ImageSpec:
    """Return the spec of images like CIFAR's."""
    return ImageSpec(3, size, size, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def write_bare(model: Model, path: Path) -> None:
    """Export the network alone: normalised float images to logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model.network,
            (torch.zeros(2, *model.spec.input_shape),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}],
            verbose=False,
        )
    assert program is not None
    program.save(path)


def run_of(session: onnxruntime.InferenceSession, images: np.ndarray) -> Callable[[], object]:
    """Return a function that runs a session once."""
    return partial(session.run, None, {"images": images})


def eager(module: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    """Return a function that runs a module once in PyTorch."""

    @torch.inference_mode()
    def run() -> object:
        return module(images)

    return run


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, Speed]:
    """Measure the runs side by side."""
    return side_by_side({name: partial(turn, run, time.process_time) for name, run in runs.items()})


def ratio(one: Speed) -> str:
    """Return the speed relative to the first run, with its quartiles."""
    text: str = format_ratio(one.times, *one.quartiles)
    return text


def head(title: str, *columns: str) -> None:
    """Print the title and the heading of a table."""
    print(f"\n## {title}\n")
    heading(*columns)


def pixels(spec: ImageSpec, batch: int) -> np.ndarray:
    """Return random images ``(B, H, W, C)``."""
    return np.random.default_rng(0).integers(0, 256, (batch, spec.height, spec.width, spec.channels), dtype=np.uint8)


def calibration(spec: ImageSpec) -> Iterator[np.ndarray]:
    """Yield images that determine the ranges of int8."""
    yield pixels(spec, 16)


def recipes(folder: Path, size: Size) -> None:
    """Compare ONNX Runtime fp32 with eager PyTorch, for every recipe of ``configs/``."""
    columns = ("recipe", "batch", "eager, ms", "ONNX Runtime, ms", "times as fast", "with preprocessing")
    head("ONNX Runtime fp32 against eager PyTorch: the bare network, then with preprocessing in both", *columns)
    for path in size.configs:
        config = read_yaml(path)
        model = random_model(build(config["model"]["network"]), read_data(path).spec)
        write_bare(model, folder / "bare.onnx")
        write_graph(model, folder / "complete.onnx")
        bare, complete = (open_session(folder / f"{name}.onnx", threads=1) for name in ("bare", "complete"))
        graph = Graph(model, Form())
        for batch in size.batches:
            images = pixels(model.spec, batch)
            normal = torch.randn(batch, *model.spec.input_shape).to(memory_format=torch.channels_last)
            speeds = timed({"eager": eager(model.network, normal), "onnx": run_of(bare, normal.contiguous().numpy())})
            preprocessed = timed({"eager": eager(graph, torch.from_numpy(images)), "onnx": run_of(complete, images)})
            times = [f"{speeds[name].p50:.3f}" for name in ("eager", "onnx")]
            row(path.stem, batch, *times, ratio(speeds["onnx"]), ratio(preprocessed["onnx"]))


def engines(folder: Path, size: Size) -> None:
    """Compare ONNX Runtime and OpenVINO, fp32 and int8, with eager PyTorch: from uint8 images to probabilities."""
    installed: list[Engine] = ["onnxruntime", "openvino"]
    kinds = [(e, precision) for precision in ("fp32", "int8") for e in installed if find_spec(e)]
    head("Times as fast as eager PyTorch", "recipe", "batch", "eager, ms", *map(" ".join, kinds))
    for path in [path for path in size.configs if path.stem in ENGINE_RECIPES] or size.configs:
        model = random_model(build(read_yaml(path)["model"]["network"]), read_data(path).spec)
        write_graph(model, folder / "fp32.onnx")
        converter = Int8(folder / "fp32.onnx", model.network, partial(calibration, model.spec), folder, False)
        (folder / "int8.onnx").write_bytes(converter.convert(converter.layers))
        (folder / "ranges.json").unlink(missing_ok=True)  # an LSTM has none
        sessions = {kind: open_session(folder / f"{kind[1]}.onnx", threads=1, engine=kind[0]) for kind in kinds}

        def answers(images: Tensor, model: Model = model) -> Tensor:
            return model.answers(model(images))

        for batch in size.batches:
            images = pixels(model.spec, batch)
            runs = {"eager": eager(answers, torch.from_numpy(images).permute(0, 3, 1, 2))}
            runs |= {" ".join(kind): partial(run_batch, each, images) for kind, each in sessions.items()}
            speeds = timed(runs)
            row(path.stem, batch, f"{speeds.pop('eager').p50:.3f}", *map(ratio, speeds.values()))


def int8(folder: Path, size: Size) -> None:
    """Compare int8 with fp32, and with OpenVINO."""
    peer = find_spec("openvino") is not None
    columns = ("network, 32 px", "batch", "fp32, ms", "int8, ms", "int8 / fp32", "int8, 8 bits of weights / fp32")
    head("int8 against fp32", *columns, *["int8 / OpenVINO, fp32 file", "int8 / OpenVINO, int8 file"] * peer)
    for name, network in size.networks.items():
        model = random_model(network, colour())
        path = folder / "model.onnx"
        write_graph(model, path)
        sessions = {"fp32": open_session(path, threads=1)}
        for kind, full_range in (("int8", False), ("full", True)):
            converter = Int8(path, model.network, partial(calibration, model.spec), folder, full_range)
            (folder / f"{kind}.onnx").write_bytes(converter.convert(converter.layers))
            sessions[kind] = open_session(folder / f"{kind}.onnx", threads=1)
            (folder / "ranges.json").unlink()
        others = {"vino": path, "vino8": folder / "int8.onnx"} if peer else {}
        loaded = {other: open_session(file, threads=1, engine="openvino") for other, file in others.items()}
        for batch in size.batches:
            images = pixels(model.spec, batch)
            runs: dict[str, Callable[[], object]] = {key: run_of(value, images) for key, value in sessions.items()}
            runs |= {other: partial(run_batch, session, images) for other, session in loaded.items()}
            speeds = timed(runs)
            # The first run is the reference, so int8 is second.
            against = [timed({other: runs[other], "int8": runs["int8"]})["int8"] for other in others]
            ratios = [speeds["int8"], speeds["full"], *against]
            times = [f"{speeds[key].p50:.2f}" for key in ("fp32", "int8")]
            row(name, batch, *times, *map(ratio, ratios))


def preprocessing(folder: Path, size: Size) -> None:
    """Measure the cost of resizing, normalisation, layout and softmax in the graph, relative to the bare network."""
    head("Cost of preprocessing in the graph", "network", "batch", "bare, ms", "any size", "fixed size")
    grey = ImageSpec(1, 28, 28, tuple("0123456789"), (0.5,), (0.25,))
    networks = {"LeNet, 28 px": (LeNet, grey)} | {
        f"{name}, 32 px": (net, colour()) for name, net in size.networks.items()
    }
    for name, (network, spec) in networks.items():
        model = random_model(network, spec)
        write_bare(model, folder / "bare.onnx")
        write_graph(model, folder / "complete.onnx")
        write_graph(model, folder / "fixed.onnx", Form(size=(spec.height, spec.width)))
        sessions = {kind: open_session(folder / f"{kind}.onnx", threads=1) for kind in ("bare", "complete", "fixed")}
        for batch in size.batches:
            images, normal = pixels(spec, batch), np.random.default_rng(0).normal(size=(batch, *spec.input_shape))
            inputs: dict[str, Any] = {"bare": normal.astype(np.float32), "complete": images, "fixed": images}
            speeds = timed({kind: run_of(session, inputs[kind]) for kind, session in sessions.items()})
            cost = [f"{100 * (1 / speeds[kind].times - 1):+.1f} %" for kind in ("complete", "fixed")]
            spread = [
                f"{cell} ({100 * (1 / speeds[kind].quartiles[1] - 1):+.1f} to "
                f"{100 * (1 / speeds[kind].quartiles[0] - 1):+.1f})"
                for cell, kind in zip(cost, ("complete", "fixed"), strict=True)
            ]
            row(name, batch, f"{speeds['bare'].p50:.3f}", *spread)


MEASURED = """
import sys
{program}
from upright.runtime.worker import peak_memory
print(peak_memory(), file=sys.stderr)
"""


def cold(folder: Path, size: Size) -> None:
    """Measure a fresh process with one image: `upright infer`, and the same checkpoint restored in PyTorch."""
    run, bundle = folder / "checkpoints/cold", folder / "export/cold"
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--wandb", "off"]
    where = ["--name", "cold", "--trainer.default_root_dir", str(folder / "checkpoints")]
    subprocess.run(
        [*UPRIGHT, "fit", "--config", str(ROOT / "configs/stn_lenet.yaml"), *limits, *where],
        check=True,
        capture_output=True,
    )
    subprocess.run([*UPRIGHT, "export", str(run), "--to", str(bundle.parent)], check=True, capture_output=True)
    image = str(bundle / "samples/00.png")
    decoded = f"decode({image!r}, Bundle.open({str(bundle)!r}).spec)[None]"
    programs = {
        "upright infer": f"from upright.cli import main; main(['infer', {str(bundle)!r}, {image!r}])",
        "PyTorch, its network alone": "from upright.exporting.eager import pytorch\nfrom upright.images import decode\n"
        f"from upright.runtime.bundle import Bundle\npytorch({str(bundle)!r}, {str(run)!r}, 1)({decoded})",
        "PyTorch, restored by Lightning": "import torch\nfrom upright.images import decode\n"
        "from upright.runtime.bundle import Bundle\nfrom upright.training.restoring import restore\n"
        f"model = restore({str(run)!r}).classifier.model\n"
        f"model(torch.from_numpy({decoded}).permute(0, 3, 1, 2)).softmax(1)",
    }
    memory: dict[str, list[float]] = {name: [] for name in programs}

    def start(name: str) -> object:
        command = [sys.executable, "-c", MEASURED.format(program=programs[name])]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        memory[name].append(int(process.stderr.split()[-1]) / 1e6)
        return process

    # A start takes longer than `speed.TURN_SECONDS`, so each turn is a single start.
    starts = {name: partial(turn, partial(start, name)) for name in programs}
    speeds = side_by_side(starts)
    head("A fresh process, one image (stn_lenet)", "", "seconds", "MB", "infer: times as fast", "times less memory")
    ours = np.median(memory["upright infer"])
    for name, one in speeds.items():
        against = format_ratio(1 / one.times, *(1 / q for q in one.quartiles[::-1]))
        megabytes = np.median(memory[name])
        row(name, f"{one.p50 / 1000:.2f}", f"{megabytes:.0f}", against, f"{megabytes / ours:.1f}")


PARTS = {part.__name__: part for part in (recipes, engines, int8, preprocessing, cold)}


def main() -> None:
    """Print tables."""
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one or several of {', '.join(PARTS)}; default: all")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    size = Size(sorted(ROOT.glob("configs/*.yaml")), FULL)
    if options.quick:
        size = Size([ROOT / "configs/stn_lenet.yaml"], {"LeNet": LeNet}, (1,))
        speed.ROUNDS, speed.TURN_SECONDS = 1, 0.0
    torch.set_num_threads(1)
    here = machine()
    print(f"{here['processor']} ({', '.join(here['instructions'])}), one thread; torch {torch.__version__}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), size)


if __name__ == "__main__":
    main()
