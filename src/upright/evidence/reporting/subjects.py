"""Load the models of a report. Each one maps images to probabilities by PyTorch or by ONNX Runtime."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from upright.architectures.spatial_transformer import Observation, SpatialTransformer, observing
from upright.checkpoint import KEY, find_checkpoint, read_checkpoint
from upright.data.configs import build_data, read_data
from upright.data.datamodule import ImageDataModule
from upright.errors import UprightError, UserError
from upright.exporting.abstention import abstaining
from upright.exporting.harm import effect_tables
from upright.exporting.parity import fitted
from upright.images import ImageSpec
from upright.recipes import Recipe, build
from upright.runs.folder import ROOT
from upright.runtime.bundle import ARCHIVE_SUFFIX, MANIFEST, PARITY, SUMS, Bundle
from upright.runtime.predictor import open_session, run_batch
from upright.training.model import Model
from upright.training.restoring import check_task, restore

Floats = npt.NDArray[np.float64]

NO_TRANSFORMER = "it has no spatial transformer"
DEFAULT_PRECISIONS = ("fp32",)
BATCH = 64
"""Images per call of a graph with a free batch size."""


class BatchOutput(NamedTuple):
    """The output of a model for a batch.

    Args:
        probabilities: probabilities of the classes, ``(B, K)``; without classes, angles and confidences ``(B, 2)``.
        observations: observations of the spatial transformers, in their order; empty without transformers.
    """

    probabilities: Floats
    observations: list[Observation]


class Origin(NamedTuple):
    """Metadata of a model file, from ``path`` on the command line. Fields that it does not record are None or empty.

    ``name`` is that of the run or of the bundle's folder, and ``digest`` that of the split.
    """

    path: str
    name: str
    spec: ImageSpec
    network: Recipe | None
    data: Recipe | None
    digest: str | None
    run: dict[str, Any]
    git_commit: str | None
    bundle: Bundle | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate.

    Args:
        origin: metadata of the file.
        kind: ``PyTorch``, or ``ONNX fp32`` and so on.
        file: file with the weights.
        folder: folder of the run; None if the run of a bundle is no longer in ``checkpoints``.
        unseen: True if the model was certainly not trained on the images of the report.
        predict: function from uint8 images ``(B, C, H, W)`` to a `BatchOutput`.
        model: the PyTorch model, whose transformers are observed; None without observations.
        unobserved_reason: reason for missing observations.
        name: name that is unique in the report.
        identity: function from images to the probabilities at the identity pose of all transformers; None for a bundle,
            and for transformers that do not vote.
        effect: harm and gain of a transformer that abstains, from the ``parity.json`` of a bundle; None without.
    """

    origin: Origin
    kind: str
    file: Traversable
    folder: Path | None
    unseen: bool
    predict: Callable[[Tensor], BatchOutput]
    model: Model | None = None
    unobserved_reason: str = ""
    name: str = ""
    identity: Callable[[Tensor], Floats] | None = None
    effect: dict[str, Any] | None = None

    def output(self, images: Tensor) -> BatchOutput:
        """Return the output for uint8 images ``(B, C, H, W)``.

        Raises:
            UserError: if it has NaN or infinity.
        """
        output = self.predict(images)
        if not np.isfinite(output.probabilities).all():
            raise UserError(f"'{self.origin.path}' predicts NaN or infinity; train or export it again.")
        return output


class Group(NamedTuple):
    """Models, and the data for all of them."""

    subjects: list[Subject]
    data: ImageDataModule


