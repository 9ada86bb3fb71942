"""What deployment gains: ONNX Runtime against PyTorch, int8 against fp32 and OpenVINO, preprocessing, cold starts.

    python benchmarks/runtime.py [recipes] [int8] [preprocessing] [cold]

All of them by default. What is compared has its turns one after the other in one process, on one thread, by the time
that it has the processor (but for ``cold``); a ratio is the median of nine rounds' with the quartiles. Networks have
random weights, PyTorch's convolutions the layout of Upright's models (channels last), no gradients. ``int8`` compares
with OpenVINO where that is installed.
"""

import argparse
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
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from upright.architectures.googlenet import GoogLeNet
from upright.architectures.lenet import LeNet
from upright.architectures.resnet import ResNet
from upright.architectures.vgg import VGG
from upright.data.configs import read_data, read_yaml
from upright.exporting.graph import OPSET, Form, Graph, write_graph
from upright.exporting.precision import Int8
from upright.images import ImageSpec
from upright.recipes import build
from upright.runtime.predictor import open_session
from upright.runtime.speed import Speed, machine, side_by_side, turn
from upright.runtime.worker import openvino
from upright.training.model import Model

FULL: dict[str, Callable[..., nn.Module]] = {
    "VGG-11": partial(VGG, depth=11, batch_norm=True),
    "ResNet-18": partial(ResNet, depth=18, stem="small"),
    "GoogLeNet": partial(GoogLeNet, stem=(3, 1, 1), batch_norm=True),
}
"""At their papers' widths."""


def made(network: Callable[..., nn.Module], spec: ImageSpec) -> Model:
    """A model with random weights."""
    torch.manual_seed(0)
    return Model(spec, network(spec.input_shape, len(spec.classes))).eval()


def colour(size: int = 32) -> ImageSpec:
    """Images like CIFAR's."""
    return ImageSpec(3, size, size, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def write_bare(model: Model, path: Path) -> None:
    """The network alone: normalised float images to logits."""
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
    """One run of a session."""
    return partial(session.run, None, {"images": images})


def eager(module: nn.Module, images: Tensor) -> Callable[[], object]:
    """One run in PyTorch."""

    @torch.inference_mode()
    def run() -> object:
        return module(images)

    return run


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, Speed]:
    """Side by side."""
    return side_by_side({name: partial(turn, run, time.process_time) for name, run in runs.items()})


def ratio(speed: Speed) -> str:
    """With its quartiles."""
    return f"**{speed.times:.2f}** ({speed.quartiles[0]:.2f} to {speed.quartiles[1]:.2f})"


