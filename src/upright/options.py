"""The options of each command: names, types, defaults, limits and help texts. This module imports nothing heavy."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from inspect import signature
from types import NoneType
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, cast, dataclass_transform, get_args, get_origin

from upright.errors import UserError, nearest


def option(default: Any, help: str, metavar: str | None = None, **settings: Any) -> Any:
    """Return a field for an option of the command line.

    Args:
        default: default value, or MISSING; the help prints it, unless it is None, empty, or a flag.
        help: help text, a noun phrase.
        metavar: name of the value.
        **settings: ``minimum`` and ``maximum`` (inclusive) or ``above`` (exclusive) as limits; ``type``;
            ``positional``; ``after`` with a command if the option passes all arguments after ``--`` on to it.
    """
    return field(default=default, kw_only=True, metadata={"help": help, "metavar": metavar, **settings})


def argument(help: str, metavar: str | None = None, **settings: Any) -> Any:
    """Return a field for a required positional argument. With ``address``, it may be the address of a bundle."""
    return field(metadata={"help": help, "metavar": metavar, "positional": True, **settings})


@dataclass(frozen=True)
@dataclass_transform(frozen_default=True)
class Options:
    """Base of the options of a command. Each subclass is a frozen dataclass, and its docstring is the command's help.

    Raises:
        UserError: if a number is out of range.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            minimum, maximum, above = (each.metadata.get(limit) for limit in ("minimum", "maximum", "above"))
            allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            for value in _values(getattr(self, each.name)):
                # `not`, because NaN is neither below nor above a limit.
                if not ((minimum is None or value >= minimum) and (maximum is None or value <= maximum)):
                    raise UserError(f"{_flag(each)} must be {allowed}, got {value:g}.")
                if not (above is None or value > above):
                    raise UserError(f"{_flag(each)} must be above {above}, got {value:g}.")


Parsed = TypeVar("Parsed", bound=Options)
Arguments = ParamSpec("Arguments")


def with_arguments_of(
    options: Callable[Arguments, Parsed],
) -> Callable[[Callable[[Parsed], int]], Callable[Arguments, int]]:
    """Give a function of an object of options the signature of their class, for calls from Python."""

    def decorate(function: Callable[[Parsed], int]) -> Callable[Arguments, int]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            return function(options(*args, **kwargs))

        call.__signature__ = signature(options).replace(return_annotation=int)  # type: ignore[attr-defined]
        return call

    return decorate


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises a `UserError` of one line."""

    def error(self, message: str, hint: str = "") -> NoReturn:
        raise UserError(f"{self.prog.partition(' ')[2]}: {message}.{hint} `{self.prog} --help` shows all.")


def parse(command: str, options: type[Parsed], arguments: list[str]) -> Parsed:
    """Parse the arguments of a command, or raise a `UserError`."""
    parser = OneLineParser(prog=f"upright {command}", description=options.__doc__, allow_abbrev=False)
    passed_on: dict[str, list[str]] = {}
    for each in fields(options):
        if "after" in each.metadata:
            parser.epilog = f"Arguments after -- are passed on to `{each.metadata['after']}`."
            end = arguments.index("--") if "--" in arguments else len(arguments)
            arguments, passed_on[each.name] = arguments[:end], arguments[end + 1 :]
        elif each.metadata.get("positional"):
            parser.add_argument(each.name, **_settings(each))
        else:
            parser.add_argument(_flag(each), dest=each.name, default=each.default, **_settings(each))
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}", nearest(unknown[0], map(_flag, fields(options))))
    return options(**vars(parsed), **passed_on)


def lightning_help(command: str) -> str:
    """Return the short help of ``fit``, ``validate``, ``test`` or ``predict``: Upright's own options and examples."""
    options, style = LIGHTNING[command], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"upright {command}", description=options.__doc__, epilog=LIGHTNING_EPILOG, formatter_class=style
    )
    for each in fields(options):
        parser.add_argument(f"--{each.name}", **_settings(each))
    return parser.format_help()


