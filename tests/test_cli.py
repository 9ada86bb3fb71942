import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright
from upright.cli import COMMANDS
from upright.options import LIGHTNING


def test_the_overview_names_every_command(upright: Upright) -> None:
    for arguments in ((), ("--help",)):
        answer = upright(*arguments)
        assert answer.code == 0 and all(f"\n  {command} " in answer.out for command in [*LIGHTNING, *COMMANDS])


@pytest.mark.parametrize("command", LIGHTNING)
def test_the_help_of_lightning_commands_is_short(upright: Upright, command: str) -> None:
    short = upright(command, "--help")
    assert short.code == 0 and "--ckpt_path" in short.out and len(short.out.splitlines()) < 60
    with pytest.raises(SystemExit) as exit_:
        upright(command, "--help_all")
    assert exit_.value.code == 0


def test_version(upright: Upright) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert upright("--version").out == f"upright {version}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exprot",), "unknown command 'exprot'. Did you mean 'export'? Commands: fit, validate"),
        (("export",), "export: the following arguments are required: checkpoint"),
        (("export", "x", "--forse"), "unrecognized arguments: --forse. Did you mean '--force'?"),
        (("export", "nope"), "Checkpoint 'nope' does not exist"),
        (("export", "x", "--name", "../y"), "--name '../y' must be a plain folder name"),
        (("export", "x", "--max-harm", "nan"), "--max-harm must be above 0, got nan"),
        (("export", "x", "--threshold", "nan"), "--threshold must be"),
        (("infer", "nope", "x.png"), "'nope' is not a bundle"),
        (("infer", "b", "x.png", "--format", "xml"), "invalid choice: 'xml'"),
        (("study", "uprightnes"), "There is no study 'uprightnes'. Did you mean 'uprightness'?"),
        (("study", "uprightness", "--seeds", "1"), "--seeds must be at least 2 to show a spread, got 1"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_no_files(
    upright: Upright, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    answer = upright(*arguments)
    assert answer.code == 2 and message in answer.err
    assert answer.err.startswith("upright: error: ") and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
