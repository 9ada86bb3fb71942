"""The verbs. Nothing heavy is imported before a verb is called, so help comes at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from upright.errors import UprightError, UserError, nearest


class Verb(NamedTuple):
    """A verb of ours: what it says in help, its arguments, and ``module:function`` that is called with them."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    function: str
    passes_on: str = ""
    """Whose options stand after ``--``; they are the function's ``options``."""


def _describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG_OR_CHECKPOINT", help="a YAML, a checkpoint, or the folder of a run")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="default: table")
    parser.add_argument("--data", metavar="YAML", help="describe it for these data instead of its own")


def _preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DATA", help="a YAML of data or of an experiment, a checkpoint, or the folder of a run"
    )
    parser.add_argument("--root", metavar="PATH", help="where the data are, in place of what the YAML says")
    parser.add_argument("--output", metavar="PNG", default="preview.png", help="default: preview.png")
    parser.add_argument("--seed", type=int, default=0, help="of the augmented copies; default: 0")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run (its best.ckpt)")
    parser.add_argument("--name", help="name of the bundle: FOLDER/NAME; the run's name by default")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--data", metavar="YAML", help="the data, if they are not where they were when it was trained")
    parser.add_argument(
        "--outputs",
        nargs="+",
        default=(),
        choices=("theta", "warped", "logits", "features"),
        help="what the graph gives beside probabilities: each spatial transformer's theta and what it sees, logits, "
        "what goes into the head",
    )
    parser.add_argument(
        "--wandb",
        choices=("offline", "online", "off"),
        help="note the bundle in Weights & Biases; offline by default if its run is tracked, else off",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=(),
        choices=("fp32", "fp16", "int8"),
        help="also in float16 and 8 bits, each of which must hold its accuracy; fp32 is always there",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="by how much accuracy on the validation split may fall with a lower precision; default: 0.5",
    )
    parser.add_argument(
        "--full-range",
        action="store_true",
        help="8 bits of int8's weights in place of 7: for processors with instructions for it (VNNI, AMX, ARM)",
    )
    parser.add_argument("--opset", type=int, default=18, help="of ONNX, from 18 (read by most) to 25; default: 18")
    parser.add_argument("--batch", type=int, metavar="N", help="take so many images at once, and no other number")
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="take images of this size alone; the network's own is not resized"
    )
    parser.add_argument("--to", metavar="FOLDER", default="export", help="where bundles are put; default: export")
    parser.add_argument(
        "--triton",
        metavar="REPOSITORY",
        help="also put the models into this Triton model repository, with their config",
    )


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, like 28x28; got '{text}'")
    return int(height), int(width)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a folder that `upright export` made")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="which of the bundle's models; default: fp32",
    )


def _infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a folder that `upright export` made")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="pictures, folders of pictures, patterns like 'x/**/*.png'; - reads paths, one per line",
    )
    parser.add_argument("--format", choices=("table", "jsonl", "csv"), default="table", help="default: table")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="show the K most probable classes; default: 1")
    _model(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="that one run may use; all cores by default")
    parser.add_argument(
        "--providers",
        nargs="+",
        default=("cpu",),
        metavar="NAME",
        help="of onnxruntime, best first: cuda, tensorrt, coreml, openvino, ..., as far as it has them; default: cpu",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=64_000_000, metavar="N", help="refuse larger pictures; default: 64000000"
    )


def _benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a folder that `upright export` made")
    parser.add_argument(
        "--checkpoint", metavar="CKPT", help="the checkpoint (or run) it was exported from: adds PyTorch's rows"
    )
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="images at once; default: 1 8 64")
    parser.add_argument("--threads", type=int, nargs="+", default=(1,), metavar="N", help="default: 1")
    parser.add_argument(
        "--to", metavar="FOLDER", help="also write benchmark.md, benchmark.json and benchmark.png there"
    )


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Classify pictures over HTTP: POST /v1/classify, and the Open Inference Protocol (/v2). /docs describes both, "
        "/metrics is for Prometheus. Keys, TLS and routing are the business of the proxy in front."
    )
    parser.add_argument("bundle", help="a folder that `upright export` made")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    _model(parser)
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of one run of the model; as many as cores by default"
    )
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="images per run; default: 64")
    parser.add_argument(
        "--max-delay-ms", type=float, default=5, metavar="MS", help="how long an image waits for others; default: 5"
    )
    parser.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="images that may wait, others get a 429; default: 256"
    )
    parser.add_argument("--max-body-mb", type=float, default=16, metavar="MB", help="of a request; default: 16")
    parser.add_argument("--max-pixels", type=int, default=16_000_000, metavar="N", help="of a picture; default: 16e6")
    parser.add_argument(
        "--timeout-s", type=float, default=30, metavar="S", help="from a request to its answer; default: 30"
    )
    parser.add_argument("--quiet", action="store_true", help="log no requests")


