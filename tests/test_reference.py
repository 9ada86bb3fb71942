"""The pages in docs/reference state what the program has."""

import json
import re
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import upright as package
from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_multilabel_bundle, write_orientation_bundle
from upright.errors import UprightError
from upright.options import Serve
from upright.runtime.bundle import SUMS, Bundle, checksums
from upright.runtime.predictor import Predictor
from upright.runtime.serving.description import MEANINGS
from upright.runtime.serving.service import Service

REFERENCE = ROOT / "docs/reference"
OPEN = {"provenance.model", "provenance.data", "provenance.run.start"}
"""Objects whose keys depend on the classes that they describe."""
NAMED = {
    "precisions": "PRECISION",
    "precisions.PRECISION.float_layers": "LAYER",
    "precisions.PRECISION.other_outputs": "OUTPUT",
    "precisions.PRECISION.speed": "BATCH",
    "provenance.versions": "PACKAGE",
    "provenance.split.counts": "SPLIT",
    "provenance.split.counts.SPLIT": "CLASS",
    "provenance.metrics": "METRIC",
    "probabilities": "PRECISION",
    "orientation": "PRECISION",
    "multilabel.thresholds": "CLASS",
}
"""Objects whose keys are names, and the word on the page for them."""


def page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text(encoding="utf-8")


def keys_on_page(heading: str) -> set[str]:
    section = page("bundle-format").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.M))


