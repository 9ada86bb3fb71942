"""`upright attach`: one graph that straightens images, then classifies them with a foreign model."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import helper, numpy_helper, parser

from tests.conftest import ROOT, Upright
from tests.exporting.attachable import (
    CLASSES,
    SIDE,
    image,
    weights,
    write_classifier,
    write_images,
    write_orientation_bundle,
)
from tests.exporting.test_bom import check_schema
from tests.runtime.test_signature import signs, write_keys
from upright.architectures.nin import NiN
from upright.errors import UserError
from upright.exporting import attach as attach_module
from upright.exporting.apart import Photograph, measure, straighten
from upright.exporting.bom import BOM
from upright.exporting.foreign import Foreign, read_records
from upright.exporting.front import Decision, attached_graph
from upright.files import file_hash
from upright.options import Attach
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import OrientationPredictor, Predictor, open_session, run_batch

NORMALISED = ("--mean", "0.5", "--std", "0.25")

# The upper left pixel of an image sets its orientation: the angle in units of 2 degrees, and the confidence.
ENCODED = """
<ir_version: 8, opset_import: ["" : 18]>
orientation (uint8[batch,height,width,3] images) => (float[batch,2] orientation)
<int64 first = {0}, int64[2] chosen = {0, 1}, float[2] scale = {2, 0.00392156862745098}>
{
  row = Gather <axis = 1> (images, first)
  pixel = Gather <axis = 1> (row, first)
  two = Gather <axis = 1> (pixel, chosen)
  values = Cast <to = 1> (two)
  orientation = Mul (values, scale)
}
"""
"""An angle above 180 degrees is out of the range of a bundle, but means the same."""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with an orientation bundle and labelled images."""
    write_orientation_bundle(tmp_path / "orientation")
    write_images(tmp_path / "images")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path


def encoded(pixels: npt.NDArray[np.uint8], angle: int, confidence: int = 255) -> npt.NDArray[np.uint8]:
    """Return an image with this orientation in its upper left pixel."""
    pixels = pixels.copy()
    pixels[0, 0, :2] = angle % 360 // 2, confidence
    return pixels


