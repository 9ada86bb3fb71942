"""A report on classifiers: their measurements as plain data, and their figures."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_rotation_response, draw_strips
from upright.evidence.reporting.invariance import (
    ROTATION,
    SEED,
    DistortionFamily,
    Invariance,
    InvarianceCurve,
    Sample,
    distortions,
    measure_invariance,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.measures import LISTED_MISTAKES, Predictions, calibrate, difference, evaluate
from upright.evidence.reporting.page import Figures
from upright.evidence.reporting.subjects import Group, Subject
from upright.intervals import Share
from upright.runs.drawing import Line, caption, draw_confusion, draw_tiles, pixels_of
from upright.runs.seal import content_digest, count, count_in_sweep

DEFAULT_ROTATION_DEGREES = 180.0
"""Range of angles for the uprightness, in each direction, if the training data declare no rotation."""
MIN_ROTATION_DEGREES = 15.0
"""Smallest range of angles for the uprightness, in each direction."""


class Measurements(NamedTuple):
    """All measurements of a model.

    Args:
        subject: the model.
        predictions: predictions for the split.
        calibration: calibration of the confidence, see `calibrate`.
        training_ranges: range of each distortion in training, see `trained_ranges`.
        invariance: invariance to the distortions.
    """

    subject: Subject
    predictions: Predictions
    calibration: dict[str, Any]
    training_ranges: dict[str, tuple[float, float]]
    invariance: Invariance


@dataclass(frozen=True)
class Evidence:
    """The content of a report on classifiers.

    Args:
        group: the models and the data.
        split: split of the data.
        sample: the images that were distorted.
        families: the distortions.
        models: the measurements of each model.
    """

    group: Group
    split: str
    sample: Sample
    families: list[DistortionFamily]
    models: list[Measurements]
    template = "report.html"

    def record(self) -> dict[str, Any]:
        """Return the entries of ``report.json`` that only classifiers have."""
        data, predictions = self.group.data, self.models[0].predictions
        views = data.views(self.split)
        return {
            "data": {
                "answers": len(predictions.labels),
                "sources": len(np.unique(predictions.groups)),
                "views": [f"{name}{views.unit}" for name in views.names],
                "classes": data.spec.classes,
            },
            "curves": {
                "images": len(self.sample.labels),
                "seed": SEED,
                "padding": data.augmentation.padding,
                "already_distorted": self.sample.distorted,
            },
            "models": [self._model_record(model) for model in self.models],
        }

    def _model_record(self, model: Measurements) -> dict[str, Any]:
        data, first, predictions = self.group.data, self.models[0], model.predictions
        curves, ranges = model.invariance.curves, model.training_ranges
        return {
            "test_openings": self._openings(model.subject),
            **predictions.record(data.spec.classes, list(data.names(self.split))),
            "difference": None if model is first else difference(first.predictions, predictions),
            "calibration": model.calibration,
            "invariance": {
                family.name: _curve_record(family, curves[family.name], ranges.get(family.name))
                for family in self.families
            },
            "uprightness": _uprightness_record(model),
        }

    def _openings(self, subject: Subject) -> dict[str, Any] | None:
        """Count the evaluations on the test split; None for another split, or if the run's folder is missing."""
        if self.split != "test" or subject.folder is None:
            return None
        split = content_digest(self.group.data.manifest.hashes["test"])
        return {"run": count(subject.folder, split), "sweep": count_in_sweep(subject.folder.parent, split)}

    def draw(self) -> Figures:
        """Return the figures by name.

        All reports have ``accuracy``, ``consistency`` and ``reliability``. Each model has a ``confusion-N``, and
        ``mistakes-N`` if it made mistakes. With observations of spatial transformers, a report has ``turning`` (their
        response to rotation) and ``sights`` (their outputs).
        """
        models, classes = self.models, self.group.data.spec.classes
        names = [model.subject.name for model in models]
        curves, ranges = [model.invariance.curves for model in models], [model.training_ranges for model in models]
        figures: Figures = {
            measure: draw_invariance(measure, names, curves, self.families, ranges)
            for measure in ("accuracy", "consistency")
        }
        figures["reliability"] = draw_reliability(names, [model.calibration for model in models])
        numbered = enumerate(model.invariance.rotation_response for model in models)
        if responses := {number: response for number, response in numbered if response}:
            observed = [models[number].subject for number in responses]
            figures["turning"] = draw_rotation_response(responses, [subject.name for subject in observed])
            rotation = next(family for family in self.families if family.name == ROTATION)
            figures["sights"] = draw_strips(observed, self.sample, rotation, classes)
        for number, (name, model) in enumerate(zip(names, models, strict=True), start=1):
            figures[f"confusion-{number}"] = draw_confusion(name, model.predictions.confusion, classes)
            if len(model.predictions.mistakes):
                figures[f"mistakes-{number}"] = self._draw_mistakes(model.predictions)
        return figures

    def _draw_mistakes(self, predictions: Predictions) -> Image.Image:
        data, indices = self.group.data, predictions.mistakes[:LISTED_MISTAKES]
        classes, views = data.spec.classes, data.views(self.split)
        captions = []
        for i in indices.tolist():
            guess, label = int(predictions.classes[i]), int(predictions.labels[i])
            lines = caption(classes, guess, predictions.probabilities[i, guess], label)
            if view := views.names[i % len(views.names)]:
                lines.append(Line(f"{view}{views.unit}" if views.unit else f"view {view}"))
            captions.append(lines)
        return draw_tiles("", pixels_of(data.samples(self.split)[torch.from_numpy(indices)].images), captions)

    @staticmethod
    def summary(model: dict[str, Any]) -> str:
        """Return a line about a model of the record."""
        share, calibration = model["accuracy"], model["calibration"]
        line = (
            f"{model['name']}: accuracy {share['value']:.4f} (95 %: {share['low']:.4f} to {share['high']:.4f}), "
            f"calibration error {calibration['error']:.4f}"
        )
        if calibration["temperature"]:
            line += f", {calibration['error_after']:.4f} at temperature {calibration['temperature']:.3f}"
        if upright := model["uprightness"].get("in_range"):
            line += (
                f", uprightness {upright['uprightness']:.3f}, median deviation "
                f"{upright['relative_degrees_median']:.1f} degrees relative and "
                f"{upright['absolute_degrees_median']:.1f} absolute"
            )
        if change := model["difference"]:
            line += (
                f"; {change['points']:+.2f} points to the first model ({change['low']:+.2f} to {change['high']:+.2f})"
            )
        return f"{line}."


