"""The LightningModule around any network."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from upright.architectures.initialisation import Scheme, initialise
from upright.architectures.spatial_transformer import Network, SpatialTransformer, observing
from upright.data.augmentation import Augmentation, Augmented
from upright.data.batch import Batch
from upright.data.datamodule import ImageDataModule
from upright.data.loader import global_seed
from upright.errors import UserError
from upright.images import ImageSpec
from upright.recipes import Recorded, recipe
from upright.training.losses import CrossEntropy
from upright.training.metrics import Means, StageMetrics
from upright.training.model import Model
from upright.training.schedules import OneCycle
from upright.training.uprightness import final_poses, upright_loss
from upright.warp import pixel_centres

Groups = Iterable[dict[str, Any]]


class ImageClassifier(Recorded, L.LightningModule):
    """Train, validate, test and predict with any network. The parts are callables, completed here.

    Args:
        spec: what an image is; the command line takes it from the data.
        network: completed with ``(input_shape, num_classes)``.
        optimizer: completed with parameter groups; see `grouped_optimizer`.
        scheduler: completed with ``(optimizer, total_steps)``; steps after every batch.
        loss: completed with ``(num_classes)``; called with logits and labels, or probabilities where images are mixed.
        init: scheme of the weights to start from; by default the network's own.
        upright_weight: weight of the upright loss; 0 trains the spatial transformer by classification alone.
    """

    def __init__(
        self,
        spec: ImageSpec,
        network: Network,
        optimizer: Callable[[Groups], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] = OneCycle,
        loss: Callable[[int], nn.Module] = CrossEntropy,
        init: Scheme | None = None,
        upright_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.recipe: dict[str, Any] = {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": recipe({key: value for key, value in self.arguments.items() if key != "spec"}),
        }
        # Where the weights come from, if not from chance, and hashes of the images they knew (see `finetuning`).
        self.start: dict[str, Any] | None = None
        self.seen: Tensor | None = None
        self.optimizer, self.scheduler, self.upright_weight = optimizer, scheduler, upright_weight
        num_classes = len(spec.classes)
        try:
            made = network(spec.input_shape, num_classes)
        except ValueError as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            raise UserError(f"The network cannot be built for images of {spec.input_shape}: {error}") from error
        if init:
            initialise(made, init)
        self.model = Model(spec, made)
        if spec.resize == "none":
            _check_any_size(self.model)
        self.loss = loss(num_classes)
        self.transformers = sum(isinstance(module, SpatialTransformer) for module in self.model.modules())
        if upright_weight < 0 or (upright_weight > 0 and not self.transformers):
            raise UserError(
                f"upright_weight {upright_weight} needs a SpatialTransformer in the network; "
                "use 0, or put a transformer in front (configs/stn_lenet.yaml)."
            )
        self.metrics = nn.ModuleDict(
            {f"_{stage}": StageMetrics(num_classes, upright=self.transformers > 0) for stage in ("val", "test")}
        )
        self._means = Means()
        self.confusion: Tensor | None = None
        """Of the last validation or test, ``(K, K)``: images of row's class that were taken for column's."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module does, but for the name of the hook that runs, which Lightning sets fifty times a step.

        To look whether it is a weight took a tenth of a millisecond (``benchmarks/overhead.py``).
        """
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, h, w)`` of any size, values 0 to 255, to logits ``(B, K)``."""
        logits: Tensor = self.model(images)
        return logits

    def configure_optimizers(self) -> Any:
        """`grouped_optimizer`, and the injected schedule over all steps."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("A schedule must know where the run ends: give --trainer.max_epochs or max_steps.")
        optimizer = self.grouped_optimizer()
        scheduler = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def grouped_optimizer(self) -> Optimizer:
        """The injected optimiser over all that trains, each parameter in one group.

        A group per ``lr_factor`` that a module asks for. Where the optimiser decays weights, what should not be drawn
        to zero has a group of its own: parameters of one dimension (biases, scales of norms), and those of a module
        with ``no_weight_decay = True`` (He et al. 2019, arXiv:1812.01187). SGD, Adam and AdamW are fused, unless they
        were given ``fused`` or ``foreach``.

        Raises:
            UserError: for what the optimiser refuses.
        """
        treatments = dict(_treatments(self.model, 1.0, True))
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter, (factor, _) in treatments.items():
            groups.setdefault(factor, []).append(parameter)
        try:
            optimizer = self.optimizer([{"params": parameters} for parameters in groups.values()])
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}") from error
        # PyTorch's own choice, where nothing was asked for, is a loop in Python on a CPU, and several kernels on a GPU.
        fuses = isinstance(optimizer, (SGD, Adam)) and self.device.type in ("cpu", "cuda")
        # The optimiser's own list grows in the loop.
        for factor, group in zip(groups, list(optimizer.param_groups), strict=True):
            group["lr"] *= factor
            if fuses and group["fused"] is None and not group["foreach"]:
                group["fused"] = True
            kept = [parameter for parameter in group["params"] if not treatments[parameter][1]]
            if kept and group.get("weight_decay"):
                group["params"] = [parameter for parameter in group["params"] if treatments[parameter][1]]
                optimizer.add_param_group({**group, "params": kept, "weight_decay": 0.0})
        return optimizer

    def on_fit_start(self) -> None:
        """Tell the loss what it asks of the data; refuse an augmentation that the losses cannot learn from."""
        loss: Any = self.loss
        if getattr(loss, "balanced", False):
            loss.balance(self._train_counts())
        augmentation = self._augmentation.to(self.device)
        mixing = augmentation.mixes
        if mixing and not self._takes_probabilities():
            raise UserError(
                f"{mixing} gives an image several classes, and {type(self.loss).__name__} takes one label: use "
                f"upright.training.losses.CrossEntropy, or leave {mixing} out of data.init_args.augment."
            )
        if not self.upright_weight:
            return
        if not augmentation.moves:
            raise UserError(
                "The upright loss compares two augmented views of an image, and the data are not turned: add "
                "upright.data.augmentation.RandomAffine with rotate to data.init_args.augment, or set upright_weight 0."
            )
        if mixing:
            raise UserError(
                f"The upright loss needs images of one pose, and {mixing} puts two into one: leave it out of "
                "data.init_args.augment, or set upright_weight 0."
            )
        if augmentation.untold:
            raise UserError(
                f"The upright loss must know where pixels went, and {augmentation.untold} does not say: use "
                "upright.data.augmentation.RandomElastic or what has a transform_matrix, or set upright_weight 0."
            )

    def _takes_probabilities(self) -> bool:
        classes = len(self.spec.classes)
        try:
            self.loss(torch.zeros(1, classes, device=self.device), torch.ones(1, classes, device=self.device) / classes)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        return True

    @property
    def _augmentation(self) -> Augmentation:
        """The datamodule's: it belongs to the data, and not into the weights."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.augmentation if isinstance(data, ImageDataModule) else Augmentation()

    def _train_counts(self) -> Tensor:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageDataModule):
            raise UserError(
                "class_weights balanced counts the images of an ImageDataModule, and these data are none: "
                "give one weight per class."
            )
        counts = data.manifest.counts["train"]
        return torch.tensor([counts.get(name, 0) for name in self.spec.classes])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Augment, classify, and compare with a second view of the same images where there is an upright loss."""
        # Augmentation and dropout are functions of seed, epoch, batch and process: a resumed run draws the same.
        _seed(self.device, hash((global_seed(), self.current_epoch, batch_idx, self.global_rank)))
        augmentation, targets = self._augmentation, batch.labels
        if augmentation.mixes:
            targets = one_hot(targets, len(self.spec.classes)).float()
        view: Augmented = augmentation(batch.images, targets)
        with observing() as seen:
            logits = self.model(view.images)
        loss: Tensor = self.loss(logits, view.targets)
        self._means.add("train/loss", loss, len(logits))
        if self.upright_weight:
            other: Augmented = augmentation(batch.images)
            with observing(stop_after=len(seen)) as seen_other:
                self.model(other.images)
            points = pixel_centres(4, 4, device=self.device)
            poses = final_poses(view.transforms, seen, points)
            poses_other = final_poses(other.transforms, seen_other, points)
            aspect = self.spec.width / self.spec.height
            losses = [upright_loss(*pair, points, aspect) for pair in zip(poses, poses_other, strict=True)]
            turned = torch.stack(losses).mean()
            self._means.add("train/upright_loss", turned, len(logits))
            loss = loss + self.upright_weight * turned
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the epoch's means once: Lightning's own would take 2 % of LeNet's step, and begin anew on resuming."""
        if self.trainer.is_last_batch or self.trainer.fit_loop.epoch_loop.done:
            self.log_dict(self._means.take(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the sums of the epoch so far, of every process."""
        gather: Any = self.all_gather
        sums = self._means.state_dict().items()
        checkpoint["train_means"] = {name: (gather(total).reshape(-1), count) for name, (total, count) in sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with this process's, or with their mean if there are more processes than before, or fewer."""
        rank, size = self.trainer.global_rank, self.trainer.world_size
        sums = checkpoint.get("train_means", {}).items()
        own = {name: (totals[rank] if len(totals) == size else totals.mean(), count) for name, (totals, count) in sums}
        self._means.load_state_dict(own)

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Any]:
        metrics: Any = self.metrics[f"_{stage}"]
        with observing() as seen:
            logits = self.model(batch.images)
        probabilities = logits.float().softmax(dim=1)
        metrics.update(probabilities, batch.labels, self.loss(logits, batch.labels))
        if metrics.uprightness is not None:
            metrics.uprightness.update(batch.group, batch.transforms, seen, self.spec.width / self.spec.height)
        return {"probabilities": probabilities, "seen": seen}

    def _report(self, stage: str) -> None:
        metrics: Any = self.metrics[f"_{stage}"]
        found = metrics.compute()
        self.confusion = found.pop("confusion", None)
        for name, value in found.items():
            if not value.isnan():
                self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", sync_dist=True)
        metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Update the validation metrics; ``probabilities`` ``(B, K)``, and what the transformers did, as ``seen``."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Update the test metrics; gives what `validation_step` does."""
        return self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position in the split ``(B,)``, label ``(B,)``, probabilities ``(B, K)``."""
        return batch.position, batch.labels, self.model(batch.images).softmax(dim=1)


def _seed(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed`, for the CPU and this device alone.

    That notes the whole stack for every kind of device that is not in use: a tenth of LeNet's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@torch.no_grad()
def _check_any_size(model: Model) -> None:
    channels, height, width = model.spec.input_shape
    if any(isinstance(module, SpatialTransformer) for module in model.modules()):
        raise UserError("resize none and a spatial transformer do not go together: it turns images of one size.")
    try:
        model.eval()(torch.zeros(1, channels, height + 5, width + 9))
    except RuntimeError:
        raise UserError(
            f"resize none needs a network that takes images of any size, as those do that end in a global mean; "
            f"{type(model.network).__name__} takes {height}x{width} only. Use stretch or crop."
        ) from None
    model.train()


def _treatments(module: nn.Module, factor: float, decays: bool) -> Iterator[tuple[nn.Parameter, tuple[float, bool]]]:
    """Every parameter that trains, with all its ``lr_factor``, its own and its modules', and whether it may decay."""
    factor *= getattr(module, "lr_factor", 1.0)
    decays = decays and not getattr(module, "no_weight_decay", False)
    for parameter in module.parameters(recurse=False):
        if parameter.requires_grad:
            own = factor * getattr(parameter, "lr_factor", 1.0)
            yield parameter, (own, decays and parameter.ndim > 1)
    for child in module.children():
        yield from _treatments(child, factor, decays)
