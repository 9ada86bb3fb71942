"""Weights & Biases: by default on the local disk, without a prompt or an account.

Lineage: a run uses a split and produces checkpoints. An export uses a checkpoint and produces a bundle.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from upright.checkpoint import KEY, read_checkpoint
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.files import write_text
from upright.internals.wandb import use_artifact_offline, without_anonymous

if TYPE_CHECKING:
    from wandb import Artifact, Run

PROJECT = "upright"
Mode = Literal["offline", "online", "off"]


class StepLogger(WandbLogger):
    """Lightning's logger, with one row per training step.

    Lightning's own logger leaves the row numbers to W&B. Offline, W&B would count a resumed run from 0 again.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def wandb_logger(mode: Mode, folder: Path, run: Mapping[str, str]) -> Logger | None:
    """Return the logger of a run, or None if W&B is off or not installed.

    Args:
        mode: ``offline`` stores the record in ``folder/wandb``, for ``wandb sync``; ``online`` sends it.
        folder: the folder of the run.
        run: the ``name`` and ``id`` of the run; a resumed run has the same ones.
    """
    if (mode := _available_mode(mode)) == "off":
        return None
    import wandb

    logger = StepLogger(
        project=PROJECT,
        name=run["name"],
        id=run["id"],
        # Absolute, because the writing process may have started in another folder.
        save_dir=folder.resolve(),
        offline=mode == "offline",
        resume="allow" if mode == "online" else None,
        # Lightning sets the mode in the environment, which wandb reads only once per process.
        settings=wandb.Settings(console="off", mode=mode),
    )
    return without_anonymous(logger)


def bundle_mode(mode: Mode | None, checkpoint: Path) -> Mode:
    """Return the mode for `log_bundle`: by default ``offline`` if the checkpoint's run has a record, else ``off``."""
    tracked = (checkpoint.parent / "wandb").is_dir() and find_spec("wandb")
    return _available_mode(mode or ("offline" if tracked else "off"))


def _available_mode(mode: Mode) -> Mode:
    """Return the mode; if wandb is missing, print a message and return ``off``, or refuse ``online``."""
    if mode == "off":
        return mode
    if find_spec("wandb") is None:
        if mode == "online":
            raise UserError("--wandb online needs the package wandb: `pip install wandb`.")
        print("wandb is not installed (`pip install wandb`), so it records nothing; a run has its metrics.csv.")
        return "off"
    if mode == "offline":
        # wandb would print only the path of the record, which the README documents.
        os.environ.setdefault("WANDB_SILENT", "true")
        return mode
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("--wandb online needs an account: `wandb login` once, or set WANDB_API_KEY.")
    return mode


class Artifacts(Callback):
    """Log to W&B the split that a run uses, and at the end the checkpoints in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (run := _run_of(trainer)) and isinstance(data, ImageDataModule):
            manifest = data.manifest
            file = _artifact_file(run, "split.json")
            hashes = {split: part.tolist() for split, part in manifest.hashes.items()}
            write_text(file, json.dumps(manifest.to_dict() | {"hashes": hashes}))
            metadata = {"digest": manifest.digest, "counts": manifest.counts}
            _use(run, _artifact(f"split-{type(data).__name__}", "split", metadata, {"split.json": file}))

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the checkpoints. If both are of the same step, log one artifact with both aliases."""
        if not (run := _run_of(trainer)):
            return
        paths = {name: self.folder / f"{name}.ckpt" for name in ("last", "best")}
        checkpoints = {name: read_checkpoint(path) for name, path in paths.items() if path.is_file()}
        aliases = {name: [name] for name in checkpoints}
        if len({checkpoint["global_step"] for checkpoint in checkpoints.values()}) < len(checkpoints):
            aliases = {"best": ["best", "last"]}
        for name, names in aliases.items():
            run.log_artifact(_checkpoint(run, paths[name], checkpoints[name]), aliases=names)


def log_bundle(mode: Mode, checkpoint: Path, bundle: Path) -> None:
    """Log to W&B, as a run in the group of the training run, which checkpoint a bundle was exported from."""
    if mode == "off":
        return
    import wandb

    content = read_checkpoint(checkpoint)
    training_run = content[KEY]["run"]
    run = wandb.init(
        project=PROJECT,
        name=f"{bundle.name}-export",
        job_type="export",
        group=training_run["id"],
        dir=checkpoint.parent.resolve(),
        mode=mode,
        config={"checkpoint": checkpoint.name, "run": training_run["id"]},
        settings=wandb.Settings(console="off"),
    )
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    files = {str(file.relative_to(bundle)): file for file in sorted(bundle.rglob("*")) if file.is_file()}
    links = {name: _link_or_copy(run, file, f"bundle/{name}") for name, file in files.items()}
    metadata = {name: manifest["provenance"][name] for name in ("run", "split", "metrics")} | {"spec": manifest["spec"]}
    _use(run, _checkpoint(run, checkpoint, content))
    run.log_artifact(_artifact(f"bundle-{bundle.name}", "bundle", metadata, links))
    run.finish()


def _run_of(trainer: L.Trainer) -> "Run | None":
    loggers = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
    logger = next(loggers, None)
    return logger.experiment if logger else None


def _artifact(name: str, kind: str, metadata: Mapping[str, Any], files: Mapping[str, Path]) -> "Artifact":
    from wandb import Artifact

    artifact = Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], kind, metadata=dict(metadata))
    for inside, path in files.items():
        # Without copies: wandb would write them into the user's home and into a cache.
        artifact.add_file(str(path), inside, policy="immutable", skip_cache=True)
    return artifact


def _checkpoint(run: "Run", path: Path, checkpoint: Mapping[str, Any]) -> "Artifact":
    """Return the artifact of a checkpoint. The same content gives the same artifact in every run."""
    contents = checkpoint[KEY]
    metadata = {"epoch": checkpoint["epoch"] + 1, "step": checkpoint["global_step"], "metrics": contents["metrics"]}
    metadata |= {"spec": contents["spec"], "split_digest": contents["split"] and contents["split"]["digest"]}
    return _artifact(
        f"model-{contents['run']['id']}", "model", metadata, {"model.ckpt": _link_or_copy(run, path, path.name)}
    )


def _use(run: "Run", artifact: "Artifact") -> None:
    if run.offline:
        use_artifact_offline(run, artifact)
    else:
        run.use_artifact(artifact)


def _artifact_file(run: "Run", name: str) -> Path:
    """Return the path of a file in the record of ``run``, in a folder that exists."""
    path = Path(run.dir).parent / "artifacts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _link_or_copy(run: "Run", path: Path, name: str) -> Path:
    """Return a hard link to the file in the record of ``run``, or a copy if the file system has no hard links.

    The file must not change until it is uploaded, but a resumed run or an export replaces the original.
    """
    target = _artifact_file(run, name)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
    return target


def finish_wandb() -> None:
    """Close the record of a run, so that the next run in this process does not write to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
