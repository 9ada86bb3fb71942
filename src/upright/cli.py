"""The command line. It imports a command's module only when the command runs, so `--help` is fast."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

from upright import options
from upright.errors import UprightError, UserError, nearest


class Command(NamedTuple):
    """A command that LightningCLI does not parse."""

    options: type[options.Options]  # class of its options; the docstring of this class is the help
    function: str  # `module:function`; the function takes the options object, and returns the exit code
    is_library: bool = False  # takes a keyword per option; a file may name classes in the working directory


COMMANDS = {
    "new": Command(options.New, "upright.new:new"),
    "configs": Command(options.Configs, "upright.examples:configs"),
    "describe": Command(options.Describe, "upright.describe:run", True),
    "preview": Command(options.Preview, "upright.preview:preview", True),
    "export": Command(options.Export, "upright.exporting.export:export", True),
    "attach": Command(options.Attach, "upright.exporting.attach:attach"),
    "verify": Command(options.Verify, "upright.runtime.verify:verify"),
    "infer": Command(options.Infer, "upright.runtime.infer:infer"),
    "straighten": Command(options.Straighten, "upright.runtime.straighten:straighten"),
    "benchmark": Command(options.Benchmark, "upright.runtime.benchmark:benchmark"),
    "serve": Command(options.Serve, "upright.runtime.serving.server:serve"),
    "web": Command(options.Web, "upright.runtime.web:web"),
    "sweep": Command(options.Sweep, "upright.evidence.selecting.sweep:sweep_and_select", True),
    "select": Command(options.Select, "upright.evidence.selecting.selection:select", True),
    "report": Command(options.Report, "upright.evidence.reporting.report:report", True),
    "study": Command(options.Study, "upright.evidence.study:study", True),
    "demo": Command(options.Demo, "upright.demo:demo", True),
}
EXTRAS = {"optuna": "sweep", **dict.fromkeys(("msgspec", "prometheus_client", "starlette", "uvicorn"), "serve")}
"""The extra that installs a package. The extra ``train`` installs all other packages."""


def _overview() -> str:
    kinds = options.LIGHTNING | {name: command.options for name, command in COMMANDS.items()}
    summaries = {name: (kind.__doc__ or "").partition("\n")[0].rstrip(".") for name, kind in kinds.items()}
    return (
        "usage: upright COMMAND ...\n\nFrom images to a verified ONNX bundle.\n\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in summaries.items())
        + "\n\n`upright COMMAND --help` lists its options. To start: upright new my-project"
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
    command = COMMANDS.get(name)
    if command is None and name not in options.LIGHTNING:
        allowed = [*options.LIGHTNING, *COMMANDS]
        raise UserError(f"unknown command '{name}'.{nearest(name, allowed)} Commands: {', '.join(allowed)}.")
    if command is None and {"-h", "--help"} & set(rest):
        print(options.lightning_help(name))
        return 0
    parsed = command and _download(options.parse(name, command.options, rest))
    # A console script cannot import from the working directory. The path must be absolute, because the parser of
    # Lightning's commands changes the working directory while it reads a config.
    if (command is None or command.is_library) and (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    if command is None:
        return int(_load("upright.runs.cli.run:run")(name, rest) or 0)
    function = _load(command.function)
    return int((function(**vars(parsed)) if command.is_library else function(parsed)) or 0)


def _download(parsed: options.Options) -> options.Options:
    """Replace addresses of bundles by the paths of their downloads."""
    sha256 = getattr(parsed, "sha256", None)
    for each in fields(parsed):
        value = getattr(parsed, each.name)
        if each.metadata.get("address") and (sha256 or "://" in str(value)):
            from upright.runtime.address import local_bundle

            local = local_bundle(value, sha256) if isinstance(value, str) else [local_bundle(path) for path in value]
            parsed = replace(parsed, **{each.name: local})
    return parsed


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "upright":
            raise
        extra = EXTRAS.get(package, "train")
        raise UserError(f"This command needs the package '{package}': pip install 'upright[{extra}]'.") from error
    return function


def main(arguments: list[str] | None = None) -> int:
    """Run a command of this command line, or of that of the process, and return the exit code.

    It is 0, 2 for a mistake of the user, 1 for any other error, 130 after Ctrl-C.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except UprightError as error:
        print(f"upright: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader has closed the pipe. Python would fail again when it flushes standard output at exit.
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
