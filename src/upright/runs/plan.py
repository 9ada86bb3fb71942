"""Plan of a run, from parsed options: its name, its folder, and the checkpoint that it starts with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upright.checkpoint import find_checkpoint
from upright.errors import UserError
from upright.files import check_name, check_replaceable


class RunPlan(NamedTuple):
    """Folder of a run and the checkpoint that it starts with."""

    folder: Path
    checkpoint: Path | None
    """Checkpoint to resume from."""
    start: Path | None
    """Checkpoint whose weights the run starts with."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def resumes_in_place(self) -> bool:
        """True if the checkpoint is in the run's own folder, which is then not replaced."""
        return self.checkpoint is not None and self.checkpoint.parent.resolve() == self.folder.resolve()


def run_name(name: str | None, configs: Sequence[str | Path]) -> str:
    """Return the name of a run: ``name`` if given, else the names of its configs, joined by hyphens.

    A run of a W&B sweep has its id added, since all runs of a sweep share a config.
    """
    if name is None:
        if not configs:
            raise UserError("The run has no name: give --config or --name.")
        paths = [Path(path) for path in configs]
        # The config of an existing run stands for that run.
        name = "-".join(path.resolve().parent.name if path.name == "config.yaml" else path.stem for path in paths)
        name = f"{name}-{agent_run()}" if agent_run() else name
    check_name(name)
    return name


def plan_run(folder: Path, *, ckpt_path: str | None, start_from: str | None, force: bool) -> RunPlan:
    """Decide which checkpoint a run starts with. The caller has locked the folder with `locked_run`.

    ``ckpt_path`` is a checkpoint to resume from: a file, ``last`` or ``best`` of the run, or ``auto``, which means the
    last one if there is one, else a new run. If the run does not resume, it starts with the weights ``start_from``.
    With ``force``, it replaces a run in the folder.
    """
    checkpoint = _checkpoint(folder, ckpt_path)
    start = find_checkpoint(start_from) if start_from is not None and not checkpoint else None
    plan = RunPlan(folder, checkpoint, start)
    if not plan.resumes_in_place and folder.exists():
        check_replaceable(folder, "the folder of a run", "config.yaml")
        # With `auto`, the run in the folder has written no checkpoint.
        if not force and ckpt_path != "auto":
            raise UserError(
                f"Run '{folder}' exists: --ckpt_path last resumes it, --force replaces it, "
                "--name gives this one another name."
            )
    return plan


def config_to_resume(ckpt_path: str | None, root: Path, name: str | None) -> Path:
    """Return the config.yaml of the run to resume, if ``--config`` is not given.

    ``ckpt_path`` is a file, a run's folder, or ``last`` or ``best`` of the run ``name`` in ``root``.
    """
    if ckpt_path in (None, "auto"):
        raise UserError("fit needs an experiment, for example `upright fit --config configs/stn_lenet.yaml`.")
    if ckpt_path in ("last", "best"):
        if name is None:
            raise UserError(f"--ckpt_path {ckpt_path} needs the name of a run: give --config or --name.")
        folder = root / name
    else:
        path = Path(str(ckpt_path))
        folder = path if path.is_dir() else path.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"'{folder}' holds no config.yaml of a run to resume; give --config.")
    return folder / "config.yaml"


def _checkpoint(folder: Path, ckpt_path: str | None) -> Path | None:
    if ckpt_path == "auto":
        # In the first epoch, best.ckpt may exist before last.ckpt.
        ckpt_path = next((kind for kind in ("last", "best") if (folder / f"{kind}.ckpt").is_file()), None)
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "best"):
        if not (folder / f"{ckpt_path}.ckpt").is_file():
            raise UserError(
                f"There is no '{folder / ckpt_path}.ckpt' to resume from; leave --ckpt_path out to start a new run."
            )
        return folder / f"{ckpt_path}.ckpt"
    path = Path(ckpt_path)
    # A run is resumed from its last checkpoint, not from its best.
    return find_checkpoint(path / "last.ckpt" if path.is_dir() else path)


def agent_run() -> str | None:
    """Return the id of this run if a W&B agent started it; the agent sets it in the environment."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
