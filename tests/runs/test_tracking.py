import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.training.wandb_record import read_records
from upright.runs.tracking import bundle_mode

STN = ROOT / "configs/stn_lenet.yaml"
PROGRAM = """
import sys
from upright.cli import main

quick = ["--trainer.limit_train_batches", "2"]
config = sys.argv[1]
assert main(["fit", "--config", config, "--name", "run", "--trainer.max_epochs", "2", "--log_grad_norm", *quick]) == 0
assert main(["fit", "--name", "run", "--ckpt_path", "last", "--trainer.max_epochs", "3", *quick]) == 0
assert main(["export", "checkpoints/run"]) == 0
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train, resume and export a run with the default options, and return its working directory."""
    folder = tmp_path_factory.mktemp("tracked")
    home = {"HOME": str(folder / "home"), "XDG_DATA_HOME": "", "XDG_CACHE_HOME": ""}

    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(STN)],
        cwd=folder,
        env=os.environ | home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def records(tracked: Path) -> list[dict[str, Any]]:
    return read_records(tracked / "checkpoints/run")


def test_offline_is_the_default_and_asks_nothing(tracked: Path, records: list[dict[str, Any]]) -> None:
    """`tracked` has no option and no stdin, and every command of it wrote an offline record."""
    assert [record["path"].parent.name.startswith("offline-run-") for record in records] == [True] * 3


def test_a_resumed_run_keeps_its_id(tracked: Path, records: list[dict[str, Any]]) -> None:
    first, second, _ = records
    run_id = torch.load(tracked / "checkpoints/run/last.ckpt", weights_only=True)["upright"]["run"]["id"]
    assert first["run"].run_id == second["run"].run_id == run_id
    steps = [[row["_step"] for row in record["history"]] for record in (first, second)]
    assert steps == [[1, 3], [5]]
    assert [row["epoch"] for record in (first, second) for row in record["history"]] == [0, 1, 2]


def test_all_metrics_are_logged(tracked: Path, records: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader((tracked / "checkpoints/run/metrics.csv").read_text().splitlines()))
    logged = [row for record in records[:2] for row in record["history"]]
    names = set(rows[0]) - {"step"}
    assert {"lr", "lr/1", "images_per_second", "grad_norm/mean", "grad_norm/max", "val/uprightness"} <= names
    for row, entry in zip(rows, logged, strict=True):
        assert {name: entry[name] for name in names} == pytest.approx(
            {name: float(row[name]) for name in names}, rel=1e-4
        )
        assert entry["grad_norm/max"] >= entry["grad_norm/mean"] > 0


def test_the_complete_config_is_logged(tracked: Path, records: list[dict[str, Any]]) -> None:
    ours = torch.load(tracked / "checkpoints/run/last.ckpt", weights_only=True)["upright"]
    for record in records[:2]:
        config = record["config"]
        assert config["split_digest"] == ours["split"]["digest"] and config["git_commit"] == ours["git_commit"]
        assert config["model"]["prior_weight"] == 0.0 and config["data"]["init_args"]["batch_size"] == 64
        # The resumed run has the same option.
        assert config["log_grad_norm"] is True


def test_plots_are_in_the_record(records: list[dict[str, Any]]) -> None:
    for record in records[:2]:
        for row in record["history"]:
            for name in ("samples", "mistakes", "confusion", "transformer"):
                (file,) = row[f"val/{name}/filenames"]
                with Image.open(record["path"].parent / "files" / file) as plot:
                    assert plot.size == (row[f"val/{name}/width"], row[f"val/{name}/height"])


def test_lineage(tracked: Path, records: list[dict[str, Any]]) -> None:
    first, second, export = records
    for record in (first, second):
        used, *others = record["artifacts"]
        # `wandb sync` turns these fields into the effect of `use_artifact` online.
        assert (used.name, used.type) == ("split-Digits", "split") and used.use_after_commit and used.user_created
        assert {alias for one in others for alias in one.aliases} == {"best", "last", "latest"}
        assert all(one.type == "model" and not one.use_after_commit and not one.user_created for one in others)
    assert second["artifacts"][0].digest == first["artifacts"][0].digest
    used, bundle = export["artifacts"]
    assert export["run"].job_type == "export" and used.use_after_commit and used.user_created
    exported = next(one for one in second["artifacts"] if "best" in one.aliases)
    assert (used.name, used.digest) == (exported.name, exported.digest)
    assert (bundle.name, bundle.type, bundle.use_after_commit) == ("bundle-run", "bundle", False)
    assert {"model.onnx", "manifest.json", "SHA256SUMS", "samples/00.png"} <= {
        one.path for one in bundle.manifest.contents
    }
    metadata = json.loads(exported.metadata)
    best_checkpoint = torch.load(tracked / "checkpoints/run/best.ckpt", weights_only=True)
    assert metadata["epoch"] == best_checkpoint["epoch"] + 1 and metadata["spec"]["height"] == 28
    assert metadata["metrics"] == pytest.approx(best_checkpoint["upright"]["metrics"])


def test_files_in_the_record_are_links(tracked: Path, records: list[dict[str, Any]]) -> None:
    for record in records:
        for artifact in record["artifacts"]:
            for entry in artifact.manifest.contents:
                path = Path(entry.local_path)
                assert path.is_relative_to(record["path"].parent / "artifacts") and path.stat().st_size == entry.size
                assert entry.skip_cache
    # The entry is a hard link to the run's file, so it survives if the run replaces the file.
    linked = Path(records[2]["artifacts"][0].manifest.contents[0].local_path)
    assert linked.samefile(tracked / "checkpoints/run/best.ckpt")
    shares = Path(records[2]["artifacts"][1].manifest.contents[0].local_path)
    assert any(shares.samefile(file) for file in (tracked / "export/run").rglob("*") if file.is_file())
    assert not list(tracked.glob("home/**/artifacts")) and not list(tracked.glob("home/**/staging"))


def test_plots_are_on_disk_without_wandb(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ("fit", "--config", STN, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    assert upright(*fit, "--name", "off", "--wandb", "off").code == 0
    monkeypatch.setattr("upright.runs.tracking.find_spec", lambda name: None)
    answer = upright(*fit, "--name", "absent")
    assert answer.code == 0 and "wandb is not installed" in answer.out
    for name in ("off", "absent"):
        folder = tmp_path / "checkpoints" / name
        plots = {path.stem for path in folder.glob("*.png")}
        assert (
            plots == {"samples", "mistakes", "confusion", "transformer", "curves"} and not (folder / "wandb").exists()
        )


def test_export_is_tracked_if_the_run_is(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "best.ckpt"
    assert bundle_mode(None, checkpoint) == "off"
    (tmp_path / "wandb").mkdir()
    assert bundle_mode(None, checkpoint) == "offline" and bundle_mode("off", checkpoint) == "off"
    monkeypatch.setattr("upright.runs.tracking.find_spec", lambda name: None)
    assert bundle_mode(None, checkpoint) == "off"
    checkpoint.touch()
    answer = upright("export", checkpoint, "--wandb", "online")
    assert answer.code == 2 and "needs the package wandb" in answer.err