def front(folder: Path, decision: Decision, **options: Any) -> tuple[Foreign, Any]:
    """Return a foreign model, and a function that returns its images in the attached graph."""
    path = write_classifier(folder / "model.onnx")
    settings: Any = {"resize": "stretch", "range": "byte", "output": "output"} | options
    foreign = Foreign(Attach("-", str(path), **settings), 3)
    graph = attached_graph(parser.parse_model(ENCODED), foreign, decision, are_logits=True)
    session = open_session(graph.SerializeToString())

    def straightened(*images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = run_batch(session, np.stack(images), ["straightened"])[0]
        return result

    return foreign, straightened


def test_images_below_the_threshold_pass_unchanged_bit_by_bit(tmp_path: Path) -> None:
    pixels = image(0, SIDE, SIDE, seed=0)
    _, straightened = front(tmp_path, Decision(0.5, 4, "reflection"))
    unsure, oblique, sure = encoded(pixels, 90, 127), encoded(pixels, 2), encoded(pixels, 90, 128)
    results = straightened(unsure, oblique, sure)
    assert np.array_equal(results[0], unsure) and np.array_equal(results[1], oblique)
    assert np.abs(results[2] - np.rot90(sure, -1)).max() < 0.01


@pytest.mark.parametrize("size", [(16, 16), (24, 37), (41, 20)])
@pytest.mark.parametrize(("rule", "crop"), [("stretch", 1), ("stretch", 0.8), ("crop", 1), ("crop", 0.8), ("pad", 1)])
def test_a_quarter_turn_gives_what_the_upright_image_gives(
    rule: str, crop: float, size: tuple[int, int], tmp_path: Path
) -> None:
    foreign, straightened = front(tmp_path, Decision(0.5, 1, "zeros"), resize=rule, crop=crop)
    pixels = image(1, *size, seed=1)
    for angle in (0, 90, 180, 270):
        rotated = encoded(pixels, angle)
        upright = torch.from_numpy(np.rot90(rotated, -angle // 90).copy()).permute(2, 0, 1)[None].float()
        expected = foreign.preprocessing.fit(upright)[0].permute(1, 2, 0).numpy()
        assert np.abs(straightened(rotated)[0] - expected).max() < 0.05


@pytest.mark.parametrize(
    ("form", "options", "expected"),
    [
        ({}, {"range": "byte", "channels": "bgr"}, [0, 51, 255]),
        ({}, {"range": "signed"}, [1, -0.6, -1]),
        ({}, {"mean": (0.5, 0.2, 0), "std": (0.25,)}, [2, 0, 0]),
        ({}, {"mean": (100,), "std": (2,), "range": "byte"}, [77.5, -24.5, -50]),
        ({"dtype": "float16", "layout": "nhwc"}, {"range": "unit"}, [1, 0.2, 0]),
        ({"dtype": "uint8", "layout": "nhwc"}, {"range": None}, [255, 51, 0]),
    ],
)
def test_the_input_of_the_model(
    form: dict[str, Any], options: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    path = write_classifier(tmp_path / "model.onnx", **form)
    foreign = Foreign(Attach("-", str(path), resize="crop", output="output", **options), 3)
    values = foreign.preprocessing.convert(torch.tensor([255.0, 51, 0])[None, :, None, None].expand(1, 3, SIDE, SIDE))
    assert values.dtype == form.get("dtype", "float32")
    pixel = values[0, 3, 4] if "layout" in form else values[0, :, 3, 4]
    assert pixel.tolist() == pytest.approx(expected, abs=1e-3)


def test_images_in_one_batch_do_not_change_each_other(tmp_path: Path) -> None:
    _, straightened = front(tmp_path, Decision(0.5, 1, "border"), resize="crop", crop=0.8)
    pixels = image(2, 20, 33, seed=2)
    views = [encoded(pixels, angle, confidence) for angle, confidence in ((0, 255), (90, 255), (200, 255), (90, 0))]
    together = straightened(*views)
    for view, row in zip(views, together, strict=True):
        assert np.abs(straightened(view)[0] - row).max() < 1e-3


def test_the_independent_rotation_is_numpys_at_quarter_turns() -> None:
    pixels = torch.rand(2, 3, 8, 13)
    for quarters in range(-4, 5):
        expected = torch.rot90(pixels, -quarters, (2, 3))
        assert torch.allclose(straighten(pixels, 90 * quarters, "zeros"), expected, atol=1e-5)
    up = torch.zeros(1, 1, 9, 9)
    up[0, 0, 0, 4] = 1  # a point above the centre moves to the upper right by 45 degrees clockwise
    assert straighten(up, 45, "zeros")[0, 0, :4, 5:].sum() > 0.9


def test_a_bundle_of_a_float_model(parts: Path, upright: Upright) -> None:
    write_classifier(Path("foreign.onnx"))
    options = ("--images", "images", "--classes", "classes.txt", "--output", "output", "--resize", "crop")
    answer = upright("attach", "orientation", "foreign.onnx", "--to", "new", *NORMALISED, *options, "--straightened")
    assert answer.code == 0, answer.err
    assert "96 views: agreement 100.00%" in answer.out and "The scores are logits." in answer.out
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert manifest["other_outputs"] == ["output", "features", "orientation", "straightened"]
    assert manifest["orientation"] == {"threshold": pytest.approx(0.2), "min_angle": 1, "padding": "reflection"}
    assert manifest["preprocessing"] == {
        "crop": 1,
        "channels": "rgb",
        "layout": "nchw",
        "dtype": "float32",
        "scores": "logits",
    }
    assert manifest["spec"]["classes"] == list(CLASSES) and manifest["spec"]["resize"] == "crop"
    parity = json.loads(Path("new/parity.json").read_text())
    effect, metrics = parity["effect"], parity["precisions"]["fp32"]
    assert 50 < metrics["straightened"] < metrics["views"] == 96
    assert all(value <= 1e-4 for name, value in metrics["largest_differences"].items() if name != "straightened")
    assert effect["images"] == {"upright": 12, "rotated": 84} and effect["gain"] > 30
    assert effect["accuracy"]["rotated"]["attached"] > effect["accuracy"]["rotated"]["bare"] + 0.3
    card = Path("new/README.md").read_text()
    assert f"| {effect['gain']:.2f} |" in " ".join(card.split()) and "from confidence 0.2000 and 1 degrees on" in card

    bill = json.loads(Path("new", BOM).read_text())
    model = bill["metadata"]["component"]
    hashes = {part["name"]: (part["type"], part["hashes"][0]["content"]) for part in model["components"]}
    assert hashes == {
        "model.onnx": ("file", file_hash(Path("new/model.onnx"))),
        "orientation": ("machine-learning-model", Bundle.open("orientation").digest),
        "foreign.onnx": ("machine-learning-model", file_hash(Path("foreign.onnx"))),
    }
    (figure,) = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert figure == {"type": "agreement with the parts", "value": "1.0", "slice": "12 images in 8 rotations, fp32"}
    assert check_schema(bill)

    assert upright("verify", "new").code == 0
    predictor = Predictor("new")
    pixels = image(2, 30, 22, seed=5)
    for quarters in range(4):
        assert predictor(np.rot90(pixels, quarters)).label == "blue"
    logits = predictor.outputs([pixels], ["output"])["output"]
    assert predictor(pixels).probability == pytest.approx(float(np.exp(logits.max()) / np.exp(logits).sum()), abs=1e-5)
    answer = upright("infer", "new", "new/samples", "--format", "jsonl", "--outputs", "orientation")
    assert answer.code == 0 and len(answer.out.splitlines()) == 12


def test_the_page_runs(parts: Path, upright: Upright) -> None:
    """docs/how-to/attach.md, with a model of two outputs and fewer images than a harm of 0.5 points needs."""
    write_orientation_bundle(Path("export/orientation"))
    Path("images").rename("my-images")
    write_classifier(Path("model.onnx"), shape=("N", 3, 32, 32))
    page = (ROOT / "docs/how-to/attach.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n((?:.*\n)*?)```$", page, re.M)
    for line in block.replace("\\\n", " ").replace("--max-harm 0.5", "--max-harm 30 --output output").splitlines():
        program, *arguments = line.split()
        answer = upright(*arguments)
        assert program == "upright" and answer.code == 0, f"{line}: {answer.err}"
    assert Predictor("export/robust").spec.classes == CLASSES


def test_a_bundle_of_a_uint8_model_with_batch_1(parts: Path, upright: Upright) -> None:
    form: Any = {"dtype": "uint8", "layout": "nhwc", "shape": (1, SIDE, SIDE, 3), "opset": 13, "softmax": True}
    write_classifier(Path("model.onnx"), **form)
    options = ("--images", "images", "--output", "output", "--resize", "crop", "--crop", "0.8", "--threshold", "0.3")
    answer = upright("attach", "orientation", "model.onnx", "--to", "new", *options, "--classes", "classes.txt")
    assert answer.code == 0 and "The scores are probabilities." in answer.out, answer.err
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert manifest["input"]["shape"] == [1, "height", "width", 3] and manifest["opset"] == 18
    metrics = json.loads(Path("new/parity.json").read_text())["precisions"]["fp32"]
    assert max(metrics["largest_differences"][name] for name in ("probabilities", "output", "features")) <= 1e-4
    assert upright("verify", "new").code == 0
    predictor = Predictor("new")
    pixels = [image(label, 24, 24, seed=label) for label in range(4)]
    assert [each.label for each in predictor.predict(pixels)] == list(CLASSES)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ({"dtype": "float16", "layout": "nhwc"}, ("--range", "signed", "--channels", "bgr")),
        ({"shape": ("N", 3, "h", "w"), "ir_version": 10, "opset": 20}, ("--range", "byte", "--size", "16x16")),
        ({"shape": ("N", "a", "b", "c")}, ("--layout", "nchw", "--size", "16x16", *NORMALISED)),
        ({"names": ("images", "probabilities", "orientation"), "softmax": True}, ("--output", "probabilities")),
    ],
)
def test_other_forms(form: dict[str, Any], options: tuple[str, ...], parts: Path, upright: Upright) -> None:
    """Without images of your own, the samples of the orientation bundle are rotated."""
    write_classifier(Path("model.onnx"), **form)
    defaults = ("--range", "unit") if "--range" not in options and "--mean" not in options else ()
    defaults += () if "--output" in options else ("--output", "output")
    answer = upright("attach", "orientation", "model.onnx", "--resize", "pad", *defaults, *options)
    assert answer.code == 0, answer.err
    assert "32 views: agreement 100.00%" in answer.out
    graph = onnx.load("export/attached/model.onnx")
    assert [each.version for each in graph.opset_import] == [form.get("opset", 18)]
    names = [each.name for each in graph.graph.output]
    assert names[0] == "probabilities" and names[-1] == "orientation" and len(set(names)) == 4
    assert ("model_orientation" in names) == ("names" in form)
    assert upright("verify", "export/attached").code == 0
    assert Predictor("export/attached").spec.classes == ("0", "1", "2", "3")


def test_the_limit_of_harm_chooses_the_threshold(parts: Path, upright: Upright) -> None:
    write_classifier(Path("model.onnx"))
    options = ("--images", "images", "--classes", "classes.txt", "--output", "output", "--resize", "stretch")
    command = ("attach", "orientation", "model.onnx", *NORMALISED, *options, "--force")
    assert upright(*command, "--max-harm", "25").code == 0
    parity = json.loads(Path("export/attached/parity.json").read_text())
    effect = parity["effect"]
    assert effect["harm_interval"][1] <= parity["max_harm"] == 25 and effect["threshold"] > 0.01 and effect["gain"] > 30
    content = Path("export/attached/SHA256SUMS").read_bytes()
    answer = upright(*command, "--max-harm", "1")
    assert answer.code == 1 and "12 upright images cannot show a harm within --max-harm 1 points" in answer.err
    assert Path("export/attached/SHA256SUMS").read_bytes() == content


@signs
def test_a_key_signs_the_bundle(parts: Path, upright: Upright) -> None:
    write_classifier(Path("model.onnx"))
    key = write_keys(parts, "key")
    options = ("--output", "output", "--resize", "stretch", "--threshold", "0.5", "--sign", str(key))
    answer = upright("attach", "orientation", "model.onnx", *NORMALISED, *options)
    assert answer.code == 0, answer.err
    assert upright("verify", "export/attached", "--key", str(parts / "key.pub")).code == 0
    write_keys(parts, "other")
    answer = upright("verify", "export/attached", "--key", str(parts / "other.pub"))
    assert answer.code == 2 and "has no valid signature" in answer.err


def test_images_below_the_smallest_angle_are_not_touched(parts: Path) -> None:
    options = Attach("-", str(write_classifier(parts / "model.onnx")), resize="pad", range="unit", output="output")
    foreign, estimator = Foreign(options, 3), OrientationPredictor(parts / "orientation")
    photographs = [Photograph("red", parts / f"images/red/{i}.png", 0) for i in range(3)]
    angles = estimator.outputs([each.source for each in photographs])["orientation"][:, 0]
    smallest, middle, largest = np.sort(np.abs(angles))
    for min_angle, count in ((0, 3), ((smallest + middle) / 2, 2), (181, 0)):
        effect = measure(estimator, foreign, photographs, min_angle, "border").effect(0)
        assert effect["touched"] == pytest.approx(100 * count / 3)
    assert effect["harm"] == effect["gain"] == 0 and largest < 181


@pytest.mark.parametrize(
    ("change", "output"),
    [({"padding": "zeros"}, "straightened"), ({"threshold": 0.9}, "straightened"), ({}, "probabilities")],
)
def test_a_graph_that_differs_from_its_parts_is_not_written(
    change: dict[str, Any], output: str, parts: Path, upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another change, the graph omits the softmax."""
    write_classifier(Path("model.onnx"))

    def wrong(orientation: onnx.ModelProto, foreign: Foreign, decision: Decision, are_logits: bool) -> onnx.ModelProto:
        return attached_graph(orientation, foreign, replace(decision, **change), are_logits=are_logits and bool(change))

    monkeypatch.setattr(attach_module, "attached_graph", wrong)
    options = (*NORMALISED, "--resize", "stretch", "--output", "output", "--images", "images")
    answer = upright("attach", "orientation", "model.onnx", *options)
    assert answer.code == 1 and not Path("export").exists()
    assert "The graph and its parts disagree on " in answer.err and "'images/" in answer.err
    difference = re.search(rf"{output} (\S+) \(allowed (\S+)\)", answer.err)
    assert difference and float(difference[1]) > float(difference[2])


def test_old_models_functions_and_inner_graphs(parts: Path, upright: Upright) -> None:
    """Opset 9 with IR 3 lists its constants as inputs. A branch uses a constant of the outer graph."""
    path = write_classifier(Path("old.onnx"), opset=9, ir_version=3)
    old = onnx.load(path)
    old.graph.input.append(helper.make_tensor_value_info("weights", 1, [768, 4]))
    onnx.save(old, path)
    branching = f"""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        branching (float[N,3,{SIDE},{SIDE}] input) => (float[N,4] output)
        {{
          flat = local.Flat (input)
          any = ReduceMax <keepdims = 0> (flat)
          large = Greater (any, any)
          output = If (large) <
            then_branch = first () => (float[N,4] one) {{ one = MatMul (flat, weights) }},
            else_branch = second () => (float[N,4] two) {{ two = MatMul (flat, weights) }}
          >
        }}
        <domain: "local", opset_import: ["" : 17]>
        Flat (x) => (y) {{ y = Flatten (x) }}
    """
    model = parser.parse_model(branching)
    model.graph.initializer.append(numpy_helper.from_array(weights(), "weights"))
    onnx.save(model, "branching.onnx", save_as_external_data=True, location="data", size_threshold=0)
    for name, output in (("old", ("--output", "output")), ("branching", ())):
        answer = upright("attach", "orientation", f"{name}.onnx", *NORMALISED, "--resize", "crop", *output, "--force")
        assert answer.code == 0, answer.err
        assert upright("verify", "export/attached").code == 0
    Path("data").unlink()
    answer = upright("attach", "orientation", "branching.onnx", *NORMALISED, "--resize", "crop", "--force")
    assert answer.code == 2 and "'branching.onnx' cannot be read as ONNX: " in answer.err


def test_an_upright_bundle_needs_no_options(tmp_path: Path, upright: Upright) -> None:
    write_orientation_bundle(tmp_path / "orientation", channels=1)
    answer = upright("attach", "orientation", ROOT / "export/digits/model.onnx", "--images", ROOT / "export/digits")
    assert answer.code == 0, answer.err
    manifest = json.loads(Path("export/attached/manifest.json").read_text())
    assert manifest["spec"]["classes"] == list("0123456789") and manifest["preprocessing"]["scores"] == "probabilities"
    assert upright("verify", "export/attached").code == 0


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "preprocessor_config.json",
            {
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "size": {"shortest_edge": 256},
                "image_mean": [0.4, 0.5, 0.6],
                "image_std": [0.2, 0.2, 0.2],
                "rescale_factor": 1 / 255,
                "resample": 3,
            },
            {"size": (224, 224), "resize": "crop", "crop": 0.875, "mean": [0.4, 0.5, 0.6], "range": "unit"},
        ),
        (
            "preprocessor_config.json",
            {
                "size": {"height": 160, "width": 200},
                "do_normalize": False,
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
            },
            {"size": (160, 200), "resize": "stretch", "mean": None, "range": "signed"},
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_mean": [0.5], "image_std": [0.5]},
            {"size": (224, 224), "resize": "crop", "crop": 0.875},
        ),
        (
            "config.json",
            {
                "label_names": ["a", "b"],
                "pretrained_cfg": {
                    "input_size": [3, 192, 192],
                    "mean": [0.5],
                    "std": [0.5],
                    "crop_pct": 0.95,
                    "crop_mode": "squash",
                },
            },
            {"size": (192, 192), "resize": "stretch", "crop": 0.95, "classes": ["a", "b"], "mean": [0.5]},
        ),
        ("config.json", {"id2label": {"1": "b", "0": "a"}}, {"classes": ["a", "b"], "size": None}),
    ],
)
def test_files_beside_the_model(file: str, content: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    records = read_records(tmp_path / "model.onnx", is_upright=False)
    assert {name: records.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"size": [', "cannot be read: JSONDecodeError: "),
        ("{}", "cannot be read: KeyError: 'image_mean'"),
        ('{"do_normalize": false, "rescale_factor": 0.1}', "the rescale_factor 0.1 leads to none of the ranges unit, "),
        (
            '{"do_normalize": false, "size": 224, "do_center_crop": true, "crop_size": 256}',
            "the crop is 1.14286 of the resized image",
        ),
    ],
)
def test_a_file_beside_the_model_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "model.onnx", is_upright=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "does not record its preprocessing. Give --resize stretch, crop or pad; --mean and --std, or --range"),
        (("--resize", "pad", "--range", "unit"), "has 2 float outputs (B, classes): output float32[1, 4], features"),
        ((*NORMALISED, "--resize", "pad", "--output", "x"), "--output 'x' must be a float output (B, classes)"),
        ((*NORMALISED, "--resize", "pad", "--size", "20x20"), "--size is 20x20, but 'model.onnx' only takes 16x16"),
        ((*NORMALISED, "--mean", "1", "2", "--resize", "pad"), "--mean needs 1 or 3 numbers, one per channel, got 2"),
        ((*NORMALISED, "--classes", "two.txt"), "'model.onnx' has 4 scores, but 'two.txt' lists 2 classes"),
        ((*NORMALISED, "--max-harm", "1"), "--max-harm needs --images with one folder per class"),
        ((*NORMALISED, "--images", "some", "--classes", "classes.txt"), "but ['other'] are no classes of the model"),
        (("--max-harm", "1", "--threshold", "0.5"), "give only one of --max-harm and --threshold"),
        (("--crop", "2"), "--crop must be at most 1, the complete image; got 2."),
    ],
)
def test_options_that_cannot_be_used(
    options: tuple[str, ...], message: str, parts: Path, upright: Upright, tmp_path: Path
) -> None:
    write_classifier(Path("model.onnx"))
    Path("two.txt").write_text("a\nb\n")
    write_images(tmp_path / "some")
    (tmp_path / "some/red").rename("some/other")
    if options[: len(NORMALISED)] == NORMALISED and "--output" not in options:
        options += ("--output", "output", *(() if "--resize" in options else ("--resize", "pad")))
    answer = upright("attach", "orientation", "model.onnx", *options)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert not Path("export").exists()


def test_models_that_cannot_be_attached(parts: Path, upright: Upright) -> None:
    usual = ("--resize", "pad", "--range", "unit", "--output", "output")

    def error(*arguments: object) -> str:
        answer = upright("attach", *arguments, *usual)
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        return answer.err

    assert "'none.onnx' does not exist. Give an ONNX file" in error("orientation", "none.onnx")
    Path("text.onnx").write_text("no model")
    assert "'text.onnx' cannot be read as ONNX: " in error("orientation", "text.onnx")
    write_classifier(Path("new.onnx"), ir_version=99)
    assert "cannot load 'new.onnx': " in error("orientation", "new.onnx")
    write_classifier(Path("grey.onnx"), shape=("N", 1, SIDE, 3 * SIDE))
    assert "takes images of [1, 16, 48], but the images of the orientation bundle have 3 channel(s)" in error(
        "orientation", "grey.onnx"
    )
    write_classifier(Path("double.onnx"), dtype="float64")
    assert "must have one input of four axes, of tensor(float), tensor(float16), tensor(uint8); it has input" in error(
        "orientation", "double.onnx"
    )
    write_classifier(Path("bytes.onnx"), dtype="uint8", layout="nhwc")
    assert "takes uint8, so --mean, --std and --range have no effect" in error("orientation", "bytes.onnx")
    write_classifier(Path("model.onnx"))
    assert "classifies images; give one that estimates the orientation" in error(ROOT / "export/digits", "model.onnx")
    write_orientation_bundle(Path("bare"), threshold=None)
    assert "'bare' records no threshold; give --threshold, or --max-harm" in error("bare", "model.onnx")
    assert upright("attach", "orientation", "model.onnx", *usual).code == 0
    assert "Bundle 'export/attached' exists: --force replaces it" in error("orientation", "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_a_network_that_torch_exported(quantized: bool, parts: Path, upright: Upright) -> None:
    """The weights lie in another file, and the opset is newer than that of the orientation bundle."""
    from onnxruntime.quantization import quantize_dynamic

    torch.manual_seed(0)
    network = NiN((3, 32, 32), 4, widths=(16, 16, 16), stem=(5, 1, 2)).eval()
    example = (torch.randn(2, 3, 32, 32),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, example, "model.onnx", dynamo=True, opset_version=20, dynamic_shapes=({0: "n"},), verbose=False
        )
    if quantized:
        model = onnx.load("model.onnx")
        del model.graph.value_info[:]
        quantize_dynamic(model, "model.onnx")
    options = ("--images", "images", "--classes", "classes.txt", "--resize", "crop", *NORMALISED)
    answer = upright("attach", "orientation", "model.onnx", *options)
    assert answer.code == 0, answer.err
    assert json.loads(Path("export/attached/manifest.json").read_text())["opset"] == 20
    assert upright("verify", "export/attached").code == 0
