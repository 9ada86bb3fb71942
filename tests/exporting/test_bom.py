import json
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from upright.exporting.bom import BOM, bom
from upright.files import file_hash


def digits_bom() -> dict:
    folder = ROOT / "export/digits"
    manifest, parity = (json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "parity"))
    return bom(manifest, parity, {name: file_hash(folder / name) for name in ("model.onnx", "model.int8.onnx")})


def test_the_bill_of_materials_of_a_bundle(bundle: Path) -> None:
    content, manifest = json.loads((bundle / BOM).read_text()), json.loads((bundle / "manifest.json").read_text())
    model = content["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["name"] == "small"
    digest = file_hash(bundle / "model.onnx")
    assert model["components"] == [
        {"type": "file", "name": "model.onnx", "hashes": [{"alg": "SHA-256", "content": digest}]}
    ]
    card = model["modelCard"]
    assert card["modelParameters"]["inputs"] == [{"format": "images: uint8 (batch, height, width, 1)"}]
    assert card["modelParameters"]["modelArchitecture"].endswith(".TransformerNetwork")
    (dataset,) = card["modelParameters"]["datasets"]
    assert dataset["contents"]["properties"][0]["value"] == manifest["provenance"]["split"]["digest"]
    accuracy = json.loads((bundle / "parity.json").read_text())["precisions"]["fp32"]["accuracy"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "accuracy", "value": str(accuracy), "slice": "val, fp32"}
    ]
    packages = {each["name"]: each for each in content["components"]}
    versions = manifest["provenance"]["versions"]
    assert {name: each["version"] for name, each in packages.items()} == versions
    assert packages["onnxruntime"]["purl"] == f"pkg:pypi/onnxruntime@{versions['onnxruntime']}"
    assert [name for name, each in packages.items() if each["scope"] == "required"] == ["onnxruntime"]


def test_equal_bundles_have_equal_bills() -> None:
    content = digits_bom()
    assert content == digits_bom() and content["serialNumber"].startswith("urn:uuid:")
    torch = next(each for each in content["components"] if each["name"] == "torch")
    assert torch["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"


def check_schema(content: dict) -> bool:
    """Return whether a bill fits the schema, or True if the package that checks it is not installed."""
    if find_spec("cyclonedx") is None:
        return True
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content)) is None


@pytest.mark.skipif(find_spec("cyclonedx") is None, reason="needs cyclonedx-python-lib[json-validation]")
def test_it_fits_the_schema() -> None:
    content = digits_bom()
    assert check_schema(content)
    wrong = deepcopy(content)
    wrong["metadata"]["component"]["type"] = "model"
    assert not check_schema(wrong)
