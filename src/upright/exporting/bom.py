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
    """Return the content of `BOM` for an exported or an attached bundle; ``models`` are hashes by file.

    It has no date, so equal bundles have equal files.
    """
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
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest["name"],
        "description": description,
        "components": [_component("file", name, sha256) for name, sha256 in models.items()],
    }
    parameters: dict[str, Any] = {
        "task": f"image {task.name}",
        "inputs": [{"format": _tensor(manifest["input"])}],
        "outputs": [{"format": text} for text in (_tensor(manifest["output"]), *manifest["other_outputs"])],
    }
    score, key, images = task.score, "accuracy", parity.get("split")
    if "orientation" in provenance:
        front, classifier = provenance["orientation"], provenance["model"]
        hint = "Upright bundle that estimates the orientation. The hash is that of its file SHA256SUMS."
        model["components"] += [
            _component("machine-learning-model", front["name"], front["sha256"]) | {"description": hint},
            _component("machine-learning-model", classifier["file"], classifier["sha256"]),
        ]
        score, key = "agreement with the parts", "agreement"
        images = f"{parity['images']} images in {len(parity['angles'])} rotations"
    else:
        model["version"] = provenance["run"]["id"]
        parameters |= {
            "approach": {"type": "supervised" if classes else "self-supervised"},
            "modelArchitecture": provenance["model"]["init_args"]["network"]["class_path"],
            "datasets": [_dataset(provenance, "labels" if several else "images")],
        }
    metrics = [
        {"type": score, "value": str(values[key]), "slice": f"{images}, {precision}"}
        for precision, values in parity["precisions"].items()
    ]
    model["modelCard"] = {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": metrics},
    }
    if commit := provenance.get("git_commit"):
        model["pedigree"] = {"commits": [{"uid": commit}]}
    content: dict[str, Any] = {
        "metadata": {"component": model},
        "components": packages,
        "dependencies": [{"ref": "model", "dependsOn": ["onnxruntime"]}],
    }
    header = {"$schema": SCHEMA, "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return {**header, "serialNumber": uuid5(NAMESPACE_URL, json.dumps(content)).urn, **content}


def _component(kind: str, name: str, sha256: str) -> dict[str, Any]:
    return {"type": kind, "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def _dataset(provenance: Mapping[str, Any], counted: str) -> dict[str, Any]:
    split = provenance["split"]
    counts = ", ".join(f"{sum(classes.values())} {name}" for name, classes in split["counts"].items())
    digest = {"name": "upright:split.digest", "value": split["digest"]}
    contents = {"properties": [digest, {"name": f"upright:split.{counted}", "value": counts}]}
    return {"type": "dataset", "name": provenance["data"]["class_path"], "contents": contents}


def _tensor(description: Mapping[str, Any]) -> str:
    return f"{description['name']}: {description['dtype']} ({', '.join(map(str, description['shape']))})"