def keys(content: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every key of a JSON document."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        yield path
        for item in content:
            yield from keys(item, path)
    elif not isinstance(content, dict) or path in OPEN:
        yield path
    else:
        for name, value in content.items():
            yield from keys(value, f"{path}.{NAMED.get(path, name)}".removeprefix("."))


def test_commands_are_generated_from_the_options() -> None:
    generate = runpy.run_path(str(REFERENCE / "generate.py"))
    assert generate["page"](page("commands")) == page("commands"), "run: python docs/reference/generate.py"


def test_commands_have_every_variable_of_ours() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    variables = set(re.findall(r"environ(?:\.get|\.setdefault)?[(\[]\"(\w+)\"", sources))
    assert variables >= {"UPRIGHT_DATA", "UPRIGHT_CACHE"}
    assert {name for name in variables if not name.startswith("SLURM_ARRAY")} <= set(
        re.findall(r"`([A-Z_]+)`", page("commands"))
    ) | {"WANDB_SILENT", "NODE_RANK"}


def keys_of(bundle: Path) -> dict[str, set[str]]:
    files = [bundle / name for name in ("manifest.json", "parity.json", "samples/expected.json")]
    present = [file for file in files if file.exists()]  # a bundle for tests may have no parity.json
    return {file.relative_to(bundle).as_posix(): set(keys(json.loads(file.read_text()))) - {""} for file in present}


def test_the_bundle_format_has_every_key_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    others = write_orientation_bundle(tmp_path / "export/sky"), write_multilabel_bundle(tmp_path / "export/tags")
    for folder in (bundle, ROOT / "export/digits", *others):
        for name, paths in keys_of(folder).items():
            assert paths - {"precisions.PRECISION.float_layers"} <= keys_on_page(name)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_the_bundle_format_has_exactly_the_keys_of_a_bundle(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    options = ("--outputs", "theta", "--precision", "int8", "--max-drop", 100)
    answer = upright("export", run_folder, "--name", "fresh", *options)
    assert answer.code == 0, answer.err
    fresh = keys_of(tmp_path / "export/fresh")
    # This run started from scratch, and no layer stays in float32.
    fresh["manifest.json"] |= {"provenance.run.start", "precisions.PRECISION.float_layers.LAYER"}
    # Perhaps no image has another class than in PyTorch; in this bundle one has.
    fresh["parity.json"] |= keys_of(ROOT / "export/digits")["parity.json"]
    for name, paths in keys_of(write_orientation_bundle(tmp_path / "export/sky")).items():
        fresh[name] |= paths
    # `test_from_a_folder_to_a_bundle` exports an orientation.
    metrics = ("four_way", "error_degrees_median", "largest_difference_degrees", "unstable")
    fresh["manifest.json"].add("orientation.threshold")
    fresh["parity.json"] |= {f"precisions.PRECISION.{metric}" for metric in metrics}
    # `test_from_a_table_to_a_bundle` exports several classes per image.
    fresh["manifest.json"].add("multilabel.thresholds")
    fresh["parity.json"] |= {"multilabel.thresholds.CLASS", "precisions.PRECISION.f1"}
    fresh["parity.json"] |= {f"orientation.{key}" for key in ("max_wrong", "threshold", "share", "wrong")}
    for name, paths in fresh.items():
        assert paths == keys_on_page(name)


def change(bundle: Path, path: str, value: Any) -> None:
    """Change a key of the manifest, and compute the hashes again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    *parents, last = path.split(".")
    place = manifest
    for name in parents:
        place = place[name]
    place[last] = value
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / SUMS).write_text(checksums(bundle))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 1, "Export it again"),
        ("format", 3, "Install a newer Upright"),
        ("spec.depth", 1, "unexpected keyword argument 'depth'"),
        ("spec.resize", "squeeze", "resize must be one of"),
        ("spec.multilabel", True, "multiple values for keyword argument 'multilabel'"),
        ("spec.mask", "disc", "multiple values for keyword argument 'mask'"),
        ("mask", "ring", "mask must be one of none, disc; got 'ring'"),
        ("interpolation", "lanczos", "interpolation must be one of bilinear, bicubic; got 'lanczos'"),
        ("precisions.fp8", {"tolerance": 1.0}, "fp8"),
    ],
)
def test_a_reader_refuses(path: str, value: Any, message: str, bundle: Path) -> None:
    change(bundle, path, value)
    with pytest.raises(UprightError, match=message):
        Bundle.open(bundle)


def test_a_reader_accepts_unknown_keys_and_files(bundle: Path) -> None:
    (bundle / "NOTES.txt").write_text("reviewed\n")
    for path in ("licence", "provenance.machine", "precisions.fp32.seconds"):
        change(bundle, path, "unknown")
    assert Bundle.open(bundle).manifest["licence"] == "unknown"


def test_a_missing_mask_means_none_and_a_missing_interpolation_bilinear(bundle: Path) -> None:
    assert "mask" not in json.loads((ROOT / "export/digits/manifest.json").read_text())
    assert Bundle.open(ROOT / "export/digits").spec.mask == Bundle.open(bundle).spec.mask == "none"
    assert Bundle.open(ROOT / "export/digits").spec.interpolation == "bilinear"
    change(bundle, "mask", "disc")
    change(bundle, "interpolation", "bicubic")
    spec = Bundle.open(bundle).spec
    assert spec.mask == "disc" and spec.interpolation == "bicubic"


def test_every_public_name_has_its_documentation() -> None:
    names = re.findall(r"^::: upright\.([\w.]+)$", page("api"), flags=re.M)
    assert [name for name in names if "." not in name] == sorted(package.__all__, key=str.lower)
    for module, _, name in (name.rpartition(".") for name in names if "." in name):
        assert hasattr(import_module(f"upright.{module}"), name)


def test_every_config_has_a_line() -> None:
    paths = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(re.findall(r"^\| `([\w/]+\.yaml)` \|", page("configs"), flags=re.M)) == paths


def test_the_http_page_has_every_route_status_and_metric(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "_observed", lambda service, app: app)
    service = Service(Predictor(bundle), Serve(str(bundle)))
    routes = {re.sub(r"\{(\w+)\}", lambda name: name[1].upper(), route.path) for route in service.app().routes}  # type: ignore[attr-defined]
    text = page("http")
    assert {route.rstrip("/") for route in routes} == set(re.findall(r"^\| `(?:GET|POST) (/\S*)` \|", text, flags=re.M))
    assert {str(status) for status in MEANINGS} == set(re.findall(r"^\| (\d{3}) \|", text, flags=re.M))
    metrics = {metric.name for metric in service.metrics.registry.collect() if metric.name.startswith("upright")}
    assert metrics == {name.removesuffix("_total") for name in re.findall(r"^\| `(upright_\w+)`", text, flags=re.M)}
