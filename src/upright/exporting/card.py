"""Texts about a bundle: the summary that `upright export` prints, and the ``README.md`` of the bundle."""

from collections.abc import Iterator
from typing import Any

from upright.exporting.harm import effect_tables
from upright.exporting.harm import summary as effect_summary
from upright.exporting.precision import TOLERANCES
from upright.runtime.bundle import MODELS, read_task
from upright.runtime.task import Task
from upright.tables import markdown

WORTHWHILE = 1.1
"""Smallest speed relative to float32 that is larger than the noise of the measurement."""

KINDS = {
    "classification": ("An image classifier", "Predictor", "label"),
    "multilabel": ("A classifier of images with any number of classes", "MultiLabelPredictor", "labels"),
    "orientation": ("A model that estimates by which angle an image is rotated", "OrientationPredictor", "angle"),
}
"""Model, predictor, and answer of the predictor, by task."""


def summary(parity: dict[str, Any], task: Task) -> Iterator[str]:
    """Yield the results of an export, line by line, from the content of ``parity.json``."""
    exact, max_drop = parity["precisions"]["fp32"], parity["max_drop"]
    degrees = f" ({exact['largest_difference_degrees']:.1e} degrees)" if "orientation" in parity else ""
    yield (
        f"{parity['images']} images: agreement {exact['agreement']:.2%}, largest difference "
        f"{exact['largest_difference']:.1e}{degrees}; {task.score} {parity['accuracy']['pytorch']:.4f} by PyTorch, "
        f"{exact['accuracy']:.4f} by ONNX Runtime."
    )
    if multilabel := parity.get("multilabel"):
        yield f"Macro F1 {exact['f1']:.4f}, with thresholds that maximise it: {_thresholds(multilabel)}."
    if orientation := parity.get("orientation"):
        yield _threshold(orientation, exact)
    if effect := parity.get("effect"):
        yield f"Threshold of the confidence: {effect['threshold']:.4f}. {effect_summary(effect)}"
    lower = {name: metrics for name, metrics in parity["precisions"].items() if name != "fp32"}
    for name, metrics in lower.items():
        low, high = metrics["drop_interval"]
        speeds = {batch: speed["times_fp32"] for batch, speed in metrics["speed"].items()}
        yield (
            f"{name}: {task.score} {metrics['accuracy']:.4f}, a drop of {metrics['drop']:.2f} points (95 %: "
            f"{low:.2f} to {high:.2f}), {len(metrics['flipped'])} images with another answer; "
            f"{metrics['bytes'] / exact['bytes']:.2f} times the size of fp32, "
            f"{' and '.join(f'{value:.2f}' for value in speeds.values())} times its speed "
            f"(batch {' and '.join(speeds)})."
        )
        if max(speeds.values()) < WORTHWHILE:
            yield f"Note: {name} is not faster than fp32 on this machine."
    if lower and parity["smallest_drop_to_tell"] > max_drop:
        yield (
            f"Warning: {parity['sources']} source images are too few to detect a drop of {max_drop:g} points (the "
            f"smallest is {parity['smallest_drop_to_tell']:.2f}), so only the measured drop had to be within the limit."
        )


def _thresholds(multilabel: dict[str, Any]) -> str:
    return ", ".join(f"{name} {threshold:.3g}" for name, threshold in multilabel["thresholds"].items())


def _threshold(orientation: dict[str, Any], exact: dict[str, Any]) -> str:
    """Return a sentence about the threshold of the confidence of an orientation model."""
    sides = f"{exact['four_way']:.2%} of the answers choose the right side"
    if not orientation["share"]:
        return (
            f"{sides}. No threshold of the confidence leaves at most {orientation['max_wrong']:g} % of wrong sides, "
            "so `straighten` leaves every picture as it is; train longer, or raise --max-wrong."
        )
    return (
        f"{sides}. Threshold of the confidence: {orientation['threshold']:.3f}; {orientation['share']:.1%} of the "
        f"images are above it, {orientation['wrong']:.2%} of them with a wrong side."
    )


