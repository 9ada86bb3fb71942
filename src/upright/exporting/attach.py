"""``upright attach``: straighten images in front of a foreign classifier, in one verified graph.

The steps are: read the preprocessing of the model, choose the threshold, write the graph, compare it with its parts run
apart on rotated images, and write the bundle.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from upright.errors import GateError, UserError
from upright.exporting.apart import ANGLES, Comparison, Photograph, fit, kind_of_scores, measure
from upright.exporting.bom import BOM, bom
from upright.exporting.foreign import Foreign
from upright.exporting.front import Decision, attached_graph
from upright.exporting.harm import effect_tables, summary
from upright.exporting.records import SAMPLE_COUNT, check_target, new_manifest, seal, write_records
from upright.files import check_name, file_hash, replacing_folder
from upright.image_paths import find_images, list_folders
from upright.images import LISTED_CLASSES, ImageSpec
from upright.options import Attach
from upright.runtime.bundle import MODELS, Bundle, write_json
from upright.runtime.predictor import OrientationPredictor, open_session
from upright.runtime.signature import read_signer
from upright.tables import markdown


def attach(options: Attach) -> int:
    """Write a bundle that straightens images, then classifies them with a foreign model.

    Returns:
        The exit code, 0.

    Raises:
        UserError: if a part cannot be used, or the preprocessing or the threshold is not known.
        GateError: if the graph differs from its parts, or the harm exceeds ``max_harm``.
    """
    target = Path(options.to)
    check_name(target.name)
    check_target(target, options.force, "--to")
    signer = read_signer(Path(options.sign)) if options.sign else None
    estimator = OrientationPredictor(options.orientation)
    bundle = estimator.bundle
    if any(isinstance(length, int) for length in bundle.manifest["input"]["shape"][:3]):
        raise UserError(f"'{options.orientation}' takes images of one form; export it without --size and --batch.")
    foreign = Foreign(options, estimator.spec.channels)
    spec = foreign.spec
    photographs = find_photographs(options.images, bundle, spec)
    labelled = photographs[0].label is not None
    threshold = options.threshold
    if threshold is None:
        threshold = bundle.threshold
    if threshold is None and options.max_harm is None:
        raise UserError(f"'{options.orientation}' records no threshold; give --threshold, or --max-harm to choose one.")
    if options.max_harm is not None and not labelled:
        raise UserError("--max-harm needs --images with one folder per class, with the names of the classes.")

    answers = None
    if labelled:
        print(f"Measuring harm and gain on {len(photographs)} images in {len(ANGLES)} rotations ...", flush=True)
        answers = measure(estimator, foreign, photographs, options.min_angle, options.padding)
        if options.max_harm is not None:
            threshold = answers.smallest_threshold(options.max_harm)
    assert threshold is not None
    effect = answers.effect(threshold) if answers else None
    decision = Decision(float(np.float32(threshold)), options.min_angle, options.padding)
    views = photographs[0].views(spec, options.padding)
    scores = foreign(fit(foreign, views, [0] * len(views), options.padding))[foreign.scores]
    kind = options.scores or kind_of_scores(scores)
    orientation = onnx.load_from_string(bundle.model("fp32").read_bytes())
    graph = attached_graph(orientation, foreign, decision, are_logits=kind == "logits")
    print(f"Comparing with the parts on {len(photographs)} images in {len(ANGLES)} rotations ...", flush=True)
    session = open_session(graph.SerializeToString())
    comparison = Comparison(session, estimator, foreign, decision, kind == "logits")
    samples = []
    per_image = max(1, SAMPLE_COUNT // len(photographs))
    sampled = np.linspace(0, len(photographs) - 1, min(SAMPLE_COUNT, len(photographs))).astype(int).tolist()
    for number, photograph in enumerate(tqdm(photographs, unit="image", disable=None, leave=False)):
        views = photograph.views(spec, options.padding)
        decided = comparison.add(photograph.name, views)
        if number in sampled:
            label = "unknown" if photograph.label is None else spec.classes[photograph.label]
            description = {"name": Path(photograph.name).name, "label": label}
            # Different rotations of the images, whose decision rounding on another machine does not change.
            chosen = np.roll(np.flatnonzero(decided), -number)[:per_image]
            samples += [(description, views[i]) for i in chosen.tolist()]
    precision = comparison.metrics()
    if not samples:
        raise GateError(f"All images have the confidence of the threshold, {decision.threshold:g}; give another one.")

    with replacing_folder(target) as folder:
        path = folder / MODELS["fp32"]
        if not options.straightened:
            del graph.graph.output[-1]
        onnx.save(graph, path)
        parity = {
            "images": len(photographs),
            "angles": ANGLES,
            "max_harm": options.max_harm,
            "effect": effect,
            "precisions": {"fp32": precision | {"bytes": path.stat().st_size}},
        }
        manifest = _manifest(target.name, bundle, foreign, decision, kind, graph)
        write_records(folder, manifest, parity, card(manifest, parity), samples)
        write_json(folder / BOM, bom(manifest, parity, {path.name: file_hash(path)}))
        seal(folder, target, signer)
    print(
        f"{precision['views']} views: agreement {precision['agreement']:.2%}; the graph straightens "
        f"{precision['straightened']} of them (threshold {decision.threshold:.4f}). The scores are {kind}."
    )
    if effect:
        print(summary(effect))
    print(f"Bundle: {target}\nNext:   upright verify {target}")
    return 0


def find_photographs(folder: str | None, bundle: Bundle, spec: ImageSpec) -> list[Photograph]:
    """Return the images of a folder, or the samples of a bundle. Images in folders per class have labels.

    Raise a `UserError` if there are no images, or only some of the folders are classes.
    """
    if folder is None:
        named = zip(bundle.samples, bundle.sample_files, strict=True)
        return [Photograph(sample["file"], source, None) for sample, source in named]
    paths = list(find_images([folder]))
    names = {path.name for path in list_folders(Path(folder))} if Path(folder).is_dir() else set()
    unknown = names - set(spec.classes)
    if not names or unknown == names:
        return [Photograph(str(path), path, None) for path in paths]
    labels = {name: index for index, name in enumerate(spec.classes)}
    tops = [path.relative_to(folder).parts[0] for path in paths]
    if unknown := {top for top in tops if top not in labels}:
        raise UserError(f"'{folder}' holds folders of classes, but {sorted(unknown)[:5]} are no classes of the model.")
    return [Photograph(str(path), path, labels[top]) for path, top in zip(paths, tops, strict=True)]


def _manifest(
    name: str, bundle: Bundle, foreign: Foreign, decision: Decision, kind: str, graph: onnx.ModelProto
) -> dict[str, Any]:
    shape = (foreign.batch or "batch", "height", "width")
    manifest = new_manifest(name, foreign.spec, shape, ("torch", "onnx", "onnxruntime"))
    preprocessing = {key: value for key, value in vars(foreign.preprocessing).items() if key != "spec"}
    manifest["provenance"] |= {
        "model": {"file": foreign.path.name, "sha256": file_hash(foreign.path)},
        "orientation": {"name": bundle.manifest["name"], "sha256": bundle.digest},
    }
    return manifest | {
        "preprocessing": preprocessing | {"scores": kind},
        "orientation": vars(decision),
        "other_outputs": [output.name for output in graph.graph.output][1:],
        "opset": max(each.version for each in graph.opset_import if not each.domain),
        "precisions": {"fp32": {"tolerance": foreign.tolerance, "how": "the attached models", "float_layers": {}}},
    }


def card(manifest: dict[str, Any], parity: dict[str, Any]) -> str:
    """Return the ``README.md`` of an attached bundle."""
    name, spec, decision = manifest["name"], manifest["spec"], manifest["orientation"]
    parts, exact = manifest["provenance"], parity["precisions"]["fp32"]
    shape, others = manifest["input"]["shape"], "".join(f", `{other}`" for other in manifest["other_outputs"])
    facts = [
        ["part", "value"],
        ["Classifier", f"`{parts['model']['file']}`, SHA-256 `{parts['model']['sha256']}`"],
        ["Orientation", f"bundle `{parts['orientation']['name']}`, its SHA256SUMS `{parts['orientation']['sha256']}`"],
        ["Rotates", f"from confidence {decision['threshold']:.4f} and {decision['min_angle']:g} degrees on"],
        ["Classes", ", ".join(spec["classes"][:LISTED_CLASSES]) + (" ..." if spec["classes"][LISTED_CLASSES:] else "")],
        ["Input", f"`images`: uint8 ({', '.join(map(str, shape))}), any size"],
        ["Preprocessing inside the model", f"{spec['resize']} to {spec['height']} x {spec['width']}, normalisation"],
        ["Output", f"`probabilities`: float32 ({shape[0]}, {len(spec['classes'])}){others}"],
        ["ONNX opset", str(manifest["opset"])],
    ]
    allowed = exact["allowed_differences"]
    differences = [["output", "largest difference", "allowed"]]
    differences += [[f"`{key}`", f"{n:.1e}", f"{allowed[key]:.0e}"] for key, n in exact["largest_differences"].items()]
    return f"""# {name}

An image classifier behind a transformer that makes images upright, attached by Upright {parts["versions"]["upright"]}.
If the transformer is not sure, the image passes unchanged.

{markdown(facts)}
## Parity

The graph was compared with its parts run apart on {parity["images"]} images in {len(parity["angles"])} rotations.
They agree on the most probable class of {exact["agreement"]:.4%}. The graph straightens {exact["straightened"]} of
{exact["views"]} views. Differences are relative to the largest value of an output. Those of `orientation` are
lengths of a direction, and those of `straightened` are grey levels.

{markdown(differences, 2)}
## Harm and gain

{effect_tables(parity["effect"]) if parity["effect"] else "The images had no labels, so harm and gain are unknown."}
## Use

    upright verify {name}          # check the files, and compare predictions on this machine
    upright infer {name} IMAGE ...
"""
