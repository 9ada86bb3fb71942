"""What models say of the same images, and figures of it."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.evidence.reporting.calibration import Reliability, fitted_temperature, log_loss, tempered
from upright.evidence.intervals import clustered
from upright.evidence.reporting.subjects import Floats, Subject
from upright.exporting.parity import Drop
from upright.training.metrics import class_scores
from upright.training.uprightness import Uprightness

Labels = npt.NDArray[np.int64]

TOP = (2, 5)
WORST = 24
"""Mistakes that are named and shown, at most."""


class Judged:
    """What one model said of a split.

    Args:
        probabilities: ``(N, K)``.
        labels: ``(N,)``.
        groups: the image that each answer is about, ``(N,)``.
        uprightness: over the views of the split, where they are turned and it has a transformer that tells.
    """

    def __init__(self, probabilities: Floats, labels: Labels, groups: Labels, uprightness: float | None) -> None:
        self.probabilities, self.labels, self.groups, self.uprightness = probabilities, labels, groups, uprightness

    @cached_property
    def predicted(self) -> Labels:
        """``(N,)``."""
        predicted: Labels = self.probabilities.argmax(axis=1)
        return predicted

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """``(N,)``."""
        right: npt.NDArray[np.bool_] = self.predicted == self.labels
        return right

    @cached_property
    def confusion(self) -> torch.Tensor:
        """Answers about row's class that say column's, ``(K, K)``."""
        number = self.probabilities.shape[1]
        counts = np.bincount(self.labels * number + self.predicted, minlength=number * number)
        return torch.from_numpy(counts.reshape(number, number))

    @cached_property
    def worst(self) -> Labels:
        """The wrong answers, the surest first."""
        wrong = np.flatnonzero(~self.right)
        order: Labels = wrong[np.argsort(-self.probabilities[wrong].max(axis=1), kind="stable")]
        return order

    def figures(self, classes: tuple[str, ...], names: list[str]) -> dict[str, Any]:
        """All of it that is no calibration, as plain data."""
        ranked = np.argsort(-self.probabilities, axis=1, kind="stable")
        hits = ranked == self.labels[:, None]
        scores = class_scores(self.confusion)
        # As in training: the mean over classes that were shown or predicted.
        counted = [
            one for one, taken in zip(scores, self.confusion.sum(dim=0).tolist(), strict=True) if one.support or taken
        ]
        return {
            "accuracy": clustered(self.right, self.groups)._asdict(),
            "top": {str(k): clustered(hits[:, :k].any(axis=1), self.groups)._asdict() for k in TOP if k < len(classes)},
            "macro": {
                name: float(np.mean([getattr(one, name) for one in counted])) for name in ("precision", "recall", "f1")
            },
            "classes": [{"class": name} | one._asdict() for name, one in zip(classes, scores, strict=True)],
            "confusion": self.confusion.tolist(),
            "mistakes": len(self.worst),
            "worst_mistakes": [
                {
                    "name": names[i],
                    "label": classes[self.labels[i]],
                    "predicted": classes[self.predicted[i]],
                    "confidence": float(self.probabilities[i].max()),
                    "probability_of_label": float(self.probabilities[i, self.labels[i]]),
                }
                for i in self.worst[:WORST].tolist()
            ],
        }


class Calibrated(NamedTuple):
    """How far a model's confidence can be believed, as it is and with the temperature of other images.

    Args:
        before: as it is.
        log_loss: as it is.
        temperature: None where there is none; ``reason`` says why.
        reason: of that.
        after: with the temperature.
        log_loss_after: with the temperature.
    """

    before: Reliability
    log_loss: float
    temperature: float | None = None
    reason: str = ""
    after: Reliability | None = None
    log_loss_after: float | None = None

    @classmethod
    def of(cls, judged: Judged, validated: Judged | None) -> "Calibrated":
        """Of a split, with the temperature fitted on ``validated``, which is another one."""
        said, labels, groups = judged.probabilities, judged.labels, judged.groups
        plain = cls(Reliability.of(said, labels, groups), log_loss(said, labels))
        if validated is None:
            return plain._replace(reason="it is fitted on the validation split, which is what is reported here")
        temperature = fitted_temperature(validated.probabilities, validated.labels)
        if temperature is None:
            return plain._replace(
                reason="on the validation split the loss has no least value, as where no answer is wrong (the surer, "
                "the better), or none better than a guess (the less sure, the better)"
            )
        scaled = tempered(said, temperature)
        return plain._replace(
            temperature=temperature,
            after=Reliability.of(scaled, labels, groups),
            log_loss_after=log_loss(scaled, labels),
        )

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "log_loss": self.log_loss,
            "error": self.before.error,
            "bins": self.before.figures(),
            "temperature": self.temperature,
            "reason": self.reason,
            "log_loss_after": self.log_loss_after,
            "error_after": self.after and self.after.error,
            "bins_after": self.after and self.after.figures(),
        }


def difference(first: Judged, other: Judged) -> dict[str, Any]:
    """Of accuracy, in points, from the first model's: answers to the same images, paired, see `Drop`."""
    drop = Drop.of(first.right, other.right, first.groups)
    return {
        "points": 0 - drop.points,
        "low": 0 - drop.high,
        "high": 0 - drop.low,
        "only_first_right": int((first.right & ~other.right).sum()),
        "only_this_right": int((~first.right & other.right).sum()),
    }


@torch.no_grad()
def judge(subjects: list[Subject], data: ImageDataModule, split: str) -> list[Judged]:
    """Ask all models about a split; every image is decoded once.

    Raises:
        UserError: if one of them gives what is no number.
    """
    measures = [Uprightness() if subject.model else None for subject in subjects]
    said: list[list[Floats]] = [[] for _ in subjects]
    labels, groups = [], []
    aspect = data.spec.width / data.spec.height
    for batch in tqdm(data.loader(split), desc=f"asking about {split}", unit="batch", disable=None, leave=False):
        labels.append(batch.labels)
        groups.append(batch.group)
        for subject, answers, measure in zip(subjects, said, measures, strict=True):
            answer = subject.answer(batch.images)
            if not np.isfinite(answer.probabilities).all():
                raise UserError(f"'{subject.path}' gives probabilities that are no numbers; train or export it again.")
            answers.append(answer.probabilities)
            if measure:
                measure.update(batch.group, batch.transforms, answer.seen, aspect)
    found = [float(measure.compute()) if measure else float("nan") for measure in measures]
    known = (torch.cat(labels).numpy(), torch.cat(groups).numpy())
    return [
        Judged(np.concatenate(answers), *known, None if np.isnan(value) else value)
        for answers, value in zip(said, found, strict=True)
    ]
