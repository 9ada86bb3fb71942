"""Base of our LightningModules: a network with its preprocessing, its optimiser, and its checkpoints."""

import math
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from upright.architectures.initialisation import Scheme, initialise
from upright.architectures.localisers import Network
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.checkpoint import FORMAT, KEY, git_commit, read_checkpoint
from upright.data.batch import Batch
from upright.data.datamodule import ImageDataModule, seed_generators
from upright.data.loader import global_seed
from upright.errors import CheckpointError, UserError, one_line
from upright.images import ImageSpec
from upright.recipes import Recipe, Recorded, build, load_class, recipe
from upright.training.metrics import Means
from upright.training.model import Model
from upright.training.optimisation import MakeOptimizer, grouped_optimizer
from upright.training.schedules import MakeScheduler, Plateau, TorchScheduler, check_schedule
from upright.warp import identity


class ImageModule(Recorded, L.LightningModule):
    """A network with what every task shares. A subclass adds the loss, the metrics and the predictions of its task.

    The ``network`` is completed with ``(input_shape, outputs)``. For the other parts, see `ImageClassifier`.
    """

    metrics: nn.ModuleDict
    """The metrics of each stage, ``_val`` and ``_test``."""

    def __init__(
        self,
        spec: ImageSpec,
        network: Network,
        outputs: int,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler,
        init: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.outputs = spec, outputs
        self.optimizer, self.scheduler = optimizer, scheduler
        _ = self.recipe  # refuses parts that a checkpoint could not rebuild, before training
        check_schedule(scheduler)
        self.run: dict[str, Any] | None = None
        """Name and id of the training run; a stock Trainer's run is named after the network."""
        self.start: dict[str, Any] | None = None
        """Origin of the initial weights, if `start_from` loaded them."""
        self.start_hashes: Tensor | None = None
        """Content hashes of the images that the initial weights were trained on."""
        try:
            built = network(spec.input_shape, outputs)
        except ValueError as error:
            raise UserError(str(error)) from error
        except (RuntimeError, TypeError) as error:
            reason = one_line(error, 400)
            raise UserError(f"The network cannot be built for images of {spec.input_shape}: {reason}") from error
        if init:
            initialise(built, init)
        self.model = Model(spec, built)
        if spec.resize == "none":
            _check_any_size(self.model)
        self.transformers = sum(isinstance(module, SpatialTransformer) for module in self.model.modules())
        self._means = Means()
        self._validated_step = -1
        self._has_training_weights = False
        """True while a schedule-free optimiser has set the weights at which it computes gradients."""
        self.confusion: Tensor | None = None
        """Confusion matrix of the last validation or test, see `StageMetrics`: rows are labels, columns predictions."""

    @property
    def recipe(self) -> Recipe:
        """The class and its arguments without ``spec``, as plain data."""
        arguments = {key: value for key, value in self.arguments.items() if key != "spec"}
        class_path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class_path": class_path, "init_args": recipe(arguments | {"optimizer": self.optimizer})}

    @property
    def lr(self) -> float:
        """The optimiser's learning rate; Lightning's ``Tuner.lr_find`` sets it."""
        rate: float | None = getattr(self.optimizer, "keywords", {}).get("lr")
        if rate is None:
            raise AttributeError("The optimiser has no lr.")
        return rate

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer = cast(MakeOptimizer, partial(self.optimizer, lr=rate))  # type: ignore[call-arg]

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, h, w)`` of any size, values 0 to 255, to logits ``(B, K)``."""
        logits: Tensor = self.model(images)
        return logits

    def configure_optimizers(self) -> Any:
        """Build the optimiser with its groups, and the schedule over all steps."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("A schedule needs the length of the run: give --trainer.max_epochs or max_steps.")
        optimizer = grouped_optimizer(self.model, self.optimizer)
        scheduler = self.scheduler(optimizer, int(steps))
        frequency: float = 1
        if isinstance(scheduler, TorchScheduler) and scheduler.interval == "epoch":
            # Lightning's own interval epoch steps after the checkpoint of the epoch.
            frequency = self.trainer.num_training_batches
            if math.isinf(frequency):
                raise UserError("A schedule with interval epoch needs data of a known length: use interval step.")
        # on_validation_epoch_end passes the metrics to a schedule that follows them.
        schedule = {"scheduler": scheduler, "interval": "step", "frequency": frequency, "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        """Load published weights, and refuse a precision that cannot train this model.

        A run that resumes has its weights already, and `start` as its checkpoint records it.
        """
        if not self.start:
            from upright.training.finetuning import start_from  # finetuning imports this module

            start_from(self)
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(
                f"precision {precision} stores the weights in {precision[:-5]}, but the exported graph computes in 32 "
                "bits: use 32-true, bf16-mixed or 16-mixed."
            )
        self.run = self.run or {"name": type(self.model.network).__name__.lower(), "id": uuid.uuid4().hex[:8]}

    def seeded(self, batch: Any, batch_idx: int) -> Batch:
        """Return a training batch as a `Batch`, and seed torch's generators for it.

        An `ImageDataModule` seeds for its own batches. A resumed run draws the same dropout.
        """
        if not isinstance(batch, Batch):
            seed_generators(hash((global_seed(), self.current_epoch, batch_idx, self.global_rank)), self.device)
        return as_batch(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._switch_weights(training=True)

    def on_validation_start(self) -> None:
        self._switch_weights(training=False)

    def on_train_epoch_end(self) -> None:
        self._switch_weights(training=False)

    def _switch_weights(self, *, training: bool) -> None:
        """Let schedule-free optimisers set their weights for training, or those for evaluation.

        They have methods ``train`` and ``eval`` (Defazio et al. 2024, arXiv:2405.15682).
        """
        for optimizer in self.trainer.optimizers:
            if switch := getattr(optimizer, "train" if training else "eval", None):
                switch()
                self._has_training_weights = training

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's means after its last batch.

        Lightning's own means take 2 % of LeNet's step, and cover only the part of an epoch after resuming.
        """
        if self.trainer.is_last_batch or self.trainer.fit_loop.epoch_loop.done:
            self.log_dict(self._means.take(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @abstractmethod
    def evaluate(self, batch: Any, stage: str) -> Any:
        """Update the metrics of a stage, ``val`` or ``test``, and return what its callbacks need."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(batch, "test")

    def report(self, stage: str) -> dict[str, Tensor]:
        """Log and reset the metrics of a stage, and return them; a matrix ``confusion`` stays in the attribute."""
        metrics: Any = self.metrics[f"_{stage}"]
        values: dict[str, Tensor] = metrics.compute()
        self.confusion = values.pop("confusion", None)
        for name, value in values.items():
            if not value.isnan():
                self.log(f"{stage}/{name}", value, prog_bar=name in ("accuracy", "four_way", "map"), sync_dist=True)
        metrics.reset()
        return values

    def on_validation_epoch_end(self) -> None:
        metrics = self.report("val")
        schedule = self.lr_schedulers()
        if isinstance(schedule, Plateau | TorchScheduler) and not self.trainer.sanity_checking:
            schedule.follow(metrics)
        self._validated_step = self.trainer.global_step

    def on_test_epoch_end(self) -> None:
        self.report("test")

    def contents(self, data: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return Upright's part of a checkpoint, as plain data and tensors.

        ``data`` is the datamodule, or None. ``metrics`` are those of the validation of these weights.
        """
        return {
            "format": FORMAT,
            "versions": {name: version(name) for name in ("upright", "torch", "lightning")},
            "git_commit": git_commit(),
            "model": self.recipe,
            "spec": self.spec.to_dict(),
            "outputs": self.outputs,
            "data": data_recipe(data),
            "split": data.manifest.to_dict() if isinstance(data, ImageDataModule) else None,
            "run": dict(self.run or {}) | ({"start": self.start} if self.start else {}),
            "seen": self.start_hashes,
            "metrics": dict(metrics),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add model, data and run as plain data and tensors, and the sums of the epoch so far.

        With a schedule-free optimiser, the weights are those of evaluation, and ``training_weights`` those of training:
        rounding would change them on the way back.
        """
        if self._has_training_weights:
            checkpoint["training_weights"] = weights = _copy(self.state_dict())
            self._switch_weights(training=False)
            checkpoint["state_dict"] = _copy(self.state_dict())
            self._switch_weights(training=True)
            self.load_state_dict(weights)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        # Metrics of an earlier validation would be those of other weights.
        current = self._validated_step == self.trainer.global_step
        metrics = {
            name: float(value)
            for name, value in sorted(self.trainer.callback_metrics.items())
            if current and name.startswith("val/")
        }
        checkpoint[KEY] = self.contents(data, metrics)
        gather: Any = self.all_gather
        sums = self._means.state_dict().items()
        checkpoint["train_means"] = {name: (gather(total).reshape(-1), count) for name, (total, count) in sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the run's identity, and the sums of the epoch so far.

        If the number of processes has changed, each one gets their mean.
        """
        if "training_weights" in checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            checkpoint["state_dict"] = checkpoint["training_weights"]
            self._has_training_weights = True
        ours = checkpoint.get(KEY, {})
        self.start, self.start_hashes = ours.get("run", {}).get("start"), ours.get("seen")
        self.run = self.run or {key: value for key, value in ours.get("run", {}).items() if key != "start"} or None
        rank, size = self.trainer.global_rank, self.trainer.world_size
        sums = checkpoint.get("train_means", {}).items()
        own = {name: (totals[rank] if len(totals) == size else totals.mean(), count) for name, (totals, count) in sums}
        self._means.load_state_dict(own)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a descriptor of its own
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Rebuild the classifier of a checkpoint, or of a run's folder, in evaluation mode.

        The device is ``map_location``, by default the CPU. ``kwargs`` replace arguments in the checkpoint.
        ``hparams_file`` and ``weights_only`` are not used: a checkpoint holds its hyperparameters, and runs no code.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not fit the classes that it names.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        classifier = cls.rebuild(checkpoint, checkpoint_path, strict=strict is not False, **kwargs)
        return classifier if map_location is None else classifier.to(map_location)

    @classmethod
    def rebuild(cls, checkpoint: Mapping[str, Any], path: str | Path, *, strict: bool = True, **arguments: Any) -> Self:
        """Rebuild the classifier from the content of a checkpoint; see `load_from_checkpoint`."""
        ours = checkpoint[KEY]
        recorded = load_class(ours["model"]["class_path"])
        arguments = {"spec": ImageSpec.from_dict(ours["spec"]), **build(ours["model"]["init_args"]), **arguments}
        classifier: Self = (recorded if issubclass(recorded, cls) else cls)(**arguments)
        classifier.load_weights(checkpoint, path, strict=strict)
        return classifier.eval()

    def load_weights(self, checkpoint: Mapping[str, Any], path: str | Path, *, strict: bool = True) -> None:
        """Load the weights from the content of a checkpoint, and the origin of their start.

        Raises:
            CheckpointError: if the weights are of another network.
        """
        try:
            self.load_state_dict(checkpoint["state_dict"], strict=strict)
        except RuntimeError as error:
            reasons = "; ".join(f"{line.strip():.160}" for line in str(error).splitlines()[1:4])
            raise CheckpointError(f"'{path}' holds the weights of another network: {reasons}") from None
        ours = checkpoint[KEY]
        self.start, self.start_hashes = ours["run"].get("start"), ours.get("seen")


def as_batch(batch: Any) -> Batch:
    """Return a batch of any loader as a `Batch`.

    Args:
        batch: a `Batch`, or images ``(B, C, H, W)`` and labels as in a `Batch`. Images are uint8, or floats in [0, 1]
            as torchvision's ``ToTensor`` gives them: the classifier normalises them itself, by its spec.

    Raises:
        UserError: if the batch is of another type.
    """
    if isinstance(batch, Batch):
        return batch
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(
            f"ImageClassifier takes batches of (images, labels), got {type(batch).__name__}: give tensors "
            "(B, C, H, W) and (B,), or override the step."
        )
    images, labels = batch
    if images.is_floating_point():
        images = images * 255
    indices = torch.arange(len(labels), device=labels.device)
    return Batch(images, labels, indices, indices, identity(len(labels)).to(labels.device))


def data_recipe(data: Any) -> Recipe | None:
    """Return the class of a datamodule and its arguments as plain data; None if they are unknown.

    An `ImageDataModule` records its arguments; any other datamodule does so by Lightning's ``save_hyperparameters``.
    """
    if data is None or isinstance(data, ImageDataModule):
        return data.recipe if data else None
    try:
        return recipe(type(data)) | {"init_args": recipe(dict(data.hparams))} if data.hparams else None
    except UserError:
        return None


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _check_any_size(model: Model) -> None:
    channels, height, width = model.spec.input_shape
    if any(isinstance(module, SpatialTransformer) for module in model.modules()):
        raise UserError(
            "resize none does not work with a spatial transformer, which needs images of one size. "
            "Use stretch, crop or pad."
        )
    try:
        model.eval()(torch.zeros(1, channels, height + 5, width + 9))
    except RuntimeError:
        raise UserError(
            "resize none needs a network for images of any size, such as one that ends in a global mean; "
            f"{type(model.network).__name__} takes only {height}x{width}. Use stretch, crop or pad."
        ) from None
    model.train()
