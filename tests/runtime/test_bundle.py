import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from copy import deepcopy
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import Upright
from tests.runtime.bundles import write_multilabel_bundle, write_orientation_bundle
from upright.errors import UprightError
from upright.runtime.bundle import EXPECTED, SUMS, Bundle, checksums, write_archive


def files(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def test_one_changed_bit_in_any_file_is_refused(bundle: Path) -> None:
    choose = random.Random(0)
    Bundle.open(bundle)
    for path in files(bundle):
        content = path.read_bytes()
        for _ in range(5):
            position, bit = choose.randrange(len(content)), choose.randrange(8)
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(
                UprightError, match=rf"damaged or was changed: .*{path.name if path.name != SUMS else ''}"
            ):
                Bundle.open(bundle)
        path.write_bytes(content)
    Bundle.open(bundle)


def test_added_removed_and_empty_files_are_refused(bundle: Path) -> None:
    (bundle / "extra.txt").write_text("x")
    with pytest.raises(UprightError, match=r"extra\.txt"):
        Bundle.open(bundle)
    (bundle / "extra.txt").unlink()
    (bundle / "samples/03.png").unlink()
    with pytest.raises(UprightError, match=r"03\.png"):
        Bundle.open(bundle)
    (bundle / "samples/03.png").touch()
    with pytest.raises(UprightError, match=r"03\.png"):
        Bundle.open(bundle)


def rewrite(bundle: Path, **changes: object) -> None:
    """Change the manifest, and update the hashes."""
    manifest = json.loads((bundle / "manifest.json").read_text()) | changes
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / SUMS).write_text(checksums(bundle))


def test_another_format_is_refused(bundle: Path, upright: Upright) -> None:
    for number, advice in ((3, "Install a newer Upright."), (1, "Export it again.")):
        rewrite(bundle, format=number)
        answer = upright("verify", bundle)
        expected = f"has format {number}, written by Upright {version('upright')}; this version reads 2. {advice}"
        assert answer.code == 2 and expected in answer.err


def test_the_task_follows_from_the_classes(bundle: Path, upright: Upright, tmp_path: Path) -> None:
    sky = write_orientation_bundle(tmp_path / "export/sky")
    answer = upright("verify", sky)
    assert answer.code == 0 and "hashes, format 2, 4 samples; fp32 within" in answer.out
    # Older bundles do not name their task, and are classifiers.
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest.pop("task", None)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    rewrite(bundle)
    assert upright("verify", bundle).code == 0
    for folder, task, other in ((sky, "classification", "orientation"), (bundle, "orientation", "classification")):
        rewrite(folder, task=task)
        answer = upright("verify", folder)
        assert answer.code == 2 and f"the task is '{task}', but its spec is one of {other}" in answer.err


def test_thresholds_of_classes_are_checked(upright: Upright, tmp_path: Path) -> None:
    tags = write_multilabel_bundle(tmp_path / "export/tags")
    assert upright("verify", tags).code == 0
    for thresholds in ([0.5, 0.5], [0.5, 0.5, 2.0], [0.5, 0.5, float("nan")], [0.5, 0.5, "1"], "abc", 1, [[0.5]] * 3):
        rewrite(tags, multilabel={"thresholds": thresholds})
        answer = upright("verify", tags)
        assert answer.code == 2 and "is not a bundle that `upright export` wrote" in answer.err, thresholds
    rewrite(tags, multilabel={})  # by default 0.5
    assert upright("verify", tags).code == 0
    # A class that an answer gained or lost is an error, even if its probability hardly changed.
    samples = json.loads((tags / EXPECTED).read_text())
    value = samples[0]["probabilities"]["fp32"][0]
    samples[0]["probabilities"]["fp32"][0] = value + 0.05
    (tags / EXPECTED).write_text(json.dumps(samples))
    rewrite(tags, multilabel={"thresholds": [value + 0.02, 0.5, 0.5]})
    answer = upright("verify", tags)
    assert answer.code == 1 and "1 of 4 samples differ by up to 0.05" in answer.err
    assert "1 of them in the classes: samples/00.png" in answer.err


