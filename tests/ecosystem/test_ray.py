"""Ray Data with two workers on this machine; it needs the extra `ray`. The S3 is moto's, if it is installed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.runtime.bundles import ANGLES, write_orientation_bundle
from upright import Predictor
from upright.errors import BundleError, UserError
from upright.runtime.bundle import SUMS, Bundle, checksums

ray = pytest.importorskip("ray")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from pyarrow import fs  # noqa: E402

from upright.runtime import ray_data  # noqa: E402
from upright.runtime.ray_data import RayPredictor, infer_images  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]
DIGITS = ROOT / "export/digits"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.update(ENVIRONMENT)  # the workers import this package, too
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixteen digits in two folders, and six files that have no answer."""
    for number in range(16):
        folder = tmp_path / "photos" / ("even é" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(DIGITS / f"samples/{number:02d}.png", folder)
    bad = tmp_path / "photos/bad"  # the first in order, so that whole files of answers have only errors
    bad.mkdir()
    (bad / "empty.png").touch()
    (bad / "text.jpg").write_text("hello")
    (bad / "cut.png").write_bytes((DIGITS / "samples/00.png").read_bytes()[:60])
    (bad / "gone.png").symlink_to("nowhere")
    Image.new("L", (200, 200)).save(bad / "large.png")
    Image.fromarray(np.zeros((9, 9), np.int32)).save(bad / "deep.tif")
    return tmp_path / "photos"


def rows(answers: Path) -> list[dict[str, Any]]:
    """Return all answers by path, and check that no path has two."""
    table = pq.read_table(answers).sort_by("path")
    assert max(Counter(table["path"].to_pylist()).values()) == 1
    return list(table.to_pylist())


@pytest.mark.usefixtures("cluster")
def test_a_folder_and_its_resumption(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "MIN_FILE_IMAGES", 1)
    answers, digest = tmp_path / "answers", Bundle.open(DIGITS).digest

    def run() -> int:
        return infer_images(str(photos), str(DIGITS), str(answers), workers=2, max_pixels=30_000)

    assert run() == 22
    good = sorted([*photos.glob("even*/*"), *photos.glob("odd/*")])
    expected = {str(path): answer for path, answer in zip(good, Predictor(DIGITS).predict(good), strict=True)}
    errors = {}
    for row in rows(answers):
        assert list(row) == ["path", "label", "probability", "error", "bundle"] and row["bundle"] == digest
        if answer := expected.pop(row["path"], None):
            assert (row["label"], row["error"]) == (answer.label, None)
            assert row["probability"] == pytest.approx(answer.probability, abs=1e-5)
        else:
            assert row["label"] is None and row["probability"] is None
            errors[Path(row["path"]).name] = row["error"]
    assert not expected
    messages = {
        "empty.png": "in none of the formats",
        "text.jpg": "in none of the formats",
        "cut.png": "cannot be decoded",
        "gone.png": "does not exist",
        "large.png": r"limit of 30000 \(max_pixels\)",
        "deep.tif": "signed or 32-bit images have no agreed range",
    }
    assert errors.keys() == messages.keys() and all(re.search(messages[name], errors[name]) for name in errors)
    # A file has the same columns and types even if all its images have errors.
    assert len({str(pq.read_schema(path).remove_metadata()) for path in answers.iterdir()}) == 1
    assert run() == 0
    shutil.copy(DIGITS / "samples/00.png", photos / "new.png")
    assert run() == 1
    lost = max(answers.iterdir(), key=lambda path: pq.read_metadata(path).num_rows)
    count, others = pq.read_metadata(lost).num_rows, set(answers.iterdir()) - {lost}
    lost.write_bytes(lost.read_bytes()[:-9])
    assert run() == count and len(rows(answers)) == 23
    assert others < set(answers.iterdir()) and not lost.exists()


@pytest.mark.usefixtures("cluster")
def test_mistakes_are_found_before_the_work(photos: Path, tmp_path: Path) -> None:
    def run(images: Path = photos, bundle: Path = DIGITS, workers: int = 1, **options: Any) -> int:
        return infer_images(str(images), str(bundle), str(tmp_path / "answers"), workers=workers, **options)

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        run(tmp_path / "empty")
    with pytest.raises(UserError, match=r"workers must be at least 1, got 0\."):
        run(workers=0)
    with pytest.raises(UserError, match=r"cannot read 's4://bucket': Unrecognized .* Give a folder, or an address"):
        infer_images("s4://bucket", str(DIGITS), str(tmp_path / "answers"), workers=1)
    with pytest.raises(UserError, match=r"nope' does not exist"):
        run(tmp_path / "nope")
    with pytest.raises(BundleError, match="holds fp32, int8, not fp16"):
        run(precision="fp16")
    with pytest.raises(BundleError, match="has no signature"):
        run(key="key.pub")
    (tmp_path / "names").mkdir()
    shutil.copy(DIGITS / "samples/00.png", os.fsencode(tmp_path / "names") + b"/\xff.png")
    with pytest.raises(UserError, match=r"holds names in UTF-8, and '.*\\udcff\.png' is none; rename the file"):
        run(tmp_path / "names")
    assert not (tmp_path / "answers").exists()
    assert run() == 22
    other = shutil.copytree(DIGITS, tmp_path / "other")
    (other / "README.md").write_text("another")
    (other / SUMS).write_text(checksums(other))
    with pytest.raises(UserError, match="has no answers, or those of another bundle; give another folder"):
        run(bundle=other)
    pq.write_table(pa.table({"path": ["x"]}), tmp_path / "answers/foreign.parquet")
    with pytest.raises(UserError, match=r"foreign\.parquet' has no answers"):
        run()
    assert (tmp_path / "answers/foreign.parquet").exists()


@pytest.mark.usefixtures("cluster")
def test_a_run_stops_if_the_storage_fails(photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "bad")
    (photos / "zzz.png").symlink_to("zzz.png")  # an error of the file system, neither missing nor forbidden
    for _ in range(2):
        with pytest.raises(ray.exceptions.RayTaskError, match="errno 40"):
            infer_images(str(photos), str(DIGITS), str(tmp_path / "answers"), workers=1)
    (photos / "zzz.png").unlink()
    infer_images(str(photos), str(DIGITS), str(tmp_path / "answers"), workers=1)
    assert len(rows(tmp_path / "answers")) == 16


SCRIPT = """
import sys
from upright.runtime import ray_data
ray_data.MIN_FILE_IMAGES = 8
print(ray_data.infer_images("photos", sys.argv[1], "answers", workers=2))
"""


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/0.jpg")
    for number in range(1, 160):
        os.link(tmp_path / "photos/0.jpg", tmp_path / f"photos/{number}.jpg")
    command, folder = [sys.executable, "-c", SCRIPT, DIGITS], tmp_path / "answers"
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (folder.is_dir() and list(folder.iterdir())):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    assert 0 < int(again.stdout.splitlines()[-1]) < 160
    assert len(rows(folder)) == 160


@pytest.mark.usefixtures("cluster")
def test_the_class_in_a_dataset(tmp_path: Path) -> None:
    sky = write_orientation_bundle(tmp_path / "export/sky")
    paths = [str(sky / f"samples/{number:02d}.png") for number in range(len(ANGLES))]
    dataset = ray.data.from_items([{"path": path, "number": n} for n, path in enumerate([*paths, "/nope.png"])])
    answers = dataset.map_batches(
        RayPredictor,
        fn_constructor_args=(str(sky),),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()
    answers.sort(key=lambda row: row["number"])
    assert list(answers[0]) == ["path", "number", "angle", "confidence", "error", "bundle"]
    assert [row["path"] for row in answers] == [*paths, "/nope.png"]
    for row, angle in zip(answers, ANGLES, strict=False):
        assert abs(row["angle"] - angle) % 360 == pytest.approx(0, abs=0.01) and row["confidence"] > 0.1
    assert answers[-1]["angle"] is None and answers[-1]["error"] == "The image does not exist."


@pytest.mark.usefixtures("cluster")
def test_a_bucket(photos: Path) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
        images, answers = (f"s3://key:secret@bucket/{name}{query}" for name in ("photos", "answers"))
        filesystem, _ = fs.FileSystem.from_uri(images)
        filesystem.create_dir("bucket")
        (photos / "bad/gone.png").unlink()
        fs.copy_files(str(photos), "bucket/photos", destination_filesystem=filesystem)
        assert infer_images(images, str(DIGITS), answers, workers=2) == 21
        assert infer_images(images, str(DIGITS), answers, workers=2) == 0
        table = pq.read_table("bucket/answers", filesystem=filesystem)
        assert len(table) == 21 and table["error"].null_count == 17  # without max_pixels, large.png has an answer
        assert "bucket/photos/odd/01.png" in table["path"].to_pylist()
        with pytest.raises(UserError, match="' holds no images"):
            infer_images(images.replace("photos", "nope"), str(DIGITS), answers, workers=2)
    finally:
        server.stop()


@pytest.mark.usefixtures("cluster")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/how-to/many-images.md; its script runs in a process of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DIGITS, tmp_path / "export/digits")
    shutil.copytree(DIGITS / "samples", tmp_path / "photos")
    page = (ROOT / "docs/how-to/many-images.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n((?:.*\n)*?)```$", page, re.M)
    for block in blocks:
        if block.startswith("# classify.py\n"):
            Path("classify.py").write_text(block)
            command = [sys.executable, "classify.py"]
            process = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
            assert process.stdout.splitlines()[-1] == "16 new answers"
        else:
            exec(block, namespace)
    assert len(blocks) == 3 and len(namespace["table"]) == len(namespace["labels"]) == 16


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/many_images.py", "--quick"]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| 2 \| \d+, \d+ \| \*\*\d", result.stdout, re.M), result.stdout