def gather(group: Group, split: str, images: int) -> Evidence:
    """Evaluate all models.

    Uprightness covers the angles of the training rotation, and at least `MIN_ROTATION_DEGREES` in each direction. It
    covers all angles if the training data declare no rotation.

    Args:
        group: models and data.
        split: split to evaluate.
        images: number of images to distort.
    """
    subjects, data = group
    print(f"Evaluating {', '.join(subject.name for subject in subjects)} ...", flush=True)
    predictions = evaluate(subjects, data, split)
    validations = evaluate(subjects, data, "val") if split != "val" else [None] * len(subjects)
    size = (data.spec.height, data.spec.width)
    sample, families = take_sample(data, split, images), distortions(*size, data.augmentation.padding)
    print(f"Distorting {len(sample.labels)} images ...", flush=True)
    models = []
    for subject, own, validation in zip(subjects, predictions, validations, strict=True):
        ranges = trained_ranges(subject.origin.data, *size)
        end = max(ranges.get(ROTATION, (0.0, DEFAULT_ROTATION_DEGREES))[1], MIN_ROTATION_DEGREES)
        invariance = measure_invariance(subject, sample, families, (-end, end))
        models.append(Measurements(subject, own, calibrate(own, validation), ranges, invariance))
    return Evidence(group, split, sample, families, models)


def _curve_record(
    family: DistortionFamily, curve: InvarianceCurve, training_range: tuple[float, float] | None
) -> dict[str, Any]:
    def mean(shares: list[Share]) -> float:
        pairs = zip(curve.strengths, shares, strict=True)
        return float(np.mean([share.value for strength, share in pairs if strength != family.none]))

    means = {"accuracy": mean(curve.accuracy), "consistency": mean(curve.consistency)}
    return {"unit": family.unit, "none": family.none, "trained": training_range, **curve._asdict(), "mean": means}


def _uprightness_record(model: Measurements) -> dict[str, Any]:
    response = model.invariance.rotation_response
    if response is None:
        return {"silent": model.subject.unobserved_reason}
    low, middle, high = response.quartiles.tolist()
    return {
        "within": response.within,
        "in_range": response.uprightness,
        "on_split": model.predictions.uprightness,
        "votes_confidence": model.predictions.votes_confidence,
        "angles": response.angles,
        "left": {"lower_quartile": low, "median": middle, "upper_quartile": high},
    }
