"""A model under examination: images to probabilities, whether PyTorch or ONNX Runtime answers."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from upright.exporting.parity import fitted
from upright.images import ImageSpec
from upright.recipes import Recipe, build
from upright.runs.folder import ROOT
from upright.runtime.bundle import MANIFEST, SUMS, Bundle
from upright.runtime.predictor import open_session, run_batch
from upright.training.model import Model
from upright.training.restoring import check_task, restore

Floats = npt.NDArray[np.float64]

PYTORCH = "PyTorch"
NONE = "it has no spatial transformer"
FULL = ("fp32",)


class Answer(NamedTuple):
    """What a model says of a batch.

    Args:
        probabilities: ``(B, K)``.
        seen: what its spatial transformers did, in order; none where it has none or does not tell.
    """

    probabilities: Floats
    seen: list[Observation]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be asked.

    Args:
        name: no other of the report's has it.
        called: what the run or the bundle's folder is called.
        kind: ``PyTorch``, or ``ONNX fp32`` and so on.
        path: as it was given.
        file: of its weights.
        network: its class path.
        run: name and id.
        folder: of that run; None where it is not in ``checkpoints`` any more, from which a bundle was exported.
        git_commit: that it was trained at, if that is known.
        trained_on: recipe of the data, if that is known.
        unseen: whether it is certain that it was trained on no image that it is judged by.
        model: resizes and normalises as it does, and shows what its transformers see; None where they do not tell.
        silent: why they do not.
        answer: asks it: uint8 ``(B, C, H, W)``.
    """

    name: str
    called: str
    kind: str
    path: str
    file: Path
    network: str
    run: dict[str, Any]
    folder: Path | None
    git_commit: str | None
    trained_on: Recipe | None
    unseen: bool
    model: Model | None
    silent: str
    answer: Callable[[Tensor], Answer]


class Found(NamedTuple):
    """What a file says of itself before it is loaded.

    Args:
        path: as it was given.
        name: of the run, or of the bundle's folder.
        bundle: if it is one, else a checkpoint.
        spec: what an image is.
        network: recipe, None where it is not told.
        data: recipe, likewise.
        digest: of the split, likewise.
        run: name and id, as far as they are told.
        git_commit: that it was trained at.
    """

    path: str
    name: str
    bundle: Bundle | None
    spec: ImageSpec
    network: Recipe | None
    data: Recipe | None
    digest: str | None
    run: dict[str, Any]
    git_commit: str | None


class Group(NamedTuple):
    """Models, and the data that all of them are asked about."""

    subjects: list[Subject]
    data: ImageDataModule


def open_subjects(paths: Sequence[str], data: str | None = None, precisions: Sequence[str] = FULL) -> Group:
    """Load models, and the data that they are judged by: those of the first one.

    Args:
        paths: checkpoints, folders of runs, and bundles.
        data: a YAML of data to take instead.
        precisions: of bundles.

    Raises:
        UserError: if one is neither, or cannot be loaded; if their classes or channels differ, or, without ``data``,
            their splits; if the data of the first are not known, or have changed.
    """
    found = [_find(path) for path in paths]
    first = found[0]
    if tuple(precisions) != FULL and not any(each.bundle for each in found):
        raise UserError("--precision says which models of a bundle are judged; none of these is a bundle.")
    for other in found[1:]:
        if (other.spec.classes, other.spec.channels) != (first.spec.classes, first.spec.channels):
            raise UserError(
                f"'{other.path}' knows {other.spec.task}, '{first.path}' {first.spec.task}; only models of the same "
                "task can be compared."
            )
        if not data and other.digest != first.digest:
            raise UserError(
                f"'{other.path}' and '{first.path}' were made of different data, or of different splits of them; "
                "--data says by which to judge both."
            )
    shown = read_data(data) if data else None
    loaded = []
    for each in found:
        if each.bundle is None:
            subject, shown = _checkpoint(each, shown)
            loaded.append(subject)
            continue
        shown = shown or _data_of(each)
        check_task(each.spec, shown, each.path)
        # A bundle does not hold the images that it was made of, but says which split they were.
        unseen = shown.manifest.digest == each.digest
        loaded += [_bundled(each, each.bundle, precision, unseen) for precision in dict.fromkeys(precisions)]
    assert shown is not None
    return Group(_named(loaded), shown)


def _find(path: str) -> Found:
    folder = Path(path)
    if (folder / SUMS).is_file() or (folder / MANIFEST).is_file():
        bundle = Bundle.open(folder)
        provenance = bundle.manifest["provenance"]
        return Found(
            path,
            folder.resolve().name,
            bundle,
            bundle.spec,
            _recipe(_dict(provenance["model"].get("init_args")).get("network")),
            _recipe(provenance.get("data")),
            _dict(provenance.get("split")).get("digest"),
            _dict(provenance.get("run")),
            provenance.get("git_commit"),
        )
    if not (folder.is_file() or (folder / "best.ckpt").is_file()) and folder.exists():
        raise UserError(
            f"'{path}' is neither a run (it has no best.ckpt) nor a bundle (no {SUMS}); give a checkpoint, the folder "
            "of a run, or a bundle."
        )
    ours = read_checkpoint(path)[KEY]
    return Found(
        path,
        ours["run"]["name"],
        None,
        ImageSpec.from_dict(ours["spec"]),
        ours["model"]["init_args"]["network"],
        ours["data"],
        ours["split"] and ours["split"]["digest"],
        ours["run"],
        ours["git_commit"],
    )


def _dict(told: Any) -> dict[str, Any]:
    return told if isinstance(told, dict) else {}


