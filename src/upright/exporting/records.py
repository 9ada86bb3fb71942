"""The files around the models of a bundle: samples, manifest, parity, README and hashes."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from upright.errors import UserError
from upright.files import check_replaceable
from upright.images import ImageSpec, Pixels
from upright.runtime.bundle import (
    EXPECTED,
    FORMAT,
    MANIFEST,
    MODELS,
    PARITY,
    SAMPLES,
    SUMS,
    checksums,
    file_hashes,
    spec_entries,
    write_json,
)
from upright.runtime.predictor import open_session, run_batch
from upright.runtime.signature import SIGNATURE, write_signature
from upright.runtime.task import task_of

SAMPLE_COUNT = 16


def check_target(target: Path, force: bool, option: str) -> None:
    """Raise a `UserError` if a bundle cannot be written to a folder. ``option`` names another folder."""
    check_replaceable(target, "a bundle", SUMS)
    if target.exists() and not force:
        raise UserError(f"Bundle '{target}' exists: --force replaces it, {option} writes another one.")


def new_manifest(name: str, spec: ImageSpec, shape: Sequence[int | str], packages: Iterable[str]) -> dict[str, Any]:
    """Return the entries of ``manifest.json`` that describe images and answers, and the versions of packages.

    Args:
        name: name of the bundle.
        spec: format of the images.
        shape: batch, height and width of the input; text for a free axis.
        packages: packages that wrote the bundle, beside Upright.
    """
    task = task_of(spec)
    return {
        "format": FORMAT,
        "name": name,
        **spec_entries(spec),
        "input": {"name": "images", "dtype": "uint8", "shape": [*shape, spec.channels]},
        "output": {"name": task.output, "dtype": "float32", "shape": [shape[0], task.columns]},
        "provenance": {"versions": {package: version(package) for package in ("upright", *packages)}},
    }


def write_png(path: Path, pixels: Pixels) -> None:
    """Write the exact pixels of an image."""
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)


def write_records(
    folder: Path,
    manifest: dict[str, Any],
    parity: dict[str, Any],
    card: str,
    samples: Iterable[tuple[dict[str, Any], Pixels]],
) -> None:
    """Write manifest, results of the comparison and README, and samples with the answers of each model of the bundle.

    The samples are images with their descriptions.
    """
    write_json(folder / PARITY, parity)
    write_json(folder / MANIFEST, manifest)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / SAMPLES).mkdir()
    sessions = {name: open_session(folder / MODELS[name]) for name in manifest["precisions"]}
    expected = []
    for number, (description, pixels) in enumerate(samples):
        file = f"{SAMPLES}/{number:02d}.png"
        write_png(folder / file, pixels)
        rows = {name: run_batch(session, pixels[None])[0][0].tolist() for name, session in sessions.items()}
        expected.append({"file": file, **description, manifest["output"]["name"]: rows})
    write_json(folder / EXPECTED, expected)


def seal(folder: Path, target: Path, signer: Any) -> None:
    """Write the hashes of all files of a bundle that becomes ``target``, and its signature, unless ``signer`` is None.

    Nothing is written into the folder after that.
    """
    if signer:
        write_signature(folder / SIGNATURE, target, file_hashes(folder), signer)
    (folder / SUMS).write_text(checksums(folder))