def test_verify_compares_orientations(upright: Upright, tmp_path: Path) -> None:
    sky = write_orientation_bundle(tmp_path / "export/sky")
    original = json.loads((sky / EXPECTED).read_text())

    def verify(change: Callable[[list[list[float]]], object]) -> tuple[int, str]:
        samples = deepcopy(original)
        change([sample["orientation"]["fp32"] for sample in samples])
        (sky / EXPECTED).write_text(json.dumps(samples))
        (sky / SUMS).write_text(checksums(sky))
        answer = upright("verify", sky)
        return answer.code, answer.err

    # 180 and -180 degrees are the same angle.
    assert verify(lambda rows: rows[3].__setitem__(0, -rows[3][0])) == (0, "")
    code, error = verify(lambda rows: rows[1].__setitem__(0, rows[1][0] + 2))
    assert code == 1 and "1 of 4 samples differ by up to 0.0078 (allowed 0.0001), 1 of them in the angle: " in error
    code, error = verify(lambda rows: rows[1].__setitem__(1, rows[1][1] + 0.01))
    assert code == 1 and "1 of 4 samples differ by up to 0.01 (allowed 0.0001), 0 of them in the angle: " in error
    code, error = verify(lambda rows: rows[1].append(0))
    assert code == 2 and "is not a bundle" in error


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 2}', '{"format": "x", "provenance": {}}'])
def test_a_folder_with_valid_hashes_but_another_manifest(upright: Upright, bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("verify", bundle)
    assert (
        answer.code == 2 and "is not a bundle that `upright export` wrote" in answer.err and answer.err.count("\n") == 1
    )


def test_no_bundle(upright: Upright, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nope"):
        answer = upright("verify", path)
        assert answer.code == 2 and "is not a bundle: it has no SHA256SUMS" in answer.err


def test_files_that_systems_add_are_ignored_and_links_of_a_cache_are_followed(bundle: Path, upright: Upright) -> None:
    """The cache of huggingface_hub has links to blobs, named by their hash, and each repository has .gitattributes."""
    blobs, snapshot = bundle.parent / "blobs", bundle.parent / "snapshots/1f0c"
    blobs.mkdir()
    for path in files(bundle):
        blob, link = blobs / sha256(path.read_bytes()).hexdigest(), snapshot / path.relative_to(bundle)
        path.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (snapshot / ".gitattributes").write_text("*.onnx filter=lfs\n")
    for folder in (snapshot, snapshot / "samples"):
        (folder / ".DS_Store").write_bytes(b"Bud1")
        (folder / "Thumbs.db").touch()
    assert upright("verify", snapshot).code == 0


def test_an_archive_is_read_in_place(bundle: Path, upright: Upright, tmp_path: Path) -> None:
    archive = tmp_path / "one.upright.zip"
    write_archive(bundle, archive)
    content = archive.read_bytes()
    write_archive(bundle, archive)
    assert archive.read_bytes() == content  # no dates
    before = set(tmp_path.rglob("*"))
    for path in (archive, bundle):
        answer = upright("verify", path)
        assert answer.code == 0 and f"Verified '{path}': hashes, format 2, 16 samples; fp32 within" in answer.out
    lines = [upright("infer", path, bundle / "samples").out for path in (archive, bundle)]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 16
    again = pickle.loads(pickle.dumps(Bundle.open(archive)))
    assert again.name == "one" and again.spec == Bundle.open(bundle).spec
    assert set(tmp_path.rglob("*")) == before
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    assert upright("verify", tmp_path / "unpacked").code == 0


def test_a_file_that_is_no_archive(upright: Upright, bundle: Path) -> None:
    answer = upright("verify", bundle / "README.md")
    assert answer.code == 2 and "is neither a folder nor an archive of a bundle: File is not a zip file." in answer.err


def test_verify_accepts_a_complete_bundle(upright: Upright, bundle: Path) -> None:
    answer = upright("verify", bundle)
    assert answer.code == 0 and "hashes, format 2, 16 samples; fp32 within" in answer.out


def test_verify_compares_the_speed_with_that_of_the_export(upright: Upright, bundle: Path) -> None:
    path = bundle / "parity.json"
    parity = json.loads(path.read_text())
    speeds = parity["precisions"]["fp32"]["speed"]
    assert set(speeds) == {"1", "64"}

    def rewritten(milliseconds: float) -> Path:
        for speed in speeds.values():
            speed["milliseconds"] = milliseconds
        path.write_text(json.dumps(parity))
        (bundle / SUMS).write_text(checksums(bundle))
        return bundle

    answer = upright("verify", rewritten(1e6), "--speed")
    assert answer.code == 0 and "fp32, batch 64: " in answer.out and "Warning" not in answer.out
    assert f"Export: {parity['machine']['processor']}, onnxruntime " in answer.out
    answer = upright("verify", rewritten(1e-6), "--speed", "--speed-factor", "3")
    assert answer.code == 0 and "Warning: slower than at the export by more than 3: fp32 at batch 1 (" in answer.out
    del parity["precisions"]["fp32"]["speed"]
    answer = upright("verify", rewritten(0), "--speed")
    assert answer.code == 2 and "does not record the speed of its export; export it again" in answer.err
    assert upright("verify", bundle).code == 0


def test_verify_expects_a_hash(upright: Upright, bundle: Path) -> None:
    digest = sha256((bundle / SUMS).read_bytes()).hexdigest()
    assert upright("verify", bundle, "--expect", digest).code == 0
    (bundle / "README.md").write_text("forged")
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("verify", bundle, "--expect", digest)
    assert answer.code == 2 and "is not the expected bundle: its SHA256SUMS has the SHA-256 " in answer.err


def test_verify_detects_other_predictions(upright: Upright, bundle: Path) -> None:
    expected = json.loads((bundle / "samples/expected.json").read_text())
    expected[3]["probabilities"]["fp32"].reverse()
    (bundle / "samples/expected.json").write_text(json.dumps(expected))
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("verify", bundle)
    assert answer.code == 1 and "1 of 16 samples" in answer.err and "samples/03.png" in answer.err


def test_verify_detects_a_model_of_other_classes(upright: Upright, bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    onnx.helper.set_model_props(model, {"upright": json.dumps({"classes": list("9876543210"), "format": 2})})
    onnx.save(model, bundle / "model.onnx")
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("verify", bundle)
    assert answer.code == 1 and "differ from the manifest" in answer.err


def test_a_model_that_onnxruntime_refuses(upright: Upright, bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(np.random.default_rng(0).bytes(1000))
    (bundle / SUMS).write_text(checksums(bundle))
    answer = upright("verify", bundle)
    assert answer.code == 2 and "cannot load" in answer.err and "Traceback" not in answer.err
