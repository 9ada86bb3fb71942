"""Metrics of `upright serve`, for Prometheus."""

import os
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from upright.runtime.task import Classification, MultiLabel, Task

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder in which workers share their metrics. `prometheus_client` reads it at import."""

CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Buckets of the probability of the predicted class, or of the confidence of the angle."""
SECTORS = ("0", "45", "90", "135", "180", "-135", "-90", "-45")
"""Angles in degrees to which an orientation is rounded, in the order of multiples of 45 degrees."""


class Metrics:
    """Metrics of ``/metrics``, in a separate registry. With several workers, the text has the sums of all of them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.shared = SHARED_FOLDER in os.environ
        if self.shared:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
            registry = CollectorRegistry()  # of this process alone
        else:
            ProcessCollector(registry=registry)
        common: dict[str, Any] = {"namespace": "upright", "registry": registry}
        self.requests = Counter("requests", "Requests with a response.", ["route", "status"], **common)
        self.seconds = Histogram("request_seconds", "Time from the headers to the response.", ["route"], **common)
        self.images = Counter("images", "Images: answered, bad, refused, failed.", ["outcome"], **common)
        sizes = [2**n for n in range(11)]
        self.batch = Histogram("batch_images", "Images per run of the model.", buckets=sizes, **common)
        self.model = Histogram("model_seconds", "Time per run of the model.", **common)
        text = "Accepted images without a response."
        self.waiting = Gauge("waiting_images", text, multiprocess_mode="livesum", **common)
        self.predictions = Counter("predictions", "Images by each of their predicted classes.", ["label"], **common)
        self.angles = Counter("angles", "Images by their angle, rounded to 45 degrees.", ["degrees"], **common)
        text = "Probability of the predicted class, or confidence of the angle."
        self.confidence = Histogram("confidence", text, buckets=CONFIDENCES, **common)
        labels, text = ["name", "version", "precision"], "1 for the model that is loaded."
        self.info = Gauge("model_info", text, labels, multiprocess_mode="livemax", **common)
        self.model_labels: tuple[str, ...] | None = None

    def set_model(self, name: str, version: str, precision: str, classes: Sequence[str]) -> None:
        """Set the model of `info`, and show a count for each of its answers from the start."""
        if self.model_labels:
            self.info.labels(*self.model_labels).set(0)
        self.model_labels = (name, version, precision)
        self.info.labels(*self.model_labels).set(1)
        counter, values = (self.predictions, classes) if classes else (self.angles, SECTORS)
        for value in values:
            counter.labels(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def observe(self, task: Task, row: Any) -> None:
        """Count the answer for one image: a row of the main output, as a list."""
        labels: dict[str, float] = {}
        if isinstance(task, MultiLabel):
            labels = task.result(row).labels
        elif isinstance(task, Classification):
            confidence = max(row)
            labels = {task.classes[row.index(confidence)]: confidence}
        else:
            angle, confidence = row
            self.angles.labels(SECTORS[round(angle / 45) % 8]).inc()
            self.confidence.observe(confidence)
        for label, confidence in labels.items():
            self.predictions.labels(label).inc()
            self.confidence.observe(confidence)

    def observe_run(self, images: int, seconds: float) -> None:
        self.batch.observe(images)
        self.model.observe(seconds)
