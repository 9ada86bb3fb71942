"""LightningModule that trains any network to classify images."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from upright.architectures.initialisation import Scheme
from upright.architectures.localisers import Network
from upright.architectures.spatial_transformer import observing
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.images import ImageSpec, TaskName
from upright.training.losses import CrossEntropy
from upright.training.metrics import StageMetrics
from upright.training.module import ImageModule, as_batch
from upright.training.optimisation import MakeOptimizer
from upright.training.poses import PoseLosses
from upright.training.schedules import MakeScheduler, OneCycle

OTHER_TASK: dict[TaskName, str] = {
    "classification": "These data have one class per image: train upright.ImageClassifier with them.",
    "multilabel": "These data have several classes per image: train upright.MultiLabelClassifier with them.",
    "orientation": "These data have no classes: train upright.OrientationEstimator with them.",
}
"""Refusal of data of each task by a classifier of another one."""


class ImageClassifier(ImageModule):
    """Train, validate, test and predict with any network. The parts are callables that the classifier completes.

    It takes batches of an `ImageDataModule`, or ``(images, labels)`` of any loader; see `as_batch`. A subclass may
    override any step or hook of Lightning's, or `extra_metrics`; it works in ``fit``, ``test`` and ``export`` as well.

    Args:
        spec: shape, classes and normalisation of an image; the command line takes it from the data.
        network: completed with ``(input_shape, num_classes)``.
        optimizer: completed with parameter groups; see `upright.training.optimisation`.
        scheduler: completed with ``(optimizer, total_steps)``; it steps after every batch.
        loss: completed with ``(num_classes)``; called with logits and labels, or probabilities if images are mixed.
        init: scheme of the initial weights; by default the network's own.
        upright_weight: weight of the upright loss: two views of an image should end in one pose, whichever it is.
        prior_weight: weight of the identity prior: every view should end as the image was before augmentation. Use it
            for data that have an up of their own. A `PolarLocaliser` needs no rotated views for it. See also
            `prior_loss`.
        loss_weight: weight of ``loss``. With 0, only the poses train, and no gradient goes through the network behind
            the transformers.
    """

    task: ClassVar[TaskName] = "classification"

    def __init__(
        self,
        spec: ImageSpec,
        network: Network,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler = OneCycle,
        loss: Callable[[int], nn.Module] = CrossEntropy,
        init: Scheme | None = None,
        upright_weight: float = 0.0,
        prior_weight: float = 0.0,
        loss_weight: float = 1.0,
    ) -> None:
        num_classes = len(spec.classes)
        if spec.task != self.task:
            raise UserError(OTHER_TASK[spec.task])
        super().__init__(spec, network, num_classes, optimizer, scheduler, init)
        self.loss, self.loss_weight = loss(num_classes), loss_weight
        self.pose_losses = PoseLosses(self.model, upright_weight, prior_weight)
        if loss_weight < 0 or not (loss_weight or self.pose_losses):
            raise UserError(f"loss_weight {loss_weight} trains nothing: use 1, or 0 with a prior_weight (2 is usual).")
        self.metrics = nn.ModuleDict(
            {
                f"_{stage}": StageMetrics(
                    num_classes,
                    upright=self.transformers > 0,
                    extra=self.extra_metrics(),
                    multilabel=self.task == "multilabel",
                )
                for stage in ("val", "test")
            }
        )

    @property
    def views(self) -> int:
        """Number of augmented views of each image that the datamodule yields."""
        return 2 if self.pose_losses.upright_weight else 1

    def extra_metrics(self) -> Mapping[str, Metric]:
        """Return further torchmetrics of validation and test, by name. Override it to add some.

        They are updated with probabilities ``(B, K)`` and labels ``(B,)``, and logged as ``val/NAME`` and
        ``test/NAME``.
        """
        return {}

    def on_fit_start(self) -> None:
        """Balance the loss, and refuse an augmentation that cannot train this model; see also the base."""
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        loss: Any = self.loss
        if getattr(loss, "balanced", False):
            if not isinstance(data, ImageDataModule):
                kind = type(data).__name__
                raise UserError(
                    f"class_weights balanced needs an ImageDataModule, got {kind}: give one weight per class."
                )
            loss.balance(self.class_counts(data))
        data = data if isinstance(data, ImageDataModule) else None
        augmentation = data and data.augmentation
        if augmentation and augmentation.mixes and not self._takes_probabilities():
            raise UserError(
                f"{augmentation.mixes} gives an image several classes, but {type(self.loss).__name__} takes one label: "
                f"use upright.training.losses.CrossEntropy, or remove {augmentation.mixes} from data.init_args.augment."
            )
        self.pose_losses.check_data(data)

    def class_counts(self, data: ImageDataModule) -> Tensor:
        """Return the number of training images of each class, ``(K,)``."""
        counts = data.manifest.counts["train"]
        return torch.tensor([counts.get(name, 0) for name in self.spec.classes])

    def _takes_probabilities(self) -> bool:
        classes = len(self.spec.classes)
        try:
            self.loss(torch.zeros(1, classes, device=self.device), torch.ones(1, classes, device=self.device) / classes)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch: classification, and what the poses of its views cost, if that has a weight."""
        batch = self.seeded(batch, batch_idx)
        loss = torch.zeros((), device=self.device)
        # Without its own loss, the network behind the transformers does not run.
        with observing(stop_after=None if self.loss_weight else self.transformers) as observations:
            logits = self.model(batch.images)
            value: Tensor = self.loss(logits, batch.labels)
            self._means.add("train/loss", value, len(logits))
            loss = loss + self.loss_weight * value
        if self.pose_losses:
            # Batches of other loaders have no views: their images are as they are.
            transforms, observed = [view.transforms for view in batch.views] or [_unchanged], [observations]
            for view in batch.views[1:]:
                with observing(stop_after=len(observations)) as others:
                    self.model(view.images)
                observed.append(others)
            aspect = self.spec.width / self.spec.height
            for name, (weight, value, count) in self.pose_losses(transforms, observed, aspect).items():
                self._means.add(f"train/{name}", value, count)
                loss = loss + weight * value
        return loss

    def evaluate(self, batch: Any, stage: str) -> dict[str, Any]:
        """Update the metrics; return ``probabilities`` ``(B, K)`` and the transformers' ``observations``."""
        batch = as_batch(batch)
        metrics: Any = self.metrics[f"_{stage}"]
        with observing() as observations:
            logits = self.model(batch.images)
        probabilities = self.model.answers(logits.float())
        metrics.update(probabilities, batch.labels, self.loss(logits, batch.labels))
        if metrics.uprightness is not None:
            aspect = self.spec.width / self.spec.height
            metrics.uprightness.update(batch.group, batch.transforms, observations, aspect)
        return {"probabilities": probabilities, "observations": observations}

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return labels ``(B,)`` or ``(B, K)``, and probabilities ``(B, K)``."""
        batch = as_batch(batch)
        return batch.labels, self.model.answers(self.model(batch.images))


def _unchanged(points: Tensor) -> Tensor:
    return points