def row(*cells: object) -> None:
    """Of a table in Markdown."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def head(title: str, *columns: str) -> None:
    """Of a table."""
    print(f"\n## {title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def pixels(spec: ImageSpec, batch: int) -> np.ndarray:
    """Images ``(B, H, W, C)``."""
    return np.random.default_rng(0).integers(0, 256, (batch, spec.height, spec.width, spec.channels), dtype=np.uint8)


def recipes(folder: Path) -> None:
    """ONNX Runtime fp32 against eager PyTorch, for every recipe of ``configs/``."""
    columns = ("recipe", "batch", "eager, ms", "ONNX Runtime, ms", "times as fast", "with preprocessing")
    head("ONNX Runtime fp32 against eager PyTorch: the bare network, then with preprocessing in both", *columns)
    for path in sorted(Path("configs").glob("*.yaml")):
        config = read_yaml(path)
        model = made(build(config["model"]["network"]), read_data(path).spec)
        write_bare(model, folder / "bare.onnx")
        write_graph(model, folder / "whole.onnx")
        bare, whole = (open_session(folder / f"{name}.onnx", threads=1) for name in ("bare", "whole"))
        graph = Graph(model, Form())
        for batch in (1, 64):
            images = pixels(model.spec, batch)
            normal = torch.randn(batch, *model.spec.input_shape).to(memory_format=torch.channels_last)
            speeds = timed({"eager": eager(model.network, normal), "onnx": run_of(bare, normal.contiguous().numpy())})
            also = timed({"eager": eager(graph, torch.from_numpy(images)), "onnx": run_of(whole, images)})
            times = [f"{speeds[name].p50:.3f}" for name in ("eager", "onnx")]
            row(path.stem, batch, *times, ratio(speeds["onnx"]), ratio(also["onnx"]))


def int8(folder: Path) -> None:
    """int8 against fp32, and against OpenVINO as it runs the fp32 file if it is not told otherwise."""
    peer = find_spec("openvino") is not None
    columns = ("network, 32 px", "batch", "fp32, ms", "int8, ms", "int8 / fp32", "int8, 8 bits of weights / fp32")
    head("int8 against fp32", *columns, *["int8 / OpenVINO, fp32 file", "int8 / OpenVINO, int8 file"] * peer)
    for name, network in FULL.items():
        model = made(network, colour())
        path = folder / "model.onnx"
        write_graph(model, path)

        def calibration(spec: ImageSpec = model.spec) -> Iterator[np.ndarray]:
            yield pixels(spec, 16)

        sessions = {"fp32": open_session(path, threads=1)}
        for kind, full_range in (("int8", False), ("full", True)):
            converter = Int8(path, model.network, calibration, folder, full_range)
            (folder / f"{kind}.onnx").write_bytes(converter.convert(converter.layers))
            sessions[kind] = open_session(folder / f"{kind}.onnx", threads=1)
            (folder / "ranges.json").unlink()
        others = {"vino": path, "vino8": folder / "int8.onnx"} if peer else {}
        loaded = {other: openvino(str(file), 1) for other, file in others.items()}
        for batch in (1, 64):
            images = pixels(model.spec, batch)
            runs: dict[str, Callable[[], object]] = {key: run_of(value, images) for key, value in sessions.items()}
            runs |= {other: partial(run, images) for other, run in loaded.items()}
            speeds = timed(runs)
            # Measured by each of the others, int8 is second.
            against = [timed({other: runs[other], "int8": runs["int8"]})["int8"] for other in others]
            ratios = [speeds["int8"], speeds["full"], *against]
            times = [f"{speeds[key].p50:.2f}" for key in ("fp32", "int8")]
            row(name, batch, *times, *map(ratio, ratios))


def preprocessing(folder: Path) -> None:
    """What resizing, normalisation, layout and softmax inside the graph cost, against the bare network."""
    head("What preprocessing in the graph costs", "network", "batch", "bare, ms", "any size", "fixed size")
    grey = ImageSpec(1, 28, 28, tuple("0123456789"), (0.5,), (0.25,))
    networks = {"LeNet, 28 px": (LeNet, grey)} | {f"{name}, 32 px": (net, colour()) for name, net in FULL.items()}
    for name, (network, spec) in networks.items():
        model = made(network, spec)
        write_bare(model, folder / "bare.onnx")
        write_graph(model, folder / "whole.onnx")
        write_graph(model, folder / "fixed.onnx", Form(size=(spec.height, spec.width)))
        sessions = {kind: open_session(folder / f"{kind}.onnx", threads=1) for kind in ("bare", "whole", "fixed")}
        for batch in (1, 64):
            images, normal = pixels(spec, batch), np.random.default_rng(0).normal(size=(batch, *spec.input_shape))
            given: dict[str, Any] = {"bare": normal.astype(np.float32), "whole": images, "fixed": images}
            speeds = timed({kind: run_of(session, given[kind]) for kind, session in sessions.items()})
            cost = [f"{100 * (1 / speeds[kind].times - 1):+.1f} %" for kind in ("whole", "fixed")]
            spread = [
                f"{cell} ({100 * (1 / speeds[kind].quartiles[1] - 1):+.1f} to "
                f"{100 * (1 / speeds[kind].quartiles[0] - 1):+.1f})"
                for cell, kind in zip(cost, ("whole", "fixed"), strict=True)
            ]
            row(name, batch, f"{speeds['bare'].p50:.3f}", *spread)


MEASURED = """
import sys
{program}
from upright.runtime.worker import peak_memory
print(peak_memory(), file=sys.stderr)
"""


def cold(folder: Path) -> None:
    """A fresh process, one image: `upright infer`, and the same checkpoint restored in PyTorch."""
    run, bundle = folder / "checkpoints/cold", folder / "export/cold"
    upright = [sys.executable, "-m", "upright"]
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--wandb", "off"]
    where = ["--name", "cold", "--trainer.default_root_dir", str(folder / "checkpoints")]
    subprocess.run(
        [*upright, "fit", "--config", "configs/stn_lenet.yaml", *quick, *where], check=True, capture_output=True
    )
    subprocess.run([*upright, "export", str(run), "--to", str(bundle.parent)], check=True, capture_output=True)
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
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory[name].append(int(done.stderr.split()[-1]) / 1e6)
        return done

    # A turn is one start, for it takes longer than a turn.
    starts = {name: partial(turn, partial(start, name)) for name in programs}
    speeds = side_by_side(starts)
    head("A fresh process, one image (stn_lenet)", "", "seconds", "MB", "infer: times as fast", "times less memory")
    ours = np.median(memory["upright infer"])
    for name, speed in speeds.items():
        against = ratio(speed._replace(times=1 / speed.times, quartiles=tuple(1 / q for q in speed.quartiles[::-1])))
        taken = np.median(memory[name])
        row(name, f"{speed.p50 / 1000:.2f}", f"{taken:.0f}", against, f"{taken / ours:.1f}")


PARTS = {part.__name__: part for part in (recipes, int8, preprocessing, cold)}


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    here = machine()
    print(f"{here['processor']} ({', '.join(here['instructions'])}), one thread; torch {torch.__version__}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main()