def _flag(each: "Field[Any]") -> str:
    return f"--{each.name.replace('_', '-')}"


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _settings(each: "Field[Any]") -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for the type and the metadata of a field."""
    names, kind = ("help", "metavar", "type"), cast(Any, each.type)
    settings = {name: each.metadata[name] for name in names if each.metadata.get(name)}
    if kind is bool:
        return settings | {"action": "store_true"}
    if each.default is MISSING and not each.metadata.get("positional"):
        settings["required"] = True
    elif each.default is not MISSING and (default := _values(each.default)):
        settings["help"] += f"; default: {' '.join(map(str, default))}"
    if NoneType in get_args(kind):
        (kind,) = set(get_args(kind)) - {NoneType}
    if get_origin(kind) is Sequence:
        (kind,) = get_args(kind)
        settings["nargs"] = "+"
    elif each.metadata.get("positional") and each.default is None:
        settings["nargs"] = "?"
    if get_origin(kind) is Literal:
        return settings | {"choices": get_args(kind)}
    return {"type": kind} | settings


def image_size(text: str) -> tuple[int, int]:
    """Parse ``HEIGHTxWIDTH``."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, like 28x28; got '{text}'")
    return int(height), int(width)


PATHS = "images, folders of images, patterns like 'x/**/*.png'; - reads paths from standard input, one per line"
PROVIDERS = (
    "execution providers of onnxruntime, best first: cuda, tensorrt, coreml, openvino, ..., if this build has them"
)
Engine = Literal["onnxruntime", "openvino"]
ENGINE = "engine that runs the model; openvino needs the extra `openvino`, and must agree on the samples of the bundle"
DATA = "a YAML of the data, if they moved since the training"


class BundleOptions(Options):
    """Base of the commands that take a bundle."""

    bundle: str = argument(
        "a folder or an archive that `upright export` wrote, or its address: https:// or wandb-artifact://",
        address=True,
    )
    sha256: str | None = option(None, "SHA-256 of the bundle's archive; an https:// address needs it", "HASH")
    expect: str | None = option(None, "SHA-256 of the bundle's file SHA256SUMS; another one is refused", "HASH")
    key: str | None = option(
        None, "public key (a PEM file) that must have signed the bundle; needs the extra `sign`", "PUB"
    )


class ModelOptions(BundleOptions):
    """Base of the commands that run one model of a bundle."""

    precision: Literal["fp32", "fp16", "int8"] = option("fp32", "model of the bundle")


class New(Options):
    """Write a project of your own.

    The project has a network, data, a config, tests, and all that CI needs. Its Python package has the project's name,
    with underscores for dashes.
    """

    project: str = argument("the folder to write, for example my-project; its last part names the project", "PROJECT")


class Configs(Options):
    """List or copy the configs that come with Upright.

    `--config NAME` of other commands finds them by name, for example `upright fit --config stn_lenet`.
    """

    action: Literal["list", "copy"] = argument("list the configs, or copy them and the example bundle")
    to: str = option(".", "folder that gets the copies, configs/ and export/digits/", "FOLDER")


class Describe(Options):
    """Print the layers of a network."""

    source: str = argument("a YAML, a checkpoint, or the folder of a run", "CONFIG_OR_CHECKPOINT")
    format: Literal["table", "json", "markdown"] = option("table", "output format")
    data: str | None = option(None, "a YAML of data, instead of the network's own", "YAML")


class Preview(Options):
    """Draw images of a dataset before and after augmentation."""

    source: str = argument("a YAML of data or of an experiment, a checkpoint, or the folder of a run", "DATA")
    root: str | None = option(None, "the folder of the data, instead of the one in the YAML", "PATH")
    output: str = option("preview.png", "the file to write", "PNG")
    seed: int = option(0, "seed of the augmentation")
    write_statistics: bool = option(False, "write the measured mean and deviation into the YAML; its comments stay")


