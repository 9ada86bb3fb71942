"""Upright: from images to a verified ONNX bundle, through any architecture and a spatial transformer around it.

The names below are the public face; each is imported when it is first used, so ``import upright`` stays cheap.
"""

import importlib
import os
from typing import Any

# Since 1.29 onnxruntime reports every session to Microsoft, the file's name included, unless this is set before it
# starts; ORT_DISABLE_TELEMETRY=0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "Digits": "upright.data.digits",
    "Folder": "upright.data.folder",
    "ImageClassifier": "upright.training.classifier",
    "ImageDataModule": "upright.data.datamodule",
    "ImageSpec": "upright.images",
    "LeNet": "upright.architectures.lenet",
    "MNIST": "upright.data.mnist",
    "MultiLabelClassifier": "upright.training.multilabel",
    "MultiLabelPredictor": "upright.runtime.predictor",
    "OrientationEstimator": "upright.training.orientation",
    "OrientationPredictor": "upright.runtime.predictor",
    "Pictures": "upright.data.pictures",
    "Predictor": "upright.runtime.predictor",
    "RandomAffine": "upright.data.augmentation",
    "SmallResNet": "upright.architectures.resnet",
    "SpatialTransformer": "upright.architectures.spatial_transformer",
    "TransformerNetwork": "upright.architectures.transformer_network",
    "UprightError": "upright.errors",
    "export": "upright.exporting.export",
    "open_predictor": "upright.runtime.predictor",
    "restore": "upright.training.restoring",
}

__all__ = list(_MODULES)  # the stub beside this file lists them for type checkers


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'upright' has no attribute '{name}'. It offers {', '.join(_MODULES)}.")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
