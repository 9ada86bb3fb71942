import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Upright
from upright.runtime.predictor import Predictor


@pytest.fixture
def expected(bundle: Path) -> dict[str, dict[str, object]]:
    return {sample["file"]: sample for sample in json.loads((bundle / "samples/expected.json").read_text())}


def best(sample: dict[str, object]) -> tuple[str, float]:
    probabilities = sample["probabilities"]["fp32"]
    return str(int(np.argmax(probabilities))), max(probabilities)


def test_every_format_gives_the_answers_of_the_bundle(upright: Upright, bundle: Path, expected: dict) -> None:
    images = [bundle / file for file in expected]
    jsonl = [json.loads(line) for line in upright("infer", bundle, *images, "--format", "jsonl").out.splitlines()]
    rows = list(csv.DictReader(upright("infer", bundle, bundle / "samples", "--format", "csv").out.splitlines()))
    table = upright("infer", bundle, *images).out.splitlines()
    for sample, path, record, row, line in zip(expected.values(), images, jsonl, rows, table, strict=True):
        label, probability = best(sample)
        assert (record["path"], record["label"]) == (str(path), label)
        assert record["probability"] == pytest.approx(probability, abs=1e-4)
        assert (row["path"], row["label"]) == (str(path), label)
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-4)
        assert line.split() == [label, f"{probability:.4f}", str(path)]


def test_top(upright: Upright, bundle: Path) -> None:
    answer = upright("infer", bundle, bundle / "samples/00.png", "--top", 3, "--format", "jsonl")
    top = json.loads(answer.out)["top"]
    assert len(top) == 3 and top == sorted(top, key=lambda entry: -entry["probability"])
    header, row = upright("infer", bundle, bundle / "samples/00.png", "--top", 2, "--format", "csv").out.splitlines()
    assert header == "path,label_1,probability_1,label_2,probability_2" and len(row.split(",")) == 5
    answer = upright("infer", bundle, bundle / "samples/00.png", "--top", 11)
    assert answer.code == 2 and "--top must be from 1 to 10" in answer.err


def test_a_bad_picture_is_reported_and_the_rest_goes_on(upright: Upright, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((bundle / "samples/01.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    good = [bundle / "samples/00.png", bundle / "samples/02.png"]
    answer = upright("infer", bundle, good[0], "text.png", "nope.png", "empty", "cut.png", good[1], "--format", "jsonl")
    assert answer.code == 2
    assert [json.loads(line)["path"] for line in answer.out.splitlines()] == [str(path) for path in good]
    errors = answer.err.splitlines()
    assert len(errors) == 4 and all(line.startswith("upright: error: ") for line in errors)
    for line, text in zip(
        errors, ("'text.png' is not a picture", "'nope.png' does not", "'empty' holds no", "cut.png"), strict=True
    ):
        assert text in line


def test_pictures_of_any_kind_and_size(upright: Upright, bundle: Path, tmp_path: Path, expected: dict) -> None:
    pixels = np.asarray(Image.open(bundle / "samples/00.png"))
    label, _ = best(expected["samples/00.png"])
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.merge("RGBA", [Image.new("L", (28, 28), 255)] * 3 + [Image.fromarray(pixels)]).save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "exif.png", exif=exif)
    Image.fromarray(pixels).resize((84, 84), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    names = ["rgb.png", "deep.png", "alpha.png", "exif.png", "cmyk.tif", "large.png"]
    answer = upright("infer", bundle, *names, "--format", "jsonl")
    records = [json.loads(line) for line in answer.out.splitlines()]
    assert answer.code == 0 and [record["path"] for record in records] == names
    assert [record["label"] for record in records] == [label] * 6
    same = [record["probability"] for record in records[:5]]
    assert max(same) - min(same) < 1e-4


def test_predictor_takes_whatever_there_is(bundle: Path, expected: dict) -> None:
    predictor, path = Predictor(bundle), bundle / "samples/05.png"
    label, probability = best(expected["samples/05.png"])
    for source in (path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        prediction = predictor(source)
        assert prediction.label == label and prediction.probability == pytest.approx(probability, abs=1e-4)
    assert list(prediction.probabilities) == list("0123456789")
    assert prediction.top(1) == [(prediction.label, prediction.probability)]


def test_batches_do_not_change_answers(bundle: Path) -> None:
    predictor = Predictor(bundle)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, size, dtype=np.uint8) for size in [(28, 28)] * 5 + [(40, 12)] * 3 + [(28, 28)]]
    alone = [predictor(image).probabilities for image in images]
    for batch_size in (1, 2, 7, 64):
        for one, other in zip(alone, predictor.predict(images, batch_size), strict=True):
            assert one == pytest.approx(other.probabilities, abs=1e-5)


def test_large_pictures_go_through_in_small_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upright.images.MAX_BATCH_PIXELS", 5000)
    sizes = []
    predictor = Predictor(bundle)
    session = predictor.session
    predictor.session = SimpleNamespace(
        get_inputs=session.get_inputs,
        run=lambda names, feed: sizes.append(feed["images"].shape) or session.run(names, feed),
    )
    pictures = [np.zeros((40, 50), np.uint8)] * 5 + [np.zeros((100, 100), np.uint8)] * 2
    assert len(predictor.predict(pictures)) == 7
    assert [shape[0] for shape in sizes] == [2, 2, 1, 1, 1]


def test_threads_share_a_predictor(bundle: Path) -> None:
    predictor, images = Predictor(bundle), sorted((bundle / "samples").glob("*.png"))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(predictor, images * 10))
    assert [prediction.label for prediction in together] == [predictor(image).label for image in images] * 10
