"""`upright report`: its numbers compared with other libraries, checkpoints and bundles together, and its errors."""

import html.parser
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_bundle
from upright.architectures.lenet import LeNet
from upright.evidence.reporting.invariance import take_sample
from upright.evidence.reporting.measures import evaluate
from upright.evidence.reporting.subjects import open_subjects
from upright.images import ImageSpec
from upright.runs.seal import openings
from upright.training.restoring import restore
from upright.warp import rotation, warp

FIGURES = {"accuracy", "consistency", "circle", "reliability", "turning", "sights", "confusion-1", "mistakes-1"}
HOSTILE = ("<script>alert(1)</script>", "a\"b' onload=x", "$\\frac{1}{$ & <b>", "ünï")


class Page(html.parser.HTMLParser):
    """A parsed page: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pair(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a run and of its bundle with theta, whose transformer never abstains."""
    from upright.cli import main

    folder = tmp_path_factory.mktemp("pair")
    run, bundle = trained / "checkpoints/small", folder / "export/small"
    abstains = ["--threshold", "0.000001", "--outputs", "theta"]
    assert main(["export", str(run), *abstains, "--to", str(folder / "export")]) == 0
    shutil.copytree(run, folder / "run")
    options = ["--images", "40", "--vector", "pdf", "--to", str(folder / "report")]
    assert main(["report", str(run), str(bundle), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def record(pair: Path) -> Any:
    return json.loads((pair / "report/report.json").read_text())


def numbers(tree: Any) -> list[float]:
    """Return all numbers in JSON data, in their order."""
    if isinstance(tree, dict):
        return [number for key in tree for number in numbers(tree[key])]
    if isinstance(tree, list):
        return [number for each in tree for number in numbers(each)]
    return [float(tree)] if isinstance(tree, int | float) else []


def test_a_checkpoint_and_its_bundle_have_the_same_numbers(record: Any) -> None:
    run, bundle = record["models"]
    assert (run["name"], bundle["name"]) == ("small (PyTorch)", "small (ONNX fp32)")
    assert run["network"] == bundle["network"] and run["run"] == bundle["run"]
    assert bundle["difference"]["points"] == 0 and bundle["difference"]["only_this_right"] == 0
    for part in ("accuracy", "top", "macro", "classes", "confusion", "mistakes", "calibration", "invariance"):
        assert numbers(run[part]) == pytest.approx(numbers(bundle[part]), abs=1e-4), part
    ours, theirs = run["uprightness"], bundle["uprightness"]
    assert set(ours["in_range"]) == set(ours["on_split"]) and ours["within"] == theirs["within"] == [-180, 180]
    for views in ("in_range", "on_split"):
        assert ours[views] == pytest.approx(theirs[views], abs=0.1)
        assert ours[views]["uprightness"] == pytest.approx(theirs[views]["uprightness"], abs=1e-4)
    for quartile in ("lower_quartile", "median", "upper_quartile"):
        assert ours["left"][quartile] == pytest.approx(theirs["left"][quartile], abs=0.1)


def test_numbers_match_scikit_learn_and_upright_test(record: Any, run_folder: Path, upright: Upright) -> None:
    assert upright("test", "--ckpt_path", run_folder / "best.ckpt").code == 0
    metrics = json.loads((run_folder / "test.json").read_text())["metrics"]
    (subject,), data = open_subjects([str(run_folder)])
    predictions = evaluate(subject, data, "test")
    ours = record["models"][0]
    labels, probabilities, classes = predictions.labels, predictions.probabilities, predictions.classes
    assert ours["accuracy"]["value"] == accuracy_score(labels, classes)
    assert ours["confusion"] == confusion_matrix(labels, classes, labels=range(10)).tolist()
    expected = precision_recall_fscore_support(labels, classes, labels=range(10), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in ours["classes"]] == pytest.approx(values.tolist(), abs=1e-6)
    loss = log_loss(labels, probabilities / probabilities.sum(axis=1, keepdims=True), labels=range(10))
    assert ours["calibration"]["log_loss"] == pytest.approx(loss, abs=1e-6)
    error = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), 10, n_bins=15)
    assert ours["calibration"]["error"] == pytest.approx(float(error), abs=1e-6)
    for name, value in (
        ("accuracy", ours["accuracy"]["value"]),
        ("top5", ours["top"]["5"]["value"]),
        ("f1", ours["macro"]["f1"]),
        ("calibration_error", ours["calibration"]["error"]),
        *ours["uprightness"]["on_split"].items(),
    ):
        assert value == pytest.approx(metrics[f"test/{name}"], abs=1e-5), name
    wrong = np.flatnonzero(labels != classes)
    worst = wrong[probabilities[wrong].max(axis=1).argmax()]
    assert ours["mistakes"] == len(wrong)
    assert ours["worst_mistakes"][0]["name"] == list(data.names("test"))[worst]
    assert ours["worst_mistakes"][0]["confidence"] == pytest.approx(probabilities[worst].max(), abs=1e-6)


