"""``upright completion``: what a shell needs to complete verbs, options, class names and files."""

import argparse
from collections.abc import Iterator
from typing import Any

import shtab

from upright.cli import LIGHTNING, VERBS
from upright.runs.cli.schema import ConfigSchema, parser_of

DEPTH = 3
"""How many classes deep options are completed: ``--model.network.init_args.transformer.init_args.transform`` is two."""


def completion(shell: str) -> int:
    """Print the script of a shell.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.
    """
    print(shtab.complete(_parser(), shell))
    return 0


def _parser() -> argparse.ArgumentParser:
    """All verbs in one parser, for reading only."""
    parser = argparse.ArgumentParser(prog="upright")
    verbs = parser.add_subparsers()
    for name, verb in VERBS.items():
        verb.arguments(verbs.add_parser(name, help=verb.help))
    for name, text in LIGHTNING.items():
        own, lightnings = verbs.add_parser(name, help=text), parser_of(name)
        schema = ConfigSchema().generate(lightnings)
        flags = {action.dest: action.option_strings for action in lightnings._actions if action.nargs == 0}
        flags["print_config"] = ["--print_config"]
        own.add_argument("--config", "-c")
        for strings in flags.values():
            if "--help" not in strings:
                own.add_argument(*strings, action="store_true")
        for option, choices in dict(_options(schema, schema["$defs"])).items():
            if option.removeprefix("--") not in flags:
                own.add_argument(option, choices=choices or None)
    for each in verbs.choices.values():
        for action in each._actions:
            if action.nargs != 0 and not action.choices:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  # as shtab reads it
    return parser


def _options(schema: dict[str, Any], defs: dict[str, Any], prefix: str = "--") -> Iterator[tuple[str, list[str]]]:
    """Every option that a schema has, with the values it may take where they are few."""
    for key, place in schema.get("properties", {}).items():
        if key.startswith("$"):
            continue
        forms = [_resolved(form, defs) for form in place.get("anyOf", [place])]
        forms = [inner for form in forms for inner in form.get("anyOf", [form])]
        if "properties" in place:
            yield from _options(place, defs, f"{prefix}{key}.")
            continue
        classes = [form for form in forms if "class_path" in form.get("properties", {})]
        values = [str(value) for form in forms for value in form.get("enum", [])]
        values += [form["properties"]["class_path"]["const"] for form in classes if _named(form)]
        if any(form.get("type") == "boolean" for form in forms):
            values += ["true", "false"]
        yield f"{prefix}{key}", values
        if prefix.count("init_args") < DEPTH:
            for form in classes:
                yield from _options(form["properties"]["init_args"], defs, f"{prefix}{key}.init_args.")


def _resolved(form: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defs[form["$ref"].rpartition("/")[2]] if "$ref" in form else form
    return found


def _named(form: dict[str, Any]) -> bool:
    return "const" in form["properties"]["class_path"]
