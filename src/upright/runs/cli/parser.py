"""Lightning's parser, with errors of one line."""

import importlib
import pkgutil
import re
from argparse import SUPPRESS
from collections.abc import Iterable
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from upright.errors import UprightError, UserError, nearest


class OneLineParser(LightningArgumentParser):
    """Report an error in one line, instead of fifty lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` with the innermost reason, after the key that it belongs to."""
        key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        inner = user_error(ex)
        # jsonargparse hides options that only work with other packages or are gone.
        options = [name for name, action in self._option_string_actions.items() if action.help != SUPPRESS]
        reason = str(inner) if inner else explain(message, options)
        raise UserError(f"{key}: {reason}" if key and not reason.startswith(key) else reason) from None


def user_error(error: BaseException | None) -> UprightError | None:
    """Return the `UprightError` inside the exceptions that jsonargparse wrapped around it; None if there is none."""
    while error and not isinstance(error, UprightError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, UprightError) else None


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Return jsonargparse's report ``message`` as one line: the input, the allowed values, and the nearest name."""
    names = sorted(option[2:] for option in options if re.fullmatch(r"--.*(?<!help)(?<!\+)", option))
    # The whole command has some seventy options; a class has a few.
    allowed = f"Allowed: {', '.join(names)}." if len(names) < 30 else "`--help` shows all."
    if match := re.search(r"arguments are required: (.+)", message):
        return f"missing, without a default: {match[1]}. {allowed}"
    if match := re.search(r"unrecognized arguments: --([^\s=]+)", message):
        hint = nearest(match[1], names) or nearest(match[1].partition(".")[0], names)
        return f"unknown option '--{match[1]}'.{hint} `--help` shows all."
    if match := re.search(r"unrecognized arguments: (.*)", message):
        return f"'{match[1]}' belongs to no option; options begin with --."
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        hint = nearest(match[1], names) or nearest(match[1].partition(".")[0], names)
        return f"unknown option '{match[1]}'.{hint} {allowed}"
    if match := re.search(r"does not accept option '([^']+)'|Key '([^']+)' is not expected", message):
        key = match[1] or match[2]
        # The report has `model.netwrk.class_path` in full; the parser's options end at `model.network`.
        level = key.count(".") + 1
        keys = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, level)}
        return f"unknown key '{key}'.{nearest(key, keys)}"
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        module = importlib.import_module(match[1])
        names_in_module = [name for name, value in vars(module).items() if isinstance(value, type)]
        names_in_module += [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
        return f"module '{match[1]}' has no '{match[2]}'.{nearest(match[2], names_in_module)}"
    if match := re.search(r"Expected '([^']+)' to be a function that returns <class '(\w+)'>", message):
        return f"'{match[1]}' is a function that is not annotated to return a {match[2]}: annotate it, or give a class."
    if match := re.search(r"\S+ requires .+[Ii]nstall.*", message):
        return match[0]
    if match := re.search(r"No module named '([^']+)'", message):
        return f"no module named '{match[1]}'. Is the file in the working directory, or the package installed?"
    if expected := dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", message)):
        kinds = " or ".join(
            re.sub(r"<class '(.+)'>|typing\.Literal\[(.+)\]|, but got .*", r"\1\2", kind) for kind in expected
        )
        value = re.search(r"(?:Got|Given) value: (.+)", message)
        suffix = f", got {value[1][:200]}" if value else ""
        # YAML's names of the types.
        for python, yaml in {
            "NoneType": "null",
            "collections.abc.Sequence": "list",
            "collections.abc.Iterable": "list",
            "tuple": "list",
        }.items():
            kinds = kinds.replace(python, yaml)
        return f"expected {kinds}{suffix}"
    return " ".join(re.sub(r'Parser key "[^"]+":', "", message).split())[:400]
