"""Metrics of `upright serve`, for Prometheus."""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Buckets of the probability of the predicted class, or of the confidence of the angle."""
SECTORS = ("0", "45", "90", "135", "180", "-135", "-90", "-45")
"""Angles in degrees to which an orientation is rounded, in the order of multiples of 45 degrees."""


class Metrics:
    """Metrics of ``/metrics``, in a separate registry."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common: dict[str, Any] = {"namespace": "upright", "registry": self.registry}
        self.requests = Counter("requests", "Requests with a response.", ["route", "status"], **common)
        self.seconds = Histogram("request_seconds", "Time from the headers to the response.", ["route"], **common)
        self.images = Counter("images", "Images: answered, bad, refused, failed.", ["outcome"], **common)
        sizes = [2**n for n in range(11)]
        self.batch = Histogram("batch_images", "Images per run of the model.", buckets=sizes, **common)
        self.model = Histogram("model_seconds", "Time per run of the model.", **common)
        Gauge("waiting_images", "Accepted images without a response.", **common).set_function(waiting)

        self.predictions = Counter("predictions", "Images by their predicted class.", ["label"], **common)
        self.angles = Counter("angles", "Images by their angle, rounded to 45 degrees.", ["degrees"], **common)
        text = "Probability of the predicted class, or confidence of the angle."
        self.confidence = Histogram("confidence", text, buckets=CONFIDENCES, **common)
        self.info = Gauge("model_info", "The model, with the value 1.", ["name", "version", "precision"], **common)

    def set_model(self, name: str, version: str, precision: str, classes: Sequence[str]) -> None:
        """Set the model of `info`, and show a count for each of its answers from the start."""
        self.info.clear()
        self.info.labels(name, version, precision).set(1)
        counter, values = (self.predictions, classes) if classes else (self.angles, SECTORS)
        for value in values:
            counter.labels(value)

    def observe(self, classes: Sequence[str], row: list[float]) -> None:
        """Count the answer for one image: a row of the main output."""
        if classes:
            confidence = max(row)
            self.predictions.labels(classes[row.index(confidence)]).inc()
        else:
            angle, confidence = row
            self.angles.labels(SECTORS[round(angle / 45) % 8]).inc()
        self.confidence.observe(confidence)

    def observe_run(self, images: int, seconds: float) -> None:
        self.batch.observe(images)
        self.model.observe(seconds)
