"""Presets: YAMLs that go after the config of an experiment."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import CONFIGS, ROOT, Upright

PRESETS = sorted(ROOT.glob("configs/presets/*.yaml"))
LENET, STN = ROOT / "configs/lenet.yaml", ROOT / "configs/stn_lenet.yaml"


def with_preset(name: str, config: Path = LENET) -> tuple[object, ...]:
    return ("fit", "--config", config, "--config", ROOT / f"configs/presets/{name}.yaml")


def parsed(upright: Upright, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        upright(*arguments, "--print_config")
    assert end.value.code == 0
    content: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return content


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_begins_with_its_command(path: Path) -> None:
    command, purpose = path.read_text().splitlines()[:2]
    assert command == f"# upright fit --config configs/lenet.yaml --config configs/presets/{path.name}"
    assert purpose.startswith("# ") and path not in CONFIGS


def contains(whole: Any, part: Any) -> bool:
    """True if the options in ``part`` have their values in ``whole``. The preset may leave ``init_args`` out."""
    if isinstance(part, dict):
        whole = whole | whole.get("init_args", {})
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return bool(whole == part)


@pytest.mark.parametrize("config", [LENET, STN, ROOT / "configs/perceptron.yaml"], ids=lambda path: path.stem)
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_goes_after_any_config(
    path: Path, config: Path, upright: Upright, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, changed = (parsed(upright, capsys, *with_preset(path.stem, config)[:length]) for length in (3, 5))
    network = changed["model"]["init_args"]["network"]
    assert network == plain["model"]["init_args"]["network"]
    preset = yaml.safe_load(path.read_text())
    assert contains(changed, preset) and not contains(plain, preset)


def test_gpu(upright: Upright, capsys: pytest.CaptureFixture[str]) -> None:
    content = parsed(upright, capsys, *with_preset("gpu"))
    trainer = content["trainer"]
    assert (trainer["accelerator"], trainer["devices"], trainer["precision"]) == ("gpu", 1, "bf16-mixed")
    assert content["compile"] is True and trainer["benchmark"] is True


@pytest.mark.slow
def test_overfit_learns_one_batch_by_heart(upright: Upright) -> None:
    answer = upright(*with_preset("overfit"), "--wandb", "off")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader(Path("checkpoints/lenet-overfit/metrics.csv").read_text().splitlines()))
    assert len(rows) == 100 and int(rows[-1]["step"]) == 100
    assert float(rows[0]["train/loss"]) > 2 and float(rows[-1]["train/loss"]) < 0.1


def test_overfit_drops_callbacks_and_augmentation(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 0}}]}\n"
    )
    (*command, preset) = with_preset("overfit", STN)
    answer = upright(*command, "own.yaml", "--config", preset, "--wandb", "off", "--trainer.max_epochs", 2)
    assert answer.code == 0, answer.err
    content = yaml.safe_load(Path("checkpoints/stn_lenet-own-overfit/config.yaml").read_text())
    assert content["trainer"]["callbacks"] is None and content["data"]["init_args"]["augment"] == []


def test_debug_runs_every_step_and_writes_nothing(upright: Upright, tmp_path: Path) -> None:
    for _ in range(2):
        answer = upright(*with_preset("debug", STN))
        assert answer.code == 0 and "every step ran, and nothing was written" in answer.out
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.filterwarnings("ignore:Error detected in MulBackward0")
def test_debug_names_the_operation_that_made_a_nan(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Breaks(nn.Linear):\n"
        "    def __init__(self, input_shape, num_classes):\n"
        "        super().__init__(input_shape[1] * input_shape[2], num_classes)\n\n"
        "    def forward(self, images):\n"
        "        return torch.sqrt(0 * super().forward(images.flatten(1)))\n"
    )
    with pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan values"):
        upright(*with_preset("debug"), "--model.network", "breaks.Breaks")


def test_profile_writes_a_table_into_the_runs_folder(upright: Upright) -> None:
    answer = upright(*with_preset("profile"), "--trainer.limit_train_batches", 2)
    assert answer.code == 0, answer.err
    table = Path("checkpoints/lenet-profile/fit-profile.txt").read_text()
    assert table.startswith("FIT Profiler Report") and "run_training_batch" in table
    assert not Path("checkpoints/lenet-profile/wandb").exists()
