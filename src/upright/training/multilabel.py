"""LightningModule that trains any network to find all classes of an image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upright.architectures.localisers import Network
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.images import ImageSpec
from upright.training.classifier import ImageClassifier
from upright.training.losses import BinaryCrossEntropy, CrossEntropy
from upright.training.optimisation import MakeOptimizer


class MultiLabelClassifier(ImageClassifier):
    """Train, validate, test and predict with any network, if an image may have several classes, or none.

    Each class has its own probability, the sigmoid of its logit. Labels are 0 and 1, float ``(B, K)``.

    Args:
        spec: shape, classes and normalisation of an image, with ``multilabel``; the command line takes it from the
            data, for example from `Table` with a ``separator``.
        network: completed with ``(input_shape, num_classes)``.
        optimizer: completed with parameter groups; see `upright.training.optimisation`.
        loss: completed with ``(num_classes)``; called with logits and labels, both ``(B, K)``.
        **options: other arguments of `ImageClassifier`.
    """

    task = "multilabel"

    def __init__(
        self,
        spec: ImageSpec,
        network: Network,
        optimizer: MakeOptimizer,
        *,
        loss: Callable[[int], nn.Module] = BinaryCrossEntropy,
        **options: Any,
    ) -> None:
        super().__init__(spec, network, optimizer, loss=loss, **options)
        if isinstance(self.loss, CrossEntropy) or not self._takes_probabilities():
            raise UserError(
                f"{type(self.loss).__name__} is for one class per image, and these data have several: use "
                "upright.training.losses.BinaryCrossEntropy."
            )

    def on_fit_start(self) -> None:
        """Refuse data without a class in the validation split; see also the base."""
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and not data.manifest.counts["val"]:
            raise UserError("No image of the validation split has a class, so there is nothing to measure: add some.")

    def class_counts(self, data: ImageDataModule) -> Tensor:
        """Return the numbers of training images with and without each class, ``(2, K)``."""
        counts = super().class_counts(data)
        return torch.stack([counts, len(data.splits["train"]) - counts])