def _recipe(data: Any) -> Recipe | None:
    return data if isinstance(data, dict) and "class_path" in data else None


def _data_of(found: Found) -> ImageDataModule:
    """The data of a bundle, as far as they are the same still."""
    if found.data is None:
        raise UserError(f"Bundle '{found.path}' does not say what data it was made of; give some with --data.")
    data = build_data(found.data, found.path)
    if data.manifest.digest != found.digest:
        raise UserError(
            f"The data of '{found.path}' have changed since it was trained: other images, or other splits. "
            "Restore them, or say with --data what to use."
        )
    return data


def _subject(found: Found, **options: Any) -> Subject:
    """With what the file says of itself."""
    return Subject(
        name=found.name,
        called=found.name,
        path=found.path,
        network=found.network["class_path"] if found.network else "not known",
        run=found.run,
        git_commit=found.git_commit,
        trained_on=found.data,
        **options,
    )


def _checkpoint(found: Found, data: ImageDataModule | None) -> tuple[Subject, ImageDataModule]:
    restored = restore(found.path, data)
    model = restored.classifier.cpu().model.eval()

    @torch.no_grad()
    def answer(images: Tensor) -> Answer:
        with observing() as seen:
            logits = model(images)
        for each in seen:
            # Many answers are kept, and what was turned is only of use to the network.
            each.turned = each.turned.new_empty(0)
        return Answer(logits.softmax(dim=1).double().numpy(), seen)

    turns = _turns(model)
    silent = "" if turns else NONE
    file = find_checkpoint(found.path)
    subject = _subject(
        found,
        kind=PYTORCH,
        file=file,
        folder=file.parent,
        # `restore` refuses what is known to have been seen.
        unseen=found.digest is not None,
        model=model if turns else None,
        silent=silent,
        answer=answer,
    )
    return subject, restored.data


def _turns(model: Model) -> bool:
    return any(isinstance(module, SpatialTransformer) for module in model.modules())


def _bundled(found: Found, bundle: Bundle, precision: str, unseen: bool) -> Subject:
    session = open_session(bundle.model(precision))
    batch, *size, _ = session.get_inputs()[0].shape
    takes = (size[0], size[1]) if all(isinstance(side, int) for side in size) else None
    most = batch if isinstance(batch, int) else 64
    thetas = [name for name in bundle.manifest["other_outputs"] if name.partition("_")[0] == "theta"]
    model, shape, silent = None, list[Observation](), ""
    try:
        model = _untrained(found)
    except UprightError as error:  # a class of the user's that is not here; all else can be told
        what = "what theta means" if thetas else "whether it has a spatial transformer"
        thetas, silent = [], f"{what} is not known: {error}"
    else:
        if thetas:
            shape = _passes(model)
        else:
            turns, model = _turns(model), None
            silent = "the bundle does not give theta; exported with --outputs theta it does" if turns else NONE

    def answer(images: Tensor) -> Answer:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        pixels = np.stack([fitted(image, takes, bundle.spec) for image in pixels]) if takes else pixels
        outputs = [
            run_batch(session, pixels[start : start + most], ["probabilities", *thetas])
            for start in range(0, len(pixels), most)
        ]
        probabilities, *turned = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return Answer(probabilities.astype(float), _observations(shape, [torch.from_numpy(t) for t in turned]))

    return _subject(
        found,
        kind=f"ONNX {precision}",
        file=bundle.model(precision),
        folder=_run_folder(found.run),
        unseen=unseen,
        model=model,
        silent=silent,
        answer=answer,
    )


def _run_folder(run: dict[str, Any]) -> Path | None:
    """Where the run is that has this name and id; a bundle says no more."""
    for folder in (*ROOT.glob("*"), *ROOT.glob("*/*")):
        if folder.name == run.get("name") and (best := folder / "best.ckpt").is_file():
            with contextlib.suppress(UprightError):
                if read_checkpoint(best)[KEY]["run"]["id"] == run.get("id"):
                    return folder
    return None


def _untrained(found: Found) -> Model:
    """Knows what theta means; its weights do not matter.

    Raises:
        UserError: if the manifest does not tell the network, or it cannot be built here.
    """
    if found.network is None:
        raise UserError("the manifest does not tell the network")
    with torch.random.fork_rng(devices=[]):
        try:
            network = build(found.network)(found.spec.input_shape, len(found.spec.classes))
        except (TypeError, ValueError) as error:  # of other arguments than the class here takes
            raise UserError(str(error)) from None
    return Model(found.spec, network).eval()


@torch.no_grad()
def _passes(model: Model) -> list[Observation]:
    """The transformers in the order in which they act, each with the one before it."""
    with observing() as seen:
        model(torch.zeros(1, *model.spec.input_shape))
    return seen


def _observations(shape: list[Observation], thetas: list[Tensor]) -> list[Observation]:
    """The same transformers with the theta that a graph gave."""
    found: dict[int, Observation] = {}
    for each, theta in zip(shape, thetas, strict=True):
        before = found[id(each.before)] if each.before else None
        found[id(each)] = replace(each, theta=theta, before=before)
    return list(found.values())


def _named(subjects: list[Subject]) -> list[Subject]:
    """Each by its name, with what tells it from others of that name."""
    named = []
    for one in subjects:
        others = [other for other in subjects if other.called == one.called and other is not one]
        if any(other.kind == one.kind for other in others):
            named.append(replace(one, name=f"{one.called} ({one.kind}, {one.path})"))
        else:
            named.append(replace(one, name=f"{one.called} ({one.kind})") if others else one)
        if named[-1].name in [before.name for before in named[:-1]]:
            raise UserError(f"'{one.path}' is given twice; a model is compared with others.")
    return named
