"""A bundle in words: the card that goes with it, and what whoever exports it is told."""

from collections.abc import Iterator
from typing import Any

from upright.exporting.precision import TOLERANCES
from upright.runtime.bundle import MODELS
from upright.tables import markdown

PAYS = 1.1
"""Times as fast as float32; less is within the noise of the measurement."""


def summary(parity: dict[str, Any], max_drop: float) -> Iterator[str]:
    """What whoever exports should know, line by line.

    Args:
        parity: the bundle's ``parity.json``.
        max_drop: points of accuracy that a precision was allowed to lose.
    """
    figures = parity["precisions"]
    exact = figures["fp32"]
    yield (
        f"{parity['images']} images: agreement {exact['agreement']:.2%}, largest difference "
        f"{exact['largest_difference']:.1e}, accuracy PyTorch {parity['accuracy']['pytorch']:.4f}, "
        f"ONNX Runtime {exact['accuracy']:.4f}."
    )
    for name, figure in figures.items():
        if name == "fp32":
            continue
        low, high = figure["drop_interval"]
        speed = {batch: entry["times_fp32"] for batch, entry in figure["speed"].items()}
        times = " and ".join(f"{value:.2f}" for value in speed.values())
        yield (
            f"{name}: accuracy {figure['accuracy']:.4f}, {figure['drop']:.2f} points less (95 %: {low:.2f} to "
            f"{high:.2f}), {len(figure['flipped'])} flipped; {figure['bytes'] / exact['bytes']:.2f} times the size, "
            f"{times} times as fast (batch {' and '.join(speed)})."
        )
        if max(speed.values()) < PAYS:
            yield f"{name} does not pay on this machine: it is no faster than fp32."
    if len(figures) > 1 and parity["smallest_drop_to_tell"] > max_drop:
        yield (
            f"{parity['sources']} source images are too few to tell a drop of {max_drop:g} points (they tell one of "
            f"{parity['smallest_drop_to_tell']:.2f}): what was seen has decided."
        )


def card(manifest: dict[str, Any], parity: dict[str, Any]) -> str:
    """The ``README.md`` of a bundle.

    Args:
        manifest: its ``manifest.json``.
        parity: its ``parity.json``.
    """
    name, spec, provenance = manifest["name"], manifest["spec"], manifest["provenance"]
    accuracy = parity["accuracy"]
    exact = parity["precisions"]["fp32"]
    network = provenance["model"]["init_args"]["network"]["class_path"]
    data = provenance["data"]["class_path"]
    batch, height, width, channels = manifest["input"]["shape"]
    sizes = "any size" if height == "height" else "of this size alone"
    fitted = "" if spec["resize"] == "none" else f"{spec['resize']} to {spec['height']} x {spec['width']} and "
    fitted = "" if (height, width) == (spec["height"], spec["width"]) else fitted
    others = "".join(f", `{other}`" for other in manifest["other_outputs"])
    metrics = "\n".join(f"| {key} | {value:.4f} |" for key, value in provenance["metrics"].items())
    return f"""# {name}

An image classifier exported by Upright {provenance["versions"]["upright"]} from run `{provenance["run"]["name"]}`
(id {provenance["run"]["id"]}, git {provenance["git_commit"] or "not known"}).

| | |
|---|---|
| Network | `{network}` |
| Data | `{data}`, split `{provenance["split"]["digest"][:16]}` |
| Classes | {", ".join(spec["classes"])} |
| Input | `images`: uint8 ({batch}, {height}, {width}, {channels}), {sizes}; {fitted}normalisation inside |
| Output | `probabilities`: float32 ({batch}, {len(spec["classes"])}){others} |
| ONNX opset | {manifest["opset"]} |

## Parity on the validation split

PyTorch and ONNX Runtime on all {parity["images"]} originals; `parity.json` holds the same, and more.

| | |
|---|---|
| Agreement of the first class | {exact["agreement"]:.4%} |
| Largest difference of a probability | {exact["largest_difference"]:.2e} (allowed {TOLERANCES["fp32"]:.0e}) |
| Accuracy, PyTorch | {accuracy["pytorch"]:.4f} |
| Accuracy, ONNX Runtime | {exact["accuracy"]:.4f} |
| Accuracy, the cached pipeline that training used | {accuracy["cached_pipeline"]:.4f} |
{_precisions(manifest, parity)}
## When it was trained

| metric | value |
|---|---|
{metrics}

## Use

With Upright installed (its base install needs no PyTorch):

    upright verify {name}          # hashes, and the same answers on this machine
    upright infer {name} IMAGE ...

In Python: `from upright.runtime.predictor import Predictor; Predictor("{name}")("image.png").label`
"""


def _precisions(manifest: dict[str, Any], parity: dict[str, Any]) -> str:
    """Of the card: a row for each precision, where there are several."""
    figures = parity["precisions"]
    if len(figures) == 1:
        return ""
    batches = list(figures["fp32"]["speed"])
    head = [
        "precision",
        "file",
        "kB",
        "accuracy",
        "points lost (95 %)",
        *(f"speed, batch {batch}" for batch in batches),
    ]
    rows = [head]
    notes = ""
    for name, figure in figures.items():
        low, high = figure["drop_interval"]
        lost = "-" if name == "fp32" else f"{figure['drop']:.2f} ({low:.2f} to {high:.2f})"
        speeds = [f"{figure['speed'][batch]['times_fp32']:.2f}" for batch in batches]
        size = f"{figure['bytes'] / 1000:.0f}"
        rows.append([name, f"`{MODELS[name]}`", size, f"{figure['accuracy']:.4f}", lost, *speeds])
        described = manifest["precisions"][name]
        floats = ", ".join(described["float_layers"])
        notes += f"- {name}: {described['how']}{f'; in float32 all the same: {floats}' if floats else ''}.\n"
    told = parity["machine"]
    return f"""
## Precisions

{markdown(rows)}
{notes}
Speed is relative to fp32, on one thread of: {told["processor"]} ({", ".join(told["instructions"])}). `verify` says
whether each gives the same answers on another machine.
"""
