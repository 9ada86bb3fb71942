"""TensorBoard and MLflow: Lightning's loggers for a run, with its plots and hyperparameters."""

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from upright.checkpoint import KEY, read_checkpoint
from upright.errors import UserError, one_line
from upright.runs.folder import is_first_process
from upright.runs.tracking import PROJECT

RUN_TAG = "upright.run"
"""The MLflow tag that holds the id of a run. MLflow chooses its own run ids."""


def tensorboard_logger(folder: Path, resumed_at: int | None) -> Logger:
    """Return a logger that writes into ``tensorboard/`` in the folder of the run.

    TensorBoard hides the steps after ``resumed_at``, which is None for a new run.
    """
    _check_installed("tensorboard", "tensorboard")
    return TensorBoardLogger(
        folder.resolve(), name="", version="tensorboard", default_hp_metric=False, purge_step=resumed_at
    )


def mlflow_logger(folder: Path, run: Mapping[str, str]) -> Logger:
    """Return a logger that writes to ``MLFLOW_TRACKING_URI``, or to ``mlflow.db`` in the working directory.

    ``run`` holds the ``name`` and ``id``. A resumed run has the same ones, and resumes its MLflow run.
    """
    for package in ("mlflow", "sqlalchemy", "alembic"):
        _check_installed("mlflow", package)
    # MLflow 3 sends usage statistics to its developers, unless this is set before the import.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    # MLflow logs every table that it creates in a new mlflow.db.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    runs: list[Any] = []
    if is_first_process():
        try:
            client = mlflow.MlflowClient()
            experiment = client.get_experiment_by_name(PROJECT)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
            runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['id']}'", max_results=1)
        except mlflow.MlflowException as error:
            raise UserError(f"--mlflow: {one_line(error)}") from error
    return RunMLFlowLogger(
        folder,
        run_name=run["name"],
        run_id=runs[0].info.run_id if runs else None,
        tags={RUN_TAG: run["id"]},
        tracking_uri=mlflow.get_tracking_uri(),
    )


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's logger for a run with a folder that may be resumed."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(PROJECT, **options)
        self._folder = folder.resolve()

    @property
    def save_dir(self) -> str:
        """Return the folder of the run. Profilers write there."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the parameters of a new run. MLflow refuses to change those of a resumed one."""
        if not self.experiment.get_run(self.run_id).data.params:
            super().log_hyperparams(params)


def _check_installed(option: str, package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"--{option} needs the package {package}: `pip install 'upright[{option}]'`.")


def log_picture(logger: Logger, name: str, path: Path, step: int) -> None:
    """Log a plot to a logger that takes images: TensorBoard, MLflow, or any with a method ``log_image`` like W&B's."""
    if hasattr(logger, "log_image"):
        logger.log_image(name, [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, Image.open(path), key=name, step=step)


def log_best_metrics(trainer: L.Trainer, best: Path) -> None:
    """Log the hyperparameters and the metrics of the checkpoint ``best`` to TensorBoard's table."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            metrics = read_checkpoint(best)[KEY]["metrics"]
            best_metrics = {f"best/{name}": value for name, value in metrics.items()}
            logger.log_hyperparams(logger.hparams, best_metrics, step=trainer.global_step - 1)
