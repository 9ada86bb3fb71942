"""Weights & Biases: on this disk by default, never a prompt, never an account.

Lineage: a split is what a run used, checkpoints are what it made; a checkpoint is what an export used, a bundle is what
it made.
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
    """Lightning's, with one row per step: a resumed run's own count would begin at 0 again where W&B is offline."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """See Lightning's `WandbLogger`."""
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def wandb_logger(mode: Mode, folder: Path, run: Mapping[str, str]) -> Logger | None:
    """The logger of a run, or None when it is off or wandb is not installed (which is said).

    Args:
        mode: ``offline`` keeps the record in ``folder/wandb``, for ``wandb sync``; ``online`` sends it.
        folder: of the run.
        run: its ``name`` and ``id``; a resumed run keeps both.

    Raises:
        UserError: if ``online`` cannot be had.
    """
    if (mode := _possible(mode)) == "off":
        return None
    import wandb

    logger = StepLogger(
        project=PROJECT,
        name=run["name"],
        id=run["id"],
        # The process that writes it may have started in another folder.
        save_dir=folder.resolve(),
        offline=mode == "offline",
        resume="allow" if mode == "online" else None,
        # Lightning says it in the environment, which wandb has read already if it was used before in this process.
        settings=wandb.Settings(console="off", mode=mode),
    )
    return without_anonymous(logger)


def bundle_mode(mode: Mode | None, checkpoint: Path) -> Mode:
    """How `log_bundle` shall note a bundle.

    Args:
        mode: as it was asked for; by default ``offline`` if there is a record of the checkpoint's run, else ``off``.
        checkpoint: what is exported.

    Raises:
        UserError: if ``online`` cannot be had.
    """
    tracked = (checkpoint.parent / "wandb").is_dir() and find_spec("wandb")
    return _possible(mode or ("offline" if tracked else "off"))


def _possible(mode: Mode) -> Mode:
    """``off`` where wandb is missing, which is said; ``online`` is then refused."""
    if mode == "off":
        return mode
    if find_spec("wandb") is None:
        if mode == "online":
            raise UserError("--wandb online needs the package wandb: `pip install wandb`.")
        print("wandb is not installed (`pip install wandb`), and keeps no record; a run has its metrics.csv.")
        return "off"
    if mode == "offline":
        # Nothing to say but where the record lies, and the README says that.
        os.environ.setdefault("WANDB_SILENT", "true")
        return mode
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("--wandb online needs an account: `wandb login` once, or set WANDB_API_KEY.")
    return mode


class Artifacts(Callback):
    """Notes in W&B which split a run used, and at its end the checkpoints that it made.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the split."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (run := _run_of(trainer)) and isinstance(data, ImageDataModule):
            manifest = data.manifest
            file = _waiting(run) / "split.json"
            hashes = {split: part.tolist() for split, part in manifest.hashes.items()}
            write_text(file, json.dumps(manifest.to_dict() | {"hashes": hashes}))
            about = {"digest": manifest.digest, "counts": manifest.counts}
            _use(run, _artifact(f"split-{type(data).__name__}", "split", about, {"split.json": file}))

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the checkpoints; one of the same step is best and last at once."""
        if not (run := _run_of(trainer)):
            return
        found = {name: self.folder / f"{name}.ckpt" for name in ("last", "best")}
        read = {name: read_checkpoint(path) for name, path in found.items() if path.is_file()}
        if len({checkpoint["global_step"] for checkpoint in read.values()}) < len(read):
            del read["last"]
            aliases = ["best", "last"]
        for name, checkpoint in read.items():
            run.log_artifact(_checkpoint(run, found[name], checkpoint), aliases=aliases if len(read) == 1 else [name])


def log_bundle(mode: Mode, checkpoint: Path, bundle: Path) -> None:
    """Note in W&B, as a run of its own beside the training's, which checkpoint a bundle was made of.

    Args:
        mode: of `bundle_mode`.
        checkpoint: what was exported.
        bundle: the folder.
    """
    if mode == "off":
        return
    import wandb

    read = read_checkpoint(checkpoint)
    about = read[KEY]["run"]
    run = wandb.init(
        project=PROJECT,
        name=f"{bundle.name}-export",
        job_type="export",
        group=about["id"],
        dir=checkpoint.parent.resolve(),
        mode=mode,
        config={"checkpoint": checkpoint.name, "run": about["id"]},
        settings=wandb.Settings(console="off"),
    )
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    files = {str(file.relative_to(bundle)): file for file in sorted(bundle.rglob("*")) if file.is_file()}
    kept = {name: _kept(run, file, f"bundle/{name}") for name, file in files.items()}
    metadata = {name: manifest["provenance"][name] for name in ("run", "split", "metrics")} | {"spec": manifest["spec"]}
    _use(run, _checkpoint(run, checkpoint, read))
    run.log_artifact(_artifact(f"bundle-{bundle.name}", "bundle", metadata, kept))
    run.finish()


def _run_of(trainer: L.Trainer) -> "Run | None":
    loggers = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
    logger = next(loggers, None)
    return logger.experiment if logger else None


def _artifact(name: str, kind: str, metadata: Mapping[str, Any], files: Mapping[str, Path]) -> "Artifact":
    from wandb import Artifact

    artifact = Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], kind, metadata=dict(metadata))
    for inside, path in files.items():
        # As they lie: wandb's own copies would go into the user's home, and into a cache.
        artifact.add_file(str(path), inside, policy="immutable", skip_cache=True)
    return artifact


def _checkpoint(run: "Run", path: Path, checkpoint: Mapping[str, Any]) -> "Artifact":
    """The same content is the same artifact, whichever run notes it."""
    ours = checkpoint[KEY]
    metadata = {"epoch": checkpoint["epoch"] + 1, "step": checkpoint["global_step"], "metrics": ours["metrics"]}
    metadata |= {"spec": ours["spec"], "split_digest": ours["split"] and ours["split"]["digest"]}
    return _artifact(f"model-{ours['run']['id']}", "model", metadata, {"model.ckpt": _kept(run, path, path.name)})


def _use(run: "Run", artifact: "Artifact") -> None:
    if run.offline:
        use_artifact_offline(run, artifact)
    else:
        run.use_artifact(artifact)


def _waiting(run: "Run") -> Path:
    folder = Path(run.dir).parent / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder


def _kept(run: "Run", path: Path, name: str) -> Path:
    """Another name of the same file, or a copy where there cannot be one, in the record of ``run``.

    Until it is uploaded it must stay as it is, and a run that goes on, or an export, puts other files in its place.
    """
    kept = _waiting(run) / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copyfile(path, kept)
    return kept


def finish_wandb() -> None:
    """Close the record of a run, or the next one in this process would write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
