"""Metrics of `upright serve`, for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector


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

    def observe_run(self, images: int, seconds: float) -> None:
        self.batch.observe(images)
        self.model.observe(seconds)