def test_the_tables_for_papers_have_the_numbers_of_the_page(pair: Path, record: Any) -> None:
    text, latex = ((pair / "report" / f"tables.{suffix}").read_text() for suffix in ("md", "tex"))
    share, f1 = record["models"][0]["accuracy"], 100 * record["models"][0]["macro"]["f1"]
    value, low, high = (f"{100 * share[key]:.2f}" for key in ("value", "low", "high"))
    assert re.search(rf"\| small \(PyTorch\) +\| {value} \({low} to {high}\) \| .* {f1:.2f} \|", text)
    assert f"small (PyTorch) & {value} ({low} to {high}) & " in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\midrule") == text.count("\n| ---") == 8


def test_the_page_is_self_contained_and_accessible(pair: Path) -> None:
    folder = pair / "report"
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.open
    expected = {f"{name}.png" for name in FIGURES | {"confusion-2", "mistakes-2"}}
    beside = {"report.html", "report.json", "tables.md", "tables.tex"}
    plots = {f"{name}.pdf" for name in ("accuracy", "consistency", "circle", "reliability", "turning")}
    assert {path.name for path in folder.iterdir()} == expected | beside | plots
    assert all((folder / plot).read_bytes().startswith(b"%PDF-") for plot in plots)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(expected)
    for attributes in images:
        assert len(attributes["alt"] or "") > 20 and (attributes["src"] or "").startswith("data:image/png;base64,")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not {"href", "srcset", "onload", "onerror"} & set(attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    # Every table has a caption, and every column and row has a heading.
    tables = text.split("<table>")[1:]
    assert len(tables) == len(re.findall("<caption>", text)) == 8
    assert all('scope="col"' in table and 'scope="row"' in table for table in tables)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.verify()


def test_the_page_shows_the_numbers_of_the_json(pair: Path, record: Any) -> None:
    text = Page((pair / "report/report.html").read_text()).text
    run = record["models"][0]
    assert f"{100 * run['accuracy']['value']:.2f}" in text and f"{run['calibration']['temperature']:.3f}" in text
    assert "359 images of 10 classes, each in 3 views (-120°, 0°, +120°), so 1,077 predictions" in text
    assert "There are too few images to decide which one is better." in text
    # The page does not write only "error", which could also be the error rate.
    assert "ECE, %" in text and "expected calibration error (ECE) in 15 bins" in text
    for values in (run["uprightness"]["in_range"], run["uprightness"]["on_split"]):
        degrees = [f"{value:.1f}°" for name, value in values.items() if name != "uprightness"]
        assert len(degrees) == 6 and f"{values['uprightness']:.3f} {' '.join(degrees)}" in text
    for row in run["classes"]:
        assert f"{row['precision']:.4f}" in text and f"{row['f1']:.4f}" in text


def test_the_circle_has_the_network_without_its_rotation_and_the_harm_of_a_bundle(pair: Path, record: Any) -> None:
    run, bundle = record["models"]
    restored = restore(pair / "run").classifier.model
    sample = take_sample(restore(pair / "run").data, "test", 40)
    aspect = torch.ones(1)
    for angle, share in zip((-180, 0, 90), (run["identity"][0], run["identity"][12], run["identity"][18]), strict=True):
        images = warp(sample.images.float(), rotation(aspect * math.radians(angle)).expand(40, 3, 3)).round()
        with torch.no_grad():
            # Without its transformer, the network has the images as they are.
            classes = restored.network.network(restored.normalise(images)).argmax(dim=1).numpy()
        assert share["value"] == pytest.approx((classes == sample.labels).mean(), abs=1e-6)
    assert bundle["identity"] is None and run["effect"] is None
    parity = json.loads((pair / "export/small/parity.json").read_text())
    assert bundle["effect"] == parity["effect"]
    text = Page((pair / "report/report.html").read_text()).text
    low, high = bundle["effect"]["gain_interval"]
    assert f"{bundle['effect']['gain']:.2f} {low:.2f} to {high:.2f}" in text


def test_the_range_of_training_is_recorded(record: Any) -> None:
    invariance = record["models"][0]["invariance"]
    assert list(invariance) == ["rotation", "scale", "shift", "shear", "blur", "noise"]
    assert invariance["rotation"]["trained"] == [-180, 180] and invariance["scale"]["trained"] == [0.9, 1.1]
    assert invariance["shift"]["trained"] == pytest.approx([0, 0.05 * 28]) and invariance["shear"]["trained"] is None
    for family in invariance.values():
        at = family["strengths"].index(family["none"])
        assert family["consistency"][at]["value"] == 1
        assert family["accuracy"][at]["value"] == invariance["rotation"]["accuracy"][12]["value"]


def test_a_bundle_without_theta_and_without_a_checkpoint(bundle: Path, upright: Upright) -> None:
    answer = upright("report", bundle, "--images", 5, "--split", "val")
    assert answer.code == 0, answer.err
    folder = Path("checkpoints/report-small")
    (model,) = json.loads((folder / "report.json").read_text())["models"]
    assert model["uprightness"] == {
        "silent": "the bundle has no output theta; `upright export --outputs theta` adds it"
    }
    text = Page((folder / "report.html").read_text()).text
    assert "small: the bundle has no output theta" in text and "Evaluated on the validation split" in text
    assert model["calibration"]["temperature"] is None
    assert "No temperature for small: it is fitted on the validation split" in text and "log loss after" not in text
    # The validation split chose the model.
    assert "These images chose the best epoch of every checkpoint" in text and "too optimistic" in text
    assert not (folder / "turning.png").exists()


def test_names_of_classes_and_models_are_escaped(tmp_path: Path, upright: Upright) -> None:
    generator = np.random.default_rng(0)
    rows = ["path,label"]
    for label, name in enumerate(HOSTILE):
        for number in range(8):
            pixels = generator.integers(60 * label, 60 * label + 60, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{label}-{number}.png")
            rows.append(f'{label}-{number}.png,"{name.replace(chr(34), chr(34) * 2)}"')
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    recipe = yaml.safe_load((ROOT / "configs/data/table.yaml").read_text())
    recipe["init_args"] |= {"file": str(tmp_path / "table.csv"), "size": 28}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    spec = ImageSpec(3, 28, 28, tuple(sorted(HOSTILE)), (0.4,) * 3, (0.5,) * 3)
    write_bundle(tmp_path / "_<i>$x_{$", spec, LeNet)
    answer = upright("report", tmp_path / "_<i>$x_{$", "--data", "own.yaml", "--images", 2, "--to", "report")
    assert answer.code == 0, answer.err
    page = Page(Path("report/report.html").read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert all(" ".join(name.split()) in page.text for name in (*HOSTILE, "_<i>$x_{$"))
    assert "does not record its training images. If it was trained on images of this split" in page.text
    assert "<i>" in json.loads(Path("report/report.json").read_text())["models"][0]["name"]


def test_only_force_replaces_an_existing_report(pair: Path, trained: Path, tmp_path: Path, upright: Upright) -> None:
    shutil.copytree(pair / "report", "old")
    before = Path("old/report.json").read_bytes()
    run = trained / "checkpoints/small"
    answer = upright("report", run, "--to", "old", "--images", 2)
    assert answer.code == 2 and "Report 'old' exists: --force replaces it, --to writes to another folder." in answer.err
    assert Path("old/report.json").read_bytes() == before
    assert upright("report", run, "--to", "old", "--images", 2, "--force").code == 0
    assert len(json.loads(Path("old/report.json").read_text())["models"]) == 1
    assert not Path("old/confusion-2.png").exists()
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    answer = upright("report", run, "--to", "mine", "--force")
    assert answer.code == 2 and "'mine' is not a report (it has no report.json), so it is not replaced" in answer.err


@pytest.mark.slow
def test_names_distinguish_models_and_the_folder_has_all_names(
    run_folder: Path, bundle: Path, upright: Upright
) -> None:
    other, before = bundle.rename("other"), len(openings(run_folder))
    answer = upright("report", run_folder, run_folder / "last.ckpt", other, "--images", 2)
    assert answer.code == 0, answer.err
    folder = Path("checkpoints/report-small-other")
    names = [model["name"] for model in json.loads((folder / "report.json").read_text())["models"]]
    assert names == [f"small (PyTorch, {run_folder})", f"small (PyTorch, {run_folder / 'last.ckpt'})", "other"]
    assert f"Page: {folder}/report.html" in answer.out
    # All three models were evaluated on the test split. The bundle belongs to the same run.
    opened = openings(run_folder)[before:]
    assert [(each["by"], each["model"]) for each in opened] == [
        ("upright report", "best.ckpt"),
        ("upright report", "last.ckpt"),
        ("upright report", "model.onnx"),
    ]
    models = json.loads((folder / "report.json").read_text())["models"]
    assert [model["test_openings"] for model in models] == [{"run": before + 3, "sweep": {}}] * 3
    text = Page((folder / "report.html").read_text()).text
    assert "Test runs: number of evaluations of the run on this test split" in text and "too optimistic" not in text
    assert upright("report", run_folder, "--split", "val", "--images", 2, "--to", "val").code == 0
    assert "Test runs:" not in Page(Path("val/report.html").read_text()).text
    assert len(openings(run_folder)) == before + 3
    run_folder.rename("elsewhere")
    assert upright("report", other, "--images", 2, "--to", "alone").code == 0
    assert json.loads(Path("alone/report.json").read_text())["models"][0]["test_openings"] is None


@pytest.mark.slow
def test_the_report_of_a_trial_counts_the_evaluations_of_all_trials(run_folder: Path, upright: Upright) -> None:
    sweep = Path("sweep")
    for name in ("best", "worse"):
        shutil.copytree(run_folder, sweep / name)
    (sweep / "sweep.yaml").touch()
    assert upright("predict", "--ckpt_path", sweep / "worse/best.ckpt").code == 0
    assert upright("report", sweep / "best", "--images", 2, "--to", "report").code == 0
    (model,) = json.loads(Path("report/report.json").read_text())["models"]
    opened = model["test_openings"]["sweep"]
    assert list(opened) == ["best", "worse"] and opened["best"] == model["test_openings"]["run"]
    text = Page(Path("report/report.html").read_text()).text
    assert f"The trials of this sweep were evaluated {sum(opened.values())} times on the test split" in text


def test_a_model_that_predicts_nan_is_refused(run_folder: Path, upright: Upright) -> None:
    checkpoint = torch.load(run_folder / "best.ckpt", weights_only=True)
    for weights in checkpoint["state_dict"].values():
        weights.fill_(float("nan"))
    torch.save(checkpoint, "broken.ckpt")
    answer = upright("report", "broken.ckpt")
    assert answer.code == 2 and "'broken.ckpt' predicts NaN or infinity" in answer.err
    assert not Path("checkpoints/report-small").exists()


def test_models_that_cannot_be_compared_are_refused(
    trained: Path, bundle: Path, tmp_path: Path, upright: Upright
) -> None:
    run = trained / "checkpoints/small"
    other = write_bundle(tmp_path / "other", ImageSpec(1, 28, 28, ("a", "b"), (0.4,), (0.5,)), LeNet)
    many = write_bundle(tmp_path / "many", ImageSpec(1, 28, 28, tuple(map(str, range(100))), (0.4,), (0.5,)), LeNet)
    blank = write_bundle(tmp_path / "blank", ImageSpec(1, 28, 28, tuple("0123456789"), (0.4,), (0.5,)), LeNet)
    split = yaml.safe_load((ROOT / "configs/data/digits.yaml").read_text())
    split["init_args"]["split_seed"] = 1
    (tmp_path / "seen.yaml").write_text(yaml.safe_dump(split))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("x")
    for arguments, text in [
        ([run, other], "has 1 channel(s) and the classes ['a', 'b']; "),
        ([run, other], "Give models with the same channels and classes"),
        # This command does not have the option --allow_seen_images, so the message names the commands that have it.
        ([run, "--data", "seen.yaml"], "was trained on, so the accuracy would be too high: give other data. fit, "),
        ([run, many], "'10', '11'] and 88 more; "),
        ([run, blank], "were made from different data, or from different splits; choose the data for both with --data"),
        ([blank], "does not record its data; give data with --data"),
        (
            [other, "--data", ROOT / "configs/data/digits.yaml"],
            "was trained on 1 channel(s) and the classes ['a', 'b']; the da",
        ),
        (
            [tmp_path / "empty"],
            "is neither a run (it has no best.ckpt) nor a bundle (no SHA256SUMS); give a checkpoint",
        ),
        (["nope.ckpt"], "Checkpoint 'nope.ckpt' does not exist."),
        (["text.ckpt"], "'text.ckpt' is not an Upright checkpoint"),
        ([run, run], "is given twice; give different models"),
        ([run, "--images", 0], "--images must be at least 1, got 0."),
        ([bundle, "--precision", "int8"], "holds fp32, not int8"),
        ([run, "--precision", "int8"], "--precision chooses among the models of a bundle, but none of these models"),
        ([run, "--split", "train"], "invalid choice: 'train'"),
    ]:
        answer = upright("report", *arguments)
        assert answer.code == 2 and text in answer.err and answer.err.count("\n") == 1, answer.err
    assert not (tmp_path / "checkpoints/report-small").exists()
