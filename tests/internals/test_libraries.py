"""These tests fail when lightning, wandb or kornia change a private name that src/upright/internals uses."""

import inspect
from pathlib import Path

import lightning as L
import pytest
import wandb
from kornia import augmentation
from lightning.pytorch.loggers import WandbLogger

from tests.conftest import ROOT
from upright.internals.kornia import has_part

INTERNALS = ROOT / "src/upright/internals"


def test_lightning() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert inspect.signature(trainer.fit_loop._should_accumulate).return_annotation in (bool, "bool")


def test_wandb() -> None:
    parameters = inspect.signature(wandb.Run._log_artifact).parameters
    assert {"is_user_created", "use_after_commit"} <= set(parameters)


def test_lightnings_logger_of_wandb(tmp_path: Path) -> None:
    # When Lightning no longer passes it, delete `without_anonymous`.
    assert "anonymous" in WandbLogger(save_dir=tmp_path, offline=True)._wandb_init


@pytest.mark.parametrize("kind", ["geometric", "mix"])
def test_kornia(kind: str) -> None:
    module = augmentation.RandomAffine(10.0) if kind == "geometric" else augmentation.RandomMixUpV2()
    assert has_part(module, kind) and not has_part(augmentation.ColorJitter(), kind)


@pytest.mark.parametrize("path", sorted((ROOT / "src/upright").rglob("*.py")), ids=lambda path: path.name)
def test_private_names_are_used_nowhere_else(path: Path) -> None:
    # ruff's rule SLF reports private names; only these modules may silence it.
    assert path.parent == INTERNALS or "noqa: SLF" not in path.read_text()