def open_subjects(
    paths: Sequence[str], data: str | None = None, precisions: Sequence[str] = DEFAULT_PRECISIONS
) -> Group:
    """Load checkpoints, runs and bundles (each in all ``precisions``), and the data of the first one.

    ``data`` is the path of a YAML of data to use instead.

    Raises:
        UserError: if a path is not a model or cannot be loaded; if classes or channels differ; if splits differ and
            ``data`` is None; if the data of the first model are unknown or have changed.
    """
    origins = [_origin(path) for path in paths]
    first = origins[0]
    if tuple(precisions) != DEFAULT_PRECISIONS and not any(origin.bundle for origin in origins):
        raise UserError("--precision chooses among the models of a bundle, but none of these models is a bundle.")
    for other in origins[1:]:
        specs = [each.spec for each in (other, first)]
        if len({(spec.task, spec.classes, spec.channels) for spec in specs}) > 1:
            raise UserError(
                f"'{other.path}' has {other.spec.summary}; '{first.path}' has {first.spec.summary}. Give models with "
                "the same channels and classes."
            )
        if not data and other.digest != first.digest:
            raise UserError(
                f"'{other.path}' and '{first.path}' were made from different data, or from different splits; choose "
                "the data for both with --data."
            )
    shared = read_data(data) if data else None
    subjects = []
    for origin in origins:
        if origin.bundle is None:
            subject, shared = _open_checkpoint(origin, shared)
            subjects.append(subject)
            continue
        shared = shared or _data_of(origin)
        check_task(origin.spec, shared, origin.path)
        # A bundle does not hold hashes of its training images, only the digest of the split.
        unseen = shared.manifest.digest == origin.digest
        subjects += [_open_bundle(origin, origin.bundle, each, unseen) for each in dict.fromkeys(precisions)]
    assert shared is not None
    return Group(_with_names(subjects), shared)


def _origin(path: str) -> Origin:
    folder = Path(path)
    bundle, record = None, dict[str, Any]()
    if folder.name.endswith(ARCHIVE_SUFFIX) or (folder / SUMS).is_file() or (folder / MANIFEST).is_file():
        bundle = Bundle.open(folder)
        name, spec, record = bundle.name, bundle.spec, bundle.manifest["provenance"]
    elif folder.exists() and not (folder.is_file() or (folder / "best.ckpt").is_file()):
        raise UserError(
            f"'{path}' is neither a run (it has no best.ckpt) nor a bundle (no {SUMS}); give a checkpoint, the folder "
            "of a run, or a bundle."
        )
    else:
        record = read_checkpoint(path)[KEY]
        name, spec = record["run"]["name"], ImageSpec.from_dict(record["spec"])

    # The manifest of a bundle from elsewhere may hold anything here.
    def entries(value: Any) -> dict[str, Any]:
        return value if isinstance(value, dict) else {}

    network, data = entries(entries(record["model"].get("init_args")).get("network")), entries(record.get("data"))
    return Origin(
        path,
        name,
        spec,
        network if "class_path" in network else None,
        data if "class_path" in data else None,
        entries(record.get("split")).get("digest"),
        entries(record.get("run")),
        record.get("git_commit"),
        bundle,
    )


def _data_of(origin: Origin) -> ImageDataModule:
    """Build the data of a bundle. Raise a `UserError` if they have changed since the training."""
    if origin.data is None:
        raise UserError(f"Bundle '{origin.path}' does not record its data; give data with --data.")
    data = build_data(origin.data, origin.path)
    if data.manifest.digest != origin.digest:
        raise UserError(
            f"The data of '{origin.path}' have changed since the training: other images, or other splits. Restore "
            "them, or give data with --data."
        )
    return data


def _open_checkpoint(origin: Origin, data: ImageDataModule | None) -> tuple[Subject, ImageDataModule]:
    restored = restore(origin.path, data)
    model = restored.classifier.cpu().model.eval()

    @torch.no_grad()
    def predict(images: Tensor) -> BatchOutput:
        with observing() as observations:
            logits = model(images)
        for each in observations:
            # Many outputs are stored, and only the network needs the transformed images.
            each.output = each.output.new_empty(0)
        return BatchOutput(model.answers(logits).double().numpy(), observations)

    def identity(images: Tensor) -> Floats:
        with abstaining(model):
            return predict(images).probabilities

    file = find_checkpoint(origin.path)
    transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
    observed = (model, "") if transformers else (None, NO_TRANSFORMER)
    # `restore` refuses images that the model was trained on, if the checkpoint records them.
    subject = Subject(origin, "PyTorch", file, file.parent, origin.digest is not None, predict, *observed)
    if transformers and all(transformer.voting for transformer in transformers):
        subject = replace(subject, identity=identity)
    return subject, restored.image_data("A report distorts original images")


def _has_transformer(model: Model) -> bool:
    return any(isinstance(module, SpatialTransformer) for module in model.modules())


