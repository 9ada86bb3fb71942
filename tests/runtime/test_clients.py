"""The clients of the page "Use a bundle from other languages" give the answers of Upright.

Each client is installed by the commands of the page, and skipped if its toolchain, a library or the network is missing.
Set `CLASSPATH` to use jars that you have in place of Maven's.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.conftest import ROOT
from tests.runtime.bundles import photograph, write_bundle, write_orientation_bundle
from tests.test_docs import PAGES, blocks, lines
from upright.architectures.lenet import LeNet
from upright.images import ImageSpec
from upright.runtime.predictor import OrientationPredictor, Predictor, open_predictor

PAGE = PAGES["docs/how-to/other-languages.md"]
COMMANDS = [line for block in blocks(PAGE) if block.language == "sh" for line in lines(block)]
MISSING = re.compile(
    r"ENOTFOUND|ECONN\w+|EAI_AGAIN|ETIMEDOUT|Unknown host \S+|Could not transfer \w+|fatal error: \S+ No such file.*"
)
"""Messages of npm and Maven without a network, and of a compiler without a library."""
Row = tuple[str, float, str]
"""Class or angle, its probability or confidence, and the path."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


CLIENTS = {
    "javascript": ("npm install", ["node", "classify.mjs"]),
    "cpp": ("g++", ["./classify"]),
    "java": ("mvn", ["java", "-cp", os.environ.get("CLASSPATH", "jars/*"), "Classify.java"]),
}
"""The line of the page that installs or compiles a client, and the command that runs it."""


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a client that is ready to run, and its command."""
    start, command = CLIENTS[request.param]
    (line,) = (line for line in COMMANDS if line.startswith(start))
    folder = tmp_path_factory.mktemp(request.param)
    for block in blocks(PAGE):
        if block.name:
            (folder / block.name).write_text(block.content, encoding="utf-8")
    for program in (start.split()[0], command[0]):
        if not program.startswith("./") and not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if request.param == "java" and "CLASSPATH" in os.environ:
        return folder, command
    result = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    if missing := MISSING.search(result.stdout + result.stderr):
        pytest.skip(f"`{start}` of the page fails here: {missing[0]}")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, command


def rows(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        answer, score, path = line.split("\t")
        yield answer, float(score), path


def run(client: tuple[Path, list[str]], bundle: Path, paths: Sequence[Path]) -> list[Row]:
    folder, command = client
    result = subprocess.run(
        [*command, str(bundle), *map(str, paths)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    answers = list(rows(result.stdout))
    assert [path for _, _, path in answers] == list(map(str, paths))
    return answers


def check(
    answers: Sequence[Row], expected: Sequence[Sequence[float]], classes: Sequence[str], tolerance: float
) -> None:
    for (answer, score, path), row in zip(answers, expected, strict=True):
        if classes:
            assert answer == classes[int(np.argmax(row))], path
            assert score == pytest.approx(max(row), abs=tolerance), path
        else:
            assert (float(answer), score) == pytest.approx(row, abs=tolerance), path


def other_profile() -> bytes:
    """Return a colour profile in which red and green are exchanged, so that a client that applies it fails."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG files of several sizes, in colour and grey, with each orientation, and with a colour profile."""
    folder = tmp_path_factory.mktemp("jpegs")
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        pixels = photograph(30 * orientation, 24 + 13 * orientation, 3)[: 20 + 9 * orientation]
        pixels = (pixels * [1, 0.8, 0.5]).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{orientation}.jpg", exif=exif, progressive=orientation % 2 == 0)
        Image.fromarray(pixels).convert("L").save(folder / f"{orientation}-grey.jpg", exif=exif)
        Image.fromarray(pixels).save(folder / f"{orientation}-profile.jpg", icc_profile=other_profile())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of grey images, of colour images, and of the orientation."""
    folder = tmp_path_factory.mktemp("bundles")
    spec = ImageSpec(3, 32, 32, ("a", "b", "ß"), (0.5,) * 3, (0.25,) * 3)
    return {
        "grey": ROOT / "export/digits",
        "colour": write_bundle(folder / "colour", spec, LeNet),
        "orientation": write_orientation_bundle(folder / "orientation", channels=3),
    }


@pytest.mark.parametrize("name", ["grey", "colour", "orientation"])
def test_a_client_gives_the_answers_of_upright(
    client: tuple[Path, list[str]], bundles: dict[str, Path], jpegs: list[Path], name: str
) -> None:
    bundle = bundles[name]
    predictor: Predictor | OrientationPredictor = open_predictor(bundle)
    classes, output = predictor.spec.classes, predictor.task.output
    samples = json.loads((bundle / "samples/expected.json").read_text())
    answers = run(client, bundle, [bundle / sample["file"] for sample in samples])
    check(answers, [sample[output]["fp32"] for sample in samples], classes, 1e-4)
    expected = [predictor.run_outputs(predictor.decode(path)[None], [output])[output][0].tolist() for path in jpegs]
    check(run(client, bundle, jpegs), expected, classes, 1e-3)


def test_the_page_shows_an_answer_of_the_clients() -> None:
    (text,) = (block.content for block in blocks(PAGE) if block.language == "text")
    ((answer, score, path),) = rows(text)
    (sample,) = (s for s in json.loads((ROOT / "export/digits/samples/expected.json").read_text()) if s["file"] in path)
    row = sample["probabilities"]["fp32"]
    assert (answer, score) == (str(np.argmax(row)), pytest.approx(max(row), abs=1e-6))