def _web(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a folder that `upright export` made")
    parser.add_argument("--to", metavar="FOLDER", default="web", help="where the page's folder is put; default: web")
    parser.add_argument(
        "--runtime",
        metavar="PATH_OR_URL",
        help="onnxruntime-web: its folder, its package as a file, or a mirror's address; by default downloaded once",
    )
    _model(parser)
    parser.add_argument(
        "--one-file", action="store_true", help="write a single HTML file, a third larger, that also opens from a disk"
    )


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("space", metavar="SPACE.yaml", help="the search space, like configs/sweeps/lenet_sweep.yaml")
    parser.add_argument("--trials", type=int, metavar="N", help="total number of trials; that of SPACE.yaml by default")
    parser.add_argument("--name", help="of the sweep: checkpoints/NAME; that of SPACE.yaml by default")


def _select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUNS_OR_SWEEP", help="folders of runs, or of a sweep")
    parser.add_argument(
        "--to", metavar="FOLDER", help="where selection.md, .json and .png are written; a sweep's own folder by default"
    )
    parser.add_argument("--data", metavar="YAML", help="the data, if they are not where they were when it was trained")


def _study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", help="its name; without it, all are listed")
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant; default: 3")
    parser.add_argument("--quick", action="store_true", help="on the embedded digits, in seconds: shows that it runs")
    parser.add_argument("--full", action="store_true", help="longer than half an hour, where a protocol asks for it")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="CKPT_OR_BUNDLE",
        help="a checkpoint, the folder of a run, or a bundle; others are compared with the first",
    )
    parser.add_argument("--data", metavar="YAML", help="judge them by these data instead of the first one's own")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: test")
    parser.add_argument(
        "--images", type=int, default=500, metavar="N", help="that are distorted for the curves; default: 500"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "fp16", "int8"),
        default=("fp32",),
        help="which of a bundle's models, each a row; default: fp32",
    )
    parser.add_argument("--to", metavar="FOLDER", help="of the report; default: checkpoints/report-NAME")
    parser.add_argument("--force", action="store_true", help="replace an existing report")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="demo", help="of the run and the bundle, which are replaced; default: demo")


LIGHTNING = {
    "fit": "train; --config says what",
    "validate": "metrics of the validation split; --ckpt_path says of what",
    "test": "metrics of the test split; --ckpt_path says of what",
    "predict": "write the probabilities of the test split; --ckpt_path says of what",
}
VERBS = {
    "describe": Verb("what a network is made of, layer by layer", _describe, "upright.describe:run"),
    "preview": Verb("what a network will be fed: a picture, and figures", _preview, "upright.preview:preview"),
    "export": Verb("checkpoint -> verified ONNX bundle", _export, "upright.exporting.export:export"),
    "verify": Verb("check a bundle on this machine", _verify, "upright.runtime.verify:verify"),
    "infer": Verb("classify pictures with a bundle", _infer, "upright.runtime.infer:infer"),
    "benchmark": Verb("how fast a bundle is here, in one table", _benchmark, "upright.runtime.benchmark:benchmark"),
    "serve": Verb("classify pictures over HTTP", _serve, "upright.runtime.serving.server:serve"),
    "web": Verb("a page that runs a bundle in the browser", _web, "upright.runtime.web:web"),
    "sweep": Verb(
        "search over options of fit", _sweep, "upright.evidence.selecting.sweep:sweep", passes_on="upright fit"
    ),
    "select": Verb("what the best of several runs is worth", _select, "upright.evidence.selecting.selection:select"),
    "report": Verb("what models are worth, on one page", _report, "upright.evidence.reporting.report:report"),
    "study": Verb("measure a textbook claim", _study, "upright.evidence.study:study"),
    "demo": Verb("the whole line once, on real digits", _demo, "upright.demo:demo"),
}


USES_OWN_CODE = {*LIGHTNING, "describe", "preview", "export", "report", "select", "sweep"}
"""Verbs that import what a config or a checkpoint names."""


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Leave the usage to --help."""
        options = [option for action in self._actions for option in action.option_strings]
        given = message.rpartition("unrecognized arguments: ")[2].split(" ")[0]
        hint = nearest(given, options) if "unrecognized arguments" in message else ""
        raise UserError(f"{self.prog.partition(' ')[2]}: {message}.{hint} `{self.prog} --help` shows all.")


def _overview() -> str:
    rows = LIGHTNING | {name: verb.help for name, verb in VERBS.items()}
    return (
        "usage: upright VERB ...\n\nFrom images to a verified ONNX bundle.\n\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in rows.items())
        + "\n\n`upright VERB --help` says more. A first run: upright fit --config configs/stn_lenet.yaml"
    )


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"upright {version('upright')}")
        return 0
    name, *rest = arguments
    # A console script does not see the working directory, where an own architecture lies. Its absolute path: the
    # parser changes into a config's folder while it reads it.
    if name in USES_OWN_CODE and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    if name in LIGHTNING:
        return int(_load("upright.runs.cli.run:run")(name, rest) or 0)
    if name not in VERBS:
        allowed = [*LIGHTNING, *VERBS]
        raise UserError(f"unknown verb '{name}'.{nearest(name, allowed)} Verbs: {', '.join(allowed)}.")
    verb = VERBS[name]
    parser = OneLineParser(prog=f"upright {name}", description=verb.help, allow_abbrev=False)
    verb.arguments(parser)
    passed_on = {}
    if verb.passes_on:
        parser.epilog = f"What follows -- are options of `{verb.passes_on}`."
        end = rest.index("--") if "--" in rest else len(rest)
        rest, passed_on = rest[:end], {"options": rest[end + 1 :]}
    options = vars(parser.parse_args(rest)) | passed_on
    return int(_load(verb.function)(**options) or 0)


EXTRAS = {"optuna": "sweep", **dict.fromkeys(("msgspec", "prometheus_client", "starlette", "uvicorn"), "serve")}
"""Package -> the extra that brings it; all others come with ``train``."""


def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "upright":
            raise
        extra = EXTRAS.get(package, "train")
        raise UserError(f"This verb needs the package '{package}': pip install 'upright[{extra}]'.") from error
    return loaded


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: the command line after ``upright``; this process's own by default.

    Returns:
        The exit code: 0, 1 for a gate that did not hold, 2 for a user's mistake.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except UprightError as error:
        print(f"upright: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Who reads our output has had enough; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = f": '{error.filename}'" if error.filename else ""
        print(f"upright: error: {error.strerror}{where}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("upright: stopped.", file=sys.stderr)
        return 130
