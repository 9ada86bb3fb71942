"""Bill of materials of a bundle, an ML-BOM in the format CycloneDX 1.6."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from upright.runtime.bundle import read_task

BOM = "bom.cdx.json"
SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
SCOPES = {"onnxruntime": "required", "upright": "optional"}
"""Use of each package when the model runs. Other packages were only needed to write it."""


def bom(manifest: Mapping[str, Any], parity: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of `BOM`; ``models`` are hashes by file. It has no date, so equal bundles have equal files."""
    provenance, classes = manifest["provenance"], tuple(manifest["spec"]["classes"])
    task = read_task(manifest)
    several = ", any number of them per image" if task.name == "multilabel" else ""
    description = f"Image classifier with {len(classes)} classes{several}."
    if not classes:
        description = "Estimator of the angle of an image."
    packages = [
        {
            "type": "library",
            "bom-ref": name,
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{quote(version)}",
            "scope": SCOPES.get(name, "excluded"),
        }
        for name, version in provenance["versions"].items()
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest["name"],
        "version": provenance["run"]["id"],
        "description": description,
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}
            for name, sha256 in models.items()
        ],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised" if classes else "self-supervised"},
                "task": f"image {task.name}",
                "modelArchitecture": provenance["model"]["init_args"]["network"]["class_path"],
                "datasets": [_dataset(provenance, "labels" if several else "images")],
                "inputs": [{"format": _tensor(manifest["input"])}],
                "outputs": [{"format": text} for text in (_tensor(manifest["output"]), *manifest["other_outputs"])],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": task.score, "value": str(metrics["accuracy"]), "slice": f"{parity['split']}, {precision}"}
                    for precision, metrics in parity["precisions"].items()
                ]
            },
        },
    }
    if provenance["git_commit"]:
        model["pedigree"] = {"commits": [{"uid": provenance["git_commit"]}]}
    content: dict[str, Any] = {
        "metadata": {"component": model},
        "components": packages,
        "dependencies": [{"ref": "model", "dependsOn": ["onnxruntime"]}],
    }
    header = {"$schema": SCHEMA, "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return {**header, "serialNumber": uuid5(NAMESPACE_URL, json.dumps(content)).urn, **content}


def _dataset(provenance: Mapping[str, Any], counted: str) -> dict[str, Any]:
    split = provenance["split"]
    counts = ", ".join(f"{sum(classes.values())} {name}" for name, classes in split["counts"].items())
    digest = {"name": "upright:split.digest", "value": split["digest"]}
    contents = {"properties": [digest, {"name": f"upright:split.{counted}", "value": counts}]}
    return {"type": "dataset", "name": provenance["data"]["class_path"], "contents": contents}


def _tensor(description: Mapping[str, Any]) -> str:
    return f"{description['name']}: {description['dtype']} ({', '.join(map(str, description['shape']))})"
