"""The script completes what a user types, in a real bash."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

ASK = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_upright upright "${{COMP_WORDS[$COMP_CWORD]}}" "${{COMP_WORDS[$((COMP_CWORD - 1))]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from contextlib import redirect_stdout

    from upright.completion import completion

    path = tmp_path_factory.mktemp("completion") / "upright.bash"
    with open(path, "w") as file, redirect_stdout(file):
        assert completion("bash") == 0
    return path


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    "words, found",
    [
        ("upright ex", {"export"}),
        ("upright fit --trainer.max_ep", {"--trainer.max_epochs"}),
        ("upright fit --force", {"--force"}),
        ("upright fit --no-c", {"--no-cache"}),
        ("upright fit --wandb of", {"off", "offline"}),
        ("upright fit --config configs/stn_l", {"configs/stn_lenet.yaml"}),
        ("upright fit --model.network.init_args.dept", {"--model.network.init_args.depth"}),
        ("upright fit --model.network upright.architectures.leN", set()),
        ("upright fit --model.network upright.architectures.len", {"upright.architectures.lenet.LeNet"}),
        ("upright test --data.init_args.fol", {"--data.init_args.fold", "--data.init_args.folds"}),
        ("upright infer exp", {"export"}),
        ("upright export x --outputs w", {"warped"}),
    ],
)
def test_what_a_user_types_is_completed(script: Path, words: str, found: set[str]) -> None:
    program = ASK.format(script=script, words=words)
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == found, done.stderr