class AbstentionOptions(Options):
    """Base of the commands that write a graph whose transformer abstains."""

    threshold: float | None = option(
        None,
        "smallest confidence of the transformer; below it, the image passes unchanged",
        "C",
        minimum=0,
    )
    max_harm: float | None = option(
        None,
        "choose the smallest threshold whose harm is within this limit: points of upright images that go from right "
        "to wrong, by the upper end of its interval",
        "POINTS",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.max_harm is not None:
            raise UserError("--max-harm chooses the threshold; give only one of --max-harm and --threshold.")


class Export(AbstentionOptions):
    """Write a verified ONNX bundle of a checkpoint."""

    checkpoint: str = argument("a checkpoint, or the folder of a run (its best.ckpt)")
    name: str | None = option(None, "name of the bundle, which is written to FOLDER/NAME; by default the run's name")
    force: bool = option(False, "replace an existing bundle")
    data: str | None = option(None, DATA, "YAML")
    outputs: Sequence[Literal["theta", "warped", "votes", "confidence", "logits", "features"]] = option(
        (),
        "outputs of the graph beside the probabilities: parameters, output image, votes and confidence of each "
        "spatial transformer, logits, input of the head",
    )
    wandb: Literal["offline", "online", "off"] | None = option(
        None, "record the bundle in Weights & Biases; by default offline if its run is tracked, else off"
    )
    precision: Sequence[Literal["fp32", "fp16", "int8"]] = option(
        (), "further models in float16 or 8 bits, which must keep their accuracy; fp32 is always written"
    )
    max_drop: float = option(0.5, "largest loss of accuracy on the validation split by a lower precision", "POINTS")
    max_wrong: float = option(
        1.0,
        "percentage of wrong sides on the validation split; sets an orientation model's threshold of confidence",
        "PERCENT",
    )
    full_range: bool = option(False, "use 8 bits, not 7, for int8 weights; for processors with VNNI, AMX or ARM's i8mm")
    opset: int = option(18, "version of ONNX's operators, from 18 (read by most engines) to 25")
    batch: int | None = option(None, "fix the batch size to N images", "N")
    size: tuple[int, int] | None = option(
        None, "fix the size of the images; at the network's own size the graph does not resize", "HxW", type=image_size
    )
    to: str = option("export", "parent folder of the bundle", "FOLDER")
    archive: bool = option(False, "also write the bundle as one file, FOLDER/NAME.upright.zip")
    sign: str | None = option(None, "sign the bundle with this private key, a PEM file; needs the extra `sign`", "KEY")
    safetensors: bool = option(False, "also write the network's weights as FOLDER/NAME.safetensors, for --start_from")
    triton: str | None = option(None, "also write the models with their config into this Triton repository", "FOLDER")


class Attach(AbstentionOptions):
    """Straighten images in front of any ONNX classifier, in one graph.

    The result is a bundle: its graph makes an image upright by the orientation bundle, preprocesses it for the
    classifier, and classifies it. The preprocessing comes from the model, from files beside it (a bundle's manifest,
    `preprocessor_config.json`, `config.json` of timm), and from these options.
    """

    orientation: str = argument(
        "a bundle that estimates the orientation, or its address", "UPRIGHT_BUNDLE", address=True
    )
    model: str = argument("an ONNX classifier with an image as its only input", "MODEL.onnx")
    to: str = option("export/attached", "folder of the new bundle", "NEW")
    force: bool = option(False, "replace an existing bundle")
    images: str | None = option(
        None,
        "images for the comparison, in a folder per class to measure harm and gain; by default the bundle's samples",
        "FOLDER",
    )
    classes: str | None = option(
        None, "names of the classes, one per line; by default from the metadata, or numbers", "FILE"
    )
    output: str | None = option(None, "output with one score per class, if there are several", "NAME")
    scores: Literal["logits", "probabilities"] | None = option(
        None, "kind of the scores; by default probabilities if they sum to 1 on all images"
    )
    size: tuple[int, int] | None = option(None, "size of the classifier's input", "HxW", type=image_size)
    resize: Literal["stretch", "crop", "pad"] | None = option(None, "rule for images of another aspect")
    crop: float | None = option(
        None, "side of the centre that remains of the resized image, like 0.875", "SHARE", above=0
    )
    range: Literal["unit", "byte", "signed"] | None = option(
        None, "values of the input before mean and std: 0 to 1, 0 to 255, or -1 to 1; unit if a mean is given"
    )
    mean: Sequence[float] | None = option(None, "mean per channel of the classifier's data, in this range", "X")
    std: Sequence[float] | None = option(None, "standard deviation per channel, in this range", "X", above=0)
    channels: Literal["rgb", "bgr"] | None = option(None, "order of the colours; by default rgb")
    layout: Literal["nchw", "nhwc"] | None = option(None, "order of the axes, if the shape of the input is not fixed")
    threshold: float | None = option(
        None,
        "smallest confidence; below it, the image passes unchanged; by default that of the orientation bundle",
        "C",
        minimum=0,
    )
    min_angle: float = option(1.0, "smallest angle; below it, the image passes unchanged", "DEGREES", minimum=0)
    padding: Literal["zeros", "border", "reflection"] = option("reflection", "values beyond the border of the image")
    straightened: bool = option(False, "also return the images that the classifier gets, as output straightened")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop is not None and self.crop > 1:
            raise UserError(f"--crop must be at most 1, the complete image; got {self.crop:g}.")

    sign: str | None = option(None, "sign the bundle with this private key, a PEM file; needs the extra `sign`", "KEY")


class Verify(BundleOptions):
    """Check a bundle on this machine."""

    engine: Engine = option("onnxruntime", "also check the predictions of this engine")
    speed: bool = option(False, "also compare the speed on one thread with that of the export")
    speed_factor: float = option(1.5, "warn with --speed if a batch takes FACTOR times as long", "FACTOR", above=1)


class Infer(ModelOptions):
    """Classify images with a bundle, or estimate their orientation."""

    images: Sequence[str] = argument(PATHS, "IMAGE")
    format: Literal["table", "jsonl", "csv"] = option("table", "output format")
    top: int | None = option(None, "number of most probable classes per image; by default 1; only for classifiers", "K")
    outputs: Sequence[str] = option(
        (), "further outputs of the graph, such as theta; for --format jsonl or --npz", "NAME"
    )
    npz: str | None = option(None, "also write paths and the main and further outputs to this file of NumPy", "FILE")
    threads: int | None = option(None, "threads per run; by default as many as there are cores", "N")
    engine: Engine = option("onnxruntime", ENGINE)
    providers: Sequence[str] = option(("cpu",), PROVIDERS, "NAME")
    max_pixels: int = option(64_000_000, "limit for one image; larger images are refused", "N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outputs and self.format != "jsonl" and self.npz is None:
            raise UserError(f"--outputs needs --format jsonl or --npz FILE, got --format {self.format}.")
        if self.npz is not None and not self.npz.endswith(".npz"):
            raise UserError(f"--npz must be a file whose name ends in .npz, got '{self.npz}'.")


class Straighten(ModelOptions):
    """Write upright copies of images.

    The bundle must estimate the orientation. The sources are never changed. Multiples of 90 degrees are lossless. An
    image that is upright, unreadable or below the threshold is copied byte for byte. FOLDER/straighten.csv lists all
    images; after an interruption, the same command resumes.
    """

    inputs: Sequence[str] = argument(PATHS, "INPUT")
    to: str = option(MISSING, "folder of the copies, outside of all inputs", "FOLDER")
    dry_run: bool = option(False, "write only the CSV")
    threshold: float | None = option(
        None, "lowest confidence to rotate an image, from 0 to 1; by default the bundle's", "T", minimum=0, maximum=1
    )
    turns: Literal["any", "4"] = option("any", "rotate by any angle, or only by the nearest multiple of 90 degrees")
    min_angle: float = option(
        5,
        "rotate by multiples of 90 degrees, without loss, if one is nearer than this",
        "DEGREES",
        minimum=0,
        maximum=45,
    )
    fit: Literal["crop", "pad"] = option("crop", "other angles: cut off the empty corners, or fill them")
    background: str = option("white", "colour of the corners with --fit pad, a name or #rrggbb", "COLOUR")
    quality: int | None = option(
        None,
        "quality of resampled JPEG and WebP, 1 to 100; by default JPEG has the tables of its source",
        "Q",
        minimum=1,
        maximum=100,
    )
    force: bool = option(False, "start from scratch, and replace existing files in FOLDER")
    threads: int = option(0, "images at a time; 0 for as many as there are cores", "N", minimum=0)
    max_pixels: int = option(64_000_000, "limit for one image; a larger one is copied as an error", "N", minimum=1)


class Benchmark(BundleOptions):
    """Measure how fast a bundle is on this machine."""

    checkpoint: str | None = option(None, "the bundle's checkpoint or run; adds PyTorch, eager and compiled", "CKPT")
    engine: Engine | None = option(
        None, "measure only this engine, and fp32 in ONNX Runtime; by default all that are installed"
    )
    batches: Sequence[int] | None = option(None, "batch sizes; by default 1 8 64, or the bundle's own", "B", minimum=1)
    threads: Sequence[int] = option((1,), "threads per run, each a part of the table", "N", minimum=1)
    to: str | None = option(None, "also write benchmark.md, benchmark.json and benchmark.png to this folder", "FOLDER")


class Serve(ModelOptions):
    """Classify images over HTTP, or estimate their orientation.

    POST /v1/classify (/v1/labels for several classes per image, /v1/orientation without classes); and the Open
    Inference Protocol (/v2). /docs describes both, /metrics is for Prometheus. Put a reverse proxy in front for
    authentication, TLS and routing.
    """

    name: str | None = option(None, "name of the model in routes and answers; by default that of the folder")
    model_version: str | None = option(None, "version of the model; by default 12 digits of the bundle's hash", "NAME")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 chooses a free one and logs it")
    workers: int = option(1, "processes behind the port, each with the bundle and limits of its own", "N", minimum=1)
    threads: int = option(0, "threads per run; 0 for the cores, divided by the workers", "N", minimum=0)
    engine: Engine = option("onnxruntime", ENGINE)
    providers: Sequence[str] = option(("cpu",), PROVIDERS, "NAME")
    decoders: int = option(0, "threads that decode images; 0 for the cores, divided by the workers", "N", minimum=0)
    max_batch: int = option(64, "images per run of the model", "N", minimum=1)
    max_delay_ms: float = option(5, "longest wait of an image for others, in milliseconds", "MS", minimum=0)
    max_queue: int = option(256, "images in the queue; when it is full, requests get a 429", "N", minimum=1)
    max_body_mb: float = option(16, "limit for one request, in megabytes", "MB", above=0)
    max_pixels: int = option(16_000_000, "limit for one image, in pixels", "N", minimum=1)
    pixel_budget: int = option(32_000_000, "limit for all images in memory, in pixels; others wait", "N", minimum=1)
    timeout_s: float = option(30, "limit from a request to its response, in seconds", "S", above=0)
    grace_s: float = option(1, "time from a stop signal until idle connections are closed, in seconds", "S", minimum=0)
    root_path: str = option("", "path that a proxy removes from the address, for example /digits", "PATH")
    proxies: Sequence[str] = option((), "proxies whose X-Forwarded-For is the client in the log; * for all", "ADDRESS")
    cors: Sequence[str] = option(
        (), "origins of web pages that may send requests, for example https://example.org; * for all", "ORIGIN"
    )
    quiet: bool = option(False, "do not log requests")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_budget < self.max_pixels:
            raise UserError(
                f"--pixel-budget must be at least --max-pixels ({self.max_pixels}), got {self.pixel_budget}."
            )
        for flag, value in (("--name", self.name), ("--model-version", self.model_version)):
            if value is not None and not re.fullmatch(r"[\w.-]+", value, re.ASCII):
                raise UserError(f"{flag} must consist of letters, digits, '_', '-' and '.', got '{value}'.")
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path, re.ASCII):
            raise UserError(f"--root-path must be like /digits, without a slash at its end, got '{self.root_path}'.")


class Web(ModelOptions):
    """Write a web page that runs a bundle in the browser."""

    to: str = option("web", "parent folder of the page's folder", "FOLDER")
    runtime: str | None = option(
        None,
        "onnxruntime-web: its folder, its package, or a mirror's address; by default downloaded once",
        "PATH_OR_URL",
    )
    one_file: bool = option(False, "write a single HTML file that needs no web server; it is a third larger")


class Sweep(Options):
    """Search over options of fit."""

    space: str = argument("the search space, for example configs/sweeps/lenet_sweep.yaml", "SPACE.yaml")
    trials: int | None = option(None, "total number of trials; by default the one in SPACE.yaml", "N")
    name: str | None = option(None, "name of the sweep, the folder checkpoints/NAME; by default that of SPACE.yaml")
    options: Sequence[str] = option((), "options of `upright fit`", after="upright fit")


class Select(Options):
    """Estimate the accuracy of the best of several runs."""

    runs: Sequence[str] = argument("folders of runs, or of a sweep", "RUNS_OR_SWEEP")
    to: str | None = option(None, "folder of selection.md, .json and .png; by default that of the sweep", "FOLDER")
    data: str | None = option(None, DATA, "YAML")


class Report(Options):
    """Compare models on one page."""

    models: Sequence[str] = argument(
        "checkpoints, runs or bundles; the first one is compared with the others", "CKPT_OR_BUNDLE", address=True
    )
    data: str | None = option(None, "a YAML of data to evaluate on, instead of the first model's own", "YAML")
    split: Literal["test", "val"] = option("test", "split to evaluate on")
    images: int = option(500, "number of images to distort for the invariance curves", "N")
    precision: Sequence[Literal["fp32", "fp16", "int8"]] = option(("fp32",), "models of a bundle, one row each")
    vector: Literal["pdf", "svg"] | None = option(None, "also write the plots in this format, for print")
    to: str | None = option(None, "folder of the report; by default checkpoints/report-NAME", "FOLDER")
    force: bool = option(False, "replace an existing report")


class Study(Options):
    """Test a textbook claim by experiment."""

    study: str | None = option(None, "name of the study; without a name, all studies are listed", positional=True)
    seeds: int = option(3, "runs per variant")
    quick: bool = option(False, "use scikit-learn's digits; this takes seconds and only checks that the study runs")
    full: bool = option(False, "run the study at its larger scale, if it has one; this takes more than half an hour")


class Demo(Options):
    """Train, test, export, verify and classify once, on real digits."""

    name: str = option("demo", "name of the run and of the bundle; existing ones are replaced")


class Fit(Options):
    """Train a run in its own folder, or resume it."""

    config: str | None = option(None, "the experiment; several files are merged, the last one wins", "YAML")
    name: str | None = option(None, "name of the run; by default the names of the configs, joined by hyphens")
    force: bool = option(False, "replace an existing run of this name")
    ckpt_path: str | None = option(
        None, "checkpoint to resume from: a file, `last`, `best`, or `auto`: `last` if it exists, else a new run"
    )
    start_from: str | None = option(
        None, "weights to start with: an Upright checkpoint or run, or a state dict of any network (.pth, .safetensors)"
    )
    allow_seen_images: bool = option(False, "accept validation and test images that the weights were trained on")
    monitor: str = option("val/loss", "the metric of validation that chooses best.ckpt")
    mode: Literal["min", "max"] | None = option(None, "the best value of the monitor; needed if it is not val/loss")
    wandb: Literal["offline", "online", "off"] = option(
        "offline", "log to Weights & Biases: on this disk (`wandb sync` uploads it later), on its server, or not at all"
    )
    tensorboard: bool = option(False, "also log to TensorBoard, in the folder of the run")
    mlflow: bool = option(False, "also log to MLflow, at $MLFLOW_TRACKING_URI or in ./mlflow.db")
    save_every_n_steps: int = option(0, "also write last.ckpt after every N steps of an epoch; 0 turns this off")
    log_grad_norm: bool = option(False, "log the mean and the maximum of the gradient norm per epoch")
    compile: bool = option(False, "use torch.compile; the first step then takes a minute or two")


class Validate(Options):
    """Compute the metrics of a checkpoint on the validation split."""

    config: str | None = option(None, "further options", "YAML")
    ckpt_path: str | None = option(None, "a checkpoint, or the folder of a run (its best.ckpt)")
    allow_seen_images: bool = option(False, "evaluate on images that the model was trained on, too")


class Test(Validate):
    """Compute the metrics of a checkpoint on the test split, with tables and plots."""


class Predict(Validate):
    """Write the probabilities of every image of the test split."""

    output: str | None = option(None, "CSV to write; by default predictions.csv beside the checkpoint", "CSV")


LIGHTNING: dict[str, type[Options]] = {"fit": Fit, "validate": Validate, "test": Test, "predict": Predict}
"""Upright's own options of the commands that LightningCLI parses. LightningCLI adds options of data, model, trainer."""

LIGHTNING_EPILOG = """\
every key of the YAML is an option, for example:
  --data YAML                         other data, for example configs/data/folder.yaml
  --data.batch_size 32                an argument of the data
  --model.optimizer.init_args.lr 0.01 an argument of a part of the model (fit)
  --trainer.max_epochs 5              an argument of Lightning's Trainer
  --print_config                      print the whole experiment, with all defaults

  --help_all                          print every option, with all options of Lightning's Trainer
  --data.help CLASS                   print the options of a class; also --model.help (fit)"""
