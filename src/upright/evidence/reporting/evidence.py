"""A report on classifiers: their measurements as plain data, and their figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from upright.evidence.reporting.figures import (
    Models,
    draw_invariance,
    draw_reliability,
    draw_rotation_response,
    draw_strips,
    draw_turning_circle,
)
from upright.evidence.reporting.invariance import (
    ROTATION,
    SEED,
    DistortionFamily,
    Sample,
    distortions,
    measure_invariance,
    take_sample,
    trained_ranges,
)
from upright.evidence.reporting.measures import LISTED_MISTAKES, Predictions, calibrate, difference, evaluate
from upright.evidence.reporting.page import Figures
from upright.evidence.reporting.subjects import Group, Subject
from upright.runs.drawing import Line, caption, draw_confusion, draw_tiles, pixels_of
from upright.runs.seal import content_digest, count, count_in_sweep


@dataclass(frozen=True)
class Evidence:
    """The content of a report on classifiers.

    Args:
        group: the models and the data.
        split: split of the data.
        sample: the images that were distorted.
        families: the distortions.
        predictions: predictions of each model for the split.
        models: measures of each model for ``report.json``.
    """

    group: Group
    split: str
    sample: Sample
    families: Mapping[str, DistortionFamily]
    predictions: list[Predictions]
    models: list[dict[str, Any]]
    template = "report.html"

    def record(self) -> dict[str, Any]:
        """Return the entries of ``report.json`` that only classifiers have."""
        data, first = self.group.data, self.predictions[0]
        views = data.views(self.split)
        return {
            "data": {
                "answers": len(first.labels),
                "sources": len(np.unique(first.groups)),
                "views": [f"{name}{views.unit}" for name in views.names],
                "classes": data.spec.classes,
            },
            "curves": {
                "images": len(self.sample.labels),
                "seed": SEED,
                "padding": data.augmentation.padding,
                "already_distorted": self.sample.distorted,
            },
            "models": self.models,
        }

    def draw(self, models: Models) -> Figures:
        """Return the figures by name; those of model N end in ``-N``.

        There are ``mistakes-N`` only if it made some, and ``turning`` (the response to rotation) and ``sights`` (the
        outputs) only with observations of spatial transformers. ``circle`` (the accuracy at all angles) exists only
        with a transformer that votes or abstains.
        """
        classes = self.group.data.spec.classes
        figures: Figures = {measure: draw_invariance(measure, models) for measure in ("accuracy", "consistency")}
        figures["reliability"] = draw_reliability(models)
        if any(model["identity"] or model["effect"] for model in models):
            figures["circle"] = draw_turning_circle(models)
        if observed := [subject for subject in self.group.subjects if subject.model]:
            figures["turning"] = draw_rotation_response(models)
            figures["sights"] = draw_strips(observed, self.sample, self.families[ROTATION], classes)
        for number, (model, predictions) in enumerate(zip(models, self.predictions, strict=True), start=1):
            figures[f"confusion-{number}"] = draw_confusion(model["name"], predictions.confusion, classes)
            if len(predictions.mistakes):
                figures[f"mistakes-{number}"] = self._draw_mistakes(predictions)
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
    def summary(model: Mapping[str, Any]) -> str:
        """Return a line about a model of ``report.json``."""
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
    """Evaluate all models on a split, and on some of its images with distortions."""
    data, size = group.data, (group.data.spec.height, group.data.spec.width)
    sample, families = take_sample(data, split, images), distortions(*size, data.augmentation.padding)
    evidence = Evidence(group, split, sample, families, [], [])
    for subject in group.subjects:
        print(f"Evaluating {subject.name}, also on {len(sample.labels)} distorted images ...", flush=True)
        predictions = evaluate(subject, data, split)
        measures = measure_invariance(subject, sample, families, trained_ranges(subject.origin.data, *size))
        if subject.model:
            seen = {"on_split": predictions.uprightness, "votes_confidence": predictions.votes_confidence}
            measures["uprightness"] |= seen
        evidence.models.append(
            {
                "test_openings": _openings(subject, group, split),
                **predictions.record(data.spec.classes, list(data.names(split))),
                "difference": difference(evidence.predictions[0], predictions) if evidence.predictions else None,
                "calibration": calibrate(predictions, evaluate(subject, data, "val") if split != "val" else None),
                **measures,
                "effect": subject.effect,
            }
        )
        evidence.predictions.append(predictions)
    return evidence


def _openings(subject: Subject, group: Group, split: str) -> dict[str, Any] | None:
    """Count the evaluations on the test split. Return None for another split, or if the run's folder is missing."""
    if split != "test" or subject.folder is None:
        return None
    digest = content_digest(group.data.manifest.hashes["test"])
    return {"run": count(subject.folder, digest), "sweep": count_in_sweep(subject.folder.parent, digest)}