def _open_bundle(origin: Origin, bundle: Bundle, precision: str, unseen: bool) -> Subject:
    session = open_session(bundle.model(precision))
    batch, *size, _ = session.get_inputs()[0].shape
    fixed_size = (size[0], size[1]) if all(isinstance(side, int) for side in size) else None
    step = batch if isinstance(batch, int) else BATCH
    thetas = [name for name in bundle.manifest["other_outputs"] if name.partition("_")[0] == "theta"]
    model, unobserved_reason = _observed_model(origin, bool(thetas))
    thetas, template = (thetas, _observations(model)) if model else ([], [])

    def predict(images: Tensor) -> BatchOutput:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        if fixed_size:
            pixels = np.stack([fitted(image, fixed_size, bundle.spec) for image in pixels])
        outputs = [
            run_batch(session, pixels[start : start + step], [bundle.task.output, *thetas])
            for start in range(0, len(pixels), step)
        ]
        probabilities, *values = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return BatchOutput(probabilities.astype(float), _with_thetas(template, [*map(torch.from_numpy, values)]))

    kind, file, folder = f"ONNX {precision}", bundle.model(precision), _run_folder(origin.run)
    effect = _effect(bundle)
    return Subject(origin, kind, file, folder, unseen, predict, model, unobserved_reason, effect=effect)


def _effect(bundle: Bundle) -> dict[str, Any] | None:
    """Return harm and gain from the record of a bundle; None if it has none, or another form."""
    try:
        effect: dict[str, Any] = json.loads((bundle.files / PARITY).read_text(encoding="utf-8"))["effect"]
        effect_tables(effect)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return effect


def _run_folder(run: dict[str, Any]) -> Path | None:
    """Find the folder of the run with this name and id."""
    for folder in (*ROOT.glob("*"), *ROOT.glob("*/*")):
        if folder.name == run.get("name") and (best := folder / "best.ckpt").is_file():
            with contextlib.suppress(UprightError):
                if read_checkpoint(best)[KEY]["run"]["id"] == run.get("id"):
                    return folder
    return None


def _observed_model(origin: Origin, has_theta: bool) -> tuple[Model | None, str]:
    """Return the model of a bundle whose spatial transformers can be observed, or the reason why there is none.

    The structure of the network defines the meaning of theta. Its weights are not used.
    """
    if not origin.spec.classes:
        return None, NO_TRANSFORMER
    try:
        if origin.network is None:
            raise UserError("the manifest does not record the network")
        with torch.random.fork_rng(devices=[]):
            network = build(origin.network)(origin.spec.input_shape, len(origin.spec.classes))
    except (UprightError, TypeError, ValueError) as error:  # this machine may have no such class, or another one
        unknown = (
            "the meaning of theta is unknown" if has_theta else "it is unknown whether it has a spatial transformer"
        )
        return None, f"{unknown}: {error}"
    model = Model(origin.spec, network).eval()
    if not _has_transformer(model):
        return None, NO_TRANSFORMER
    if not has_theta:
        return None, "the bundle has no output theta; `upright export --outputs theta` adds it"
    return model, ""


@torch.no_grad()
def _observations(model: Model) -> list[Observation]:
    """Return the observations of one pass: the transformers in order, each with its predecessor."""
    with observing() as observations:
        model(torch.zeros(1, *model.spec.input_shape))
    return observations


def _with_thetas(template: list[Observation], thetas: list[Tensor]) -> list[Observation]:
    """Return the observations of the same transformers with the theta of a graph."""
    observations: dict[int, Observation] = {}
    for each, theta in zip(template, thetas, strict=True):
        previous = observations[id(each.before)] if each.before else None
        observations[id(each)] = replace(each, theta=theta, votes=None, before=previous)
    return list(observations.values())


def _with_names(subjects: list[Subject]) -> list[Subject]:
    """Return the subjects, each with the shortest name that is unique among them."""
    forms = [
        (each.origin.name, f"{each.origin.name} ({each.kind})", f"{each.origin.name} ({each.kind}, {each.origin.path})")
        for each in subjects
    ]
    named = []
    for subject, names in zip(subjects, forms, strict=True):
        unique = [name for name, others in zip(names, zip(*forms, strict=True), strict=True) if others.count(name) == 1]
        if not unique:
            raise UserError(f"'{subject.origin.path}' is given twice; give different models.")
        named.append(replace(subject, name=unique[0]))
    return named