def card(manifest: dict[str, Any], parity: dict[str, Any]) -> str:
    """Return the ``README.md`` of a bundle, from the contents of ``manifest.json`` and ``parity.json``."""
    name, spec, provenance = manifest["name"], manifest["spec"], manifest["provenance"]
    exact, accuracy = parity["precisions"]["fp32"], parity["accuracy"]
    batch, height, width, channels = manifest["input"]["shape"]
    own_size = (height, width) == (spec["height"], spec["width"])
    resizing = "" if spec["resize"] == "none" or own_size else f"{spec['resize']} to {spec['height']} x {spec['width']}"
    if resizing and manifest["interpolation"] == "bicubic":
        resizing += " (bicubic)"
    mask = "" if manifest["mask"] == "none" else f", mask {manifest['mask']}"
    preprocessing = (f"{resizing} and normalisation" if resizing else "normalisation") + mask
    sizes = "any size" if height == "height" else "only this size"
    others = "".join(f", `{other}`" for other in manifest["other_outputs"])
    classes = manifest["spec"]["classes"]
    task = read_task(manifest)
    kind, predictor, answer = KINDS[task.name]
    class_row = f"| Classes | {', '.join(classes)} |\n" if classes else ""
    score = task.score.capitalize()
    confidence = f"\n{_threshold(parity['orientation'], exact)}\n" if "orientation" in parity else ""
    if multilabel := parity.get("multilabel"):
        confidence = f"""
An image has a class from a threshold of its probability. The thresholds maximise F1 on this split ({exact["f1"]:.4f} is
the mean of the classes): {_thresholds(multilabel)}.
"""
    turned = "" if classes else " They were turned by 0, 90, 180 and 270 degrees, without a change of a pixel."
    metrics = markdown([["metric", "value"], *([key, f"{value:.4f}"] for key, value in provenance["metrics"].items())])
    return f"""# {name}

{kind}, exported by Upright {provenance["versions"]["upright"]} from run `{provenance["run"]["name"]}`
(id {provenance["run"]["id"]}, git {provenance["git_commit"] or "unknown"}).

| | |
|---|---|
| Network | `{provenance["model"]["init_args"]["network"]["class_path"]}` |
| Data | `{provenance["data"]["class_path"]}`, split `{provenance["split"]["digest"][:16]}` |
{class_row}| Input | `images`: uint8 ({batch}, {height}, {width}, {channels}), {sizes} |
| Preprocessing inside the model | {preprocessing} |
| Output | `{task.output}`: float32 ({batch}, {task.columns}){others} |
| ONNX opset | {manifest["opset"]} |

## Parity on the validation split

PyTorch and ONNX Runtime answered all {parity["images"]} original images.{turned} `parity.json` has more details.

| | |
|---|---|
| Agreement on {task.answer} | {exact["agreement"]:.4%} |
| Largest difference of an answer | {exact["largest_difference"]:.2e} (allowed {TOLERANCES["fp32"]:.0e}) |
| {score}, PyTorch | {accuracy["pytorch"]:.4f} |
| {score}, ONNX Runtime | {exact["accuracy"]:.4f} |
| {score}, PyTorch on the cached images that training used | {accuracy["cached_pipeline"]:.4f} |
{confidence}{_abstention(parity)}{_precisions(manifest, parity, task)}
## Metrics of the training run

{metrics}
## Use

Install Upright; its base install needs no PyTorch. Then:

    upright verify {name}          # check the files, and compare predictions on this machine
    upright infer {name} IMAGE ...

In Python: `from upright import {predictor}; {predictor}("{name}")("image.png").{answer}`
"""


def _abstention(parity: dict[str, Any]) -> str:
    """Return the section about a spatial transformer that abstains, if there is one."""
    if not (effect := parity.get("effect")):
        return ""
    limit = f" It keeps the harm within {parity['max_harm']:g} points." if parity["max_harm"] is not None else ""
    return f"""
## Harm and gain

Below the confidence {effect["threshold"]:.4f}, the spatial transformer abstains: the image passes unchanged.{limit}
The images of the validation split were shown upright, and in {len(parity["angles"]) - 1} other rotations.

{effect_tables(effect)}"""


def _precisions(manifest: dict[str, Any], parity: dict[str, Any], task: Task) -> str:
    """Return the section that compares the precisions, if there are several."""
    precisions = parity["precisions"]
    if len(precisions) == 1:
        return ""
    batches = list(precisions["fp32"]["speed"])
    rows = [["precision", "file", "kB", task.score, "points lost (95 %)", *(f"speed, batch {n}" for n in batches)]]
    notes = ""
    for name, metrics in precisions.items():
        low, high = metrics["drop_interval"]
        points = "-" if name == "fp32" else f"{metrics['drop']:.2f} ({low:.2f} to {high:.2f})"
        speeds = [f"{metrics['speed'][batch]['times_fp32']:.2f}" for batch in batches]
        size, accuracy = f"{metrics['bytes'] / 1000:.0f}", f"{metrics['accuracy']:.4f}"
        rows.append([name, f"`{MODELS[name]}`", size, accuracy, points, *speeds])
        floats = ", ".join(manifest["precisions"][name]["float_layers"])
        notes += (
            f"- {name}: {manifest['precisions'][name]['how']}{f'. Layers in float32: {floats}' if floats else ''}.\n"
        )
    machine = parity["machine"]
    return f"""
## Precisions

{markdown(rows)}
{notes}
Speed is relative to fp32, on one thread of {machine["processor"]} ({", ".join(machine["instructions"])}).
`upright verify` checks that each precision gives the same predictions on another machine.
"""
