"""The commands of Lightning, as a user types them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import CONFIGS, ROOT, Upright
from tests.training.test_classifier import METRICS
from upright.runs.cli.parser import explain
from upright.testing import QUICK, check_line

STN, LENET = ROOT / "configs/stn_lenet.yaml", ROOT / "configs/lenet.yaml"


SLOW = ("alexnet", "googlenet", "lenet", "resnet", "stn_lenet", "stn_mnist_rotated")
"""Configs that are slow, or whose commands another test runs: test_contracts.py, or test_docs.py by first-bundle.md."""


@pytest.mark.usefixtures("upright", "fewer_digits", "traced_once")
@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_every_config_trains_tests_and_exports(tmp_path: Path, config: Path) -> None:
    assert check_line(config, tmp_path) == tmp_path / "export" / config.stem
    run = tmp_path / "checkpoints" / config.stem
    written = {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv"}
    plots = {f"{name}.png" for name in ("curves", "samples", "mistakes", "confusion")}
    names = {path.name for path in run.iterdir() if not path.name.startswith("test")}
    assert names - {"transformer.png"} == written | plots


def test_a_run_prints_its_folder_and_the_next_command(upright: Upright, tmp_path: Path) -> None:
    answer = upright("fit", "--config", LENET, *QUICK)
    assert "Run:  checkpoints/lenet" in answer.out
    assert "Next: upright test --ckpt_path checkpoints/lenet/best.ckpt" in answer.out
    rows = read_csv(tmp_path / "checkpoints/lenet/metrics.csv")
    assert [row["epoch"] for row in rows] == ["0"] and float(rows[0]["val/accuracy"]) >= 0


def test_the_written_config_is_the_experiment(upright: Upright, tmp_path: Path) -> None:
    assert upright("fit", "--config", STN, "--model.upright_weight", 3, *QUICK).code == 0
    written = tmp_path / "checkpoints/stn_lenet/config.yaml"
    config = yaml.safe_load(written.read_text())
    assert config["model"]["upright_weight"] == 3 and config["model"]["scheduler"]["init_args"]["warmup"] == 0.3
    assert not {"name", "force", "wandb", "ckpt_path"} & set(config)
    assert upright("fit", "--config", written, "--name", "again", "--wandb", "off").code == 0
    ours, theirs = (
        torch.load(tmp_path / f"checkpoints/{name}/last.ckpt", weights_only=True)["state_dict"]
        for name in ("stn_lenet", "again")
    )
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_print_config(upright: Upright, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        upright("fit", "--config", LENET, "--print_config")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["class_path"] == "upright.data.digits.Digits"


@pytest.mark.parametrize("command_name", ["validate", "test", "predict"])
def test_after_fit_the_other_commands_need_only_the_checkpoint(
    upright: Upright, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert upright(command_name, "--ckpt_path", run_folder / "best.ckpt").code == 0
    assert list(elsewhere.iterdir()) == []


def test_validate_reproduces_the_metrics_of_the_checkpoint(upright: Upright, run_folder: Path) -> None:
    metrics = torch.load(run_folder / "best.ckpt", weights_only=True)["upright"]["metrics"]
    answer = upright("validate", "--ckpt_path", run_folder)
    assert f"{metrics['val/accuracy']:.6f}"[:7] in answer.out


def test_test_writes_metrics_tables_and_plots(upright: Upright, run_folder: Path) -> None:
    assert upright("test", "--ckpt_path", run_folder).code == 0
    record = json.loads((run_folder / "test.json").read_text())
    assert set(record["metrics"]) == METRICS
    confusion, classes = (read_csv(run_folder / f"test_{name}.csv") for name in ("confusion", "classes"))
    right, images = sum(int(row[row["label"]]) for row in confusion), sum(int(row["support"]) for row in classes)
    assert right / images == pytest.approx(record["metrics"]["test/accuracy"], abs=1e-6) and images == 3 * 359
    means = {name: sum(float(row[name]) for row in classes) / 10 for name in ("precision", "recall", "f1")}
    assert means == pytest.approx({name: record["metrics"][f"test/{name}"] for name in means}, abs=1e-5)
    for name in ("confusion", "transformer"):
        assert (run_folder / f"test_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_test_on_other_data(upright: Upright, run_folder: Path) -> None:
    assert upright("test", "--ckpt_path", run_folder, "--data.angles", "[0]").code == 0
    record = json.loads((run_folder / "test.json").read_text())
    assert record["data"]["init_args"]["angles"] == [0] and not [
        name for name in record["metrics"] if "uprightness" in name or "degrees" in name
    ]


def test_a_missing_class_of_a_checkpoint_is_named(upright: Upright, run_folder: Path) -> None:
    checkpoint = torch.load(run_folder / "best.ckpt", weights_only=True)
    checkpoint["upright"]["model"]["class_path"] = "own.Classifier"
    torch.save(checkpoint, run_folder / "best.ckpt")
    answer = upright("test", "--ckpt_path", run_folder)
    assert answer.code == 2 and "cannot import module 'own'" in answer.err and answer.err.count("\n") == 1


def test_other_data_replace_those_of_the_config(upright: Upright, tmp_path: Path) -> None:
    # The config's angles and margin must not apply to the plain digits.
    (tmp_path / "plain.yaml").write_text("class_path: upright.data.digits.Digits\ninit_args: {margin: 2}\n")
    for name, arguments in (("a", ["--data", "plain.yaml"]), ("b", ["--data=plain.yaml", "--data.batch_size", 32])):
        assert upright("fit", "--config", LENET, *arguments, "--name", name, *QUICK).code == 0
        data = yaml.safe_load((tmp_path / f"checkpoints/{name}/config.yaml").read_text())["data"]["init_args"]
        assert (data["margin"], data["angles"], data["augment"]) == (2, [0.0], [])
        assert data["batch_size"] == (32 if name == "b" else 64)


AUGMENTED = """
class_path: upright.data.digits.Digits
init_args:
  angles: [0]
  augment:
    - class_path: kornia.augmentation.RandomRotation
      init_args: {degrees: 20.0, p: 1.0}
    - class_path: upright.data.augmentation.RandomAffine
      init_args: {scale: [0.9, 1.1]}
    - class_path: upright.data.augmentation.RandomElastic
    - class_path: kornia.augmentation.ColorJitter
      init_args: {brightness: [0.8, 1.2], contrast: 0.2, p: 1.0}
    - class_path: kornia.augmentation.RandomCrop
      init_args: {size: [28, 28], padding: [2, 2]}
    - class_path: kornia.augmentation.RandomErasing
      init_args: {scale: [0.02, 0.1]}
"""


@pytest.mark.slow
def test_augmentations_of_kornia_work_and_are_recorded(upright: Upright, tmp_path: Path) -> None:
    from upright.training.restoring import restore

    (tmp_path / "mine.yaml").write_text(AUGMENTED)
    mixing = "    - class_path: upright.data.mixing.MixUp\n      init_args: {alpha: 0.4}\n"
    (tmp_path / "mixed.yaml").write_text(AUGMENTED + mixing)
    quick = ("--trainer.max_epochs", 1, "--wandb", "off")
    weights, upright_loss = [], ("--model.upright_weight", 1)
    for name, config, data, *options in (
        ("one", STN, "mine.yaml", *upright_loss),
        ("two", STN, "mine.yaml", *upright_loss),
        ("mixed", LENET, "mixed.yaml"),
    ):
        answer = upright("fit", "--config", config, "--data", data, "--name", name, *options, *quick)
        assert answer.code == 0, answer.err
        weights.append(torch.load(tmp_path / f"checkpoints/{name}/last.ckpt", weights_only=True)["state_dict"])
        assert upright("test", "--ckpt_path", tmp_path / "checkpoints" / name).code == 0
    # The same seed gives the same weights, because kornia also draws from torch's generator.
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    restored = restore(tmp_path / "checkpoints/mixed/best.ckpt").data.augmentation
    names = [type(part).__name__ for part in restored.parts]
    kornias = ["RandomRotation", "ColorJitter", "RandomCrop", "RandomErasing"]
    assert [name for name in names if name in kornias] == kornias and names[-1] == "MixUp"
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    assert restored(images, torch.eye(10)[:4]).images.shape == images.shape


def save_images(root: Path, count: int = 30) -> Path:
    """Write two classes of small images, the last of each twice."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 100, (20, 16, 3), dtype=np.uint8) + np.uint8(label * 150)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
        shutil.copy(root / name / f"{count - 1}.png", root / name / "copy.png")
    return root


def test_storage_and_workers_do_not_change_a_run(upright: Upright, tmp_path: Path) -> None:
    root = save_images(tmp_path / "images")
    data = ("--data", ROOT / "configs/data/folder.yaml", "--data.root", root, "--data.batch_size", 8)
    weights = []
    for name, storage in (("memory", ()), ("disk", ("--data.cache", "disk")), ("streamed", ("--data.cache", "none"))):
        options = (*data, *storage, "--data.num_workers", 2, "--name", name)
        answer = upright("fit", "--config", LENET, *options, *QUICK)
        assert answer.code == 0, answer.err
        weights.append(torch.load(f"checkpoints/{name}/best.ckpt", weights_only=True)["state_dict"])
        assert upright("test", "--ckpt_path", f"checkpoints/{name}").code == 0
    assert all(torch.equal(value, other[key]) for other in weights[1:] for key, value in weights[0].items())
    assert yaml.safe_load(Path("checkpoints/streamed/config.yaml").read_text())["data"]["init_args"]["cache"] == "none"
    # Options of reading do not define other data, so changed data are still refused.
    for image in (root / "dark").glob("1*.png"):
        image.unlink()
    for storage in (("--data.cache", "none"), ("--data.batch_size", 4), ("--data.init_args.num_workers", 0)):
        answer = upright("test", "--ckpt_path", "checkpoints/memory", *storage)
        assert answer.code == 2 and "have changed since it was trained" in answer.err


def test_folds_and_train_fraction_are_options(upright: Upright) -> None:
    def counts(*options: object) -> dict[str, int]:
        answer = upright("fit", "--config", LENET, "--name", "x", "--force", *QUICK, *options)
        assert answer.code == 0, answer.err
        counted = torch.load("checkpoints/x/best.ckpt", weights_only=True)["upright"]["split"]["counts"]
        return {split: sum(counts.values()) for split, counts in counted.items()}

    assert counts("--data.folds", 4, "--data.fold", 3) == {"train": 1079, "val": 359, "test": 359}
    assert counts("--data.train_fraction", 0.1) == {"train": 119, "val": 270, "test": 359}


def test_duplicates_in_declared_splits_are_reported(upright: Upright, tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_images(tmp_path / "images" / split, 12)
    data = ("--data", ROOT / "configs/data/folder.yaml", "--data.root", tmp_path / "images")
    answer = upright("fit", "--config", LENET, *data, *QUICK)
    assert answer.code == 0
    assert re.search(r"Note: \d+ of the \d+ images in 'train' are in 'test' too, for example 'train/\w+/", answer.err)


def test_training_images_are_evaluated_only_with_the_option(upright: Upright, run_folder: Path) -> None:
    other_split = ("test", "--ckpt_path", run_folder, "--data.split_seed", 1)
    answer = upright(*other_split)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert re.search(r"\d+ of 359 images in split 'test' .*: give other data\. .* --allow_seen_images\.", answer.err)
    assert upright(*other_split, "--allow_seen_images").code == 0
    assert json.loads((run_folder / "test.json").read_text())["data"]["init_args"]["split_seed"] == 1


def test_predict_writes_every_image(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    assert upright("predict", "--ckpt_path", run_folder, "--output", tmp_path / "p.csv").code == 0
    rows = read_csv(tmp_path / "p.csv")
    assert len(rows) == 3 * 359 and len({row["name"] for row in rows}) == len(rows)
    upright("test", "--ckpt_path", run_folder)
    accuracy = json.loads((run_folder / "test.json").read_text())["metrics"]["test/accuracy"]
    assert sum(row["label"] == row["prediction"] for row in rows) / len(rows) == pytest.approx(accuracy, abs=1e-6)
    for row in rows[:20]:
        probabilities = {label: float(row[label]) for label in "0123456789"}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert max(probabilities, key=probabilities.__getitem__) == row["prediction"]


def test_an_existing_run_is_replaced_only_with_force(upright: Upright, tmp_path: Path) -> None:
    assert upright("fit", "--config", LENET, *QUICK).code == 0
    before = (tmp_path / "checkpoints/lenet/best.ckpt").read_bytes()
    answer = upright("fit", "--config", LENET, *QUICK)
    assert answer.code == 2 and "--ckpt_path last resumes it, --force replaces it" in answer.err
    assert (tmp_path / "checkpoints/lenet/best.ckpt").read_bytes() == before
    assert upright("fit", "--config", LENET, "--force", "--seed_everything", 5, *QUICK).code == 0
    assert (tmp_path / "checkpoints/lenet/best.ckpt").read_bytes() != before


def test_resuming_from_another_run_does_not_overwrite_this_one(
    upright: Upright, run_folder: Path, tmp_path: Path
) -> None:
    assert upright("fit", "--config", STN, "--name", "two", *QUICK).code == 0
    before = (tmp_path / "checkpoints/two/metrics.csv").read_bytes()
    resume = ("fit", "--config", STN, "--ckpt_path", run_folder / "last.ckpt", "--trainer.max_epochs", 3, *QUICK[2:])
    answer = upright(*resume, "--name", "two")
    assert answer.code == 2 and "Run 'checkpoints/two' exists" in answer.err
    assert (tmp_path / "checkpoints/two/metrics.csv").read_bytes() == before
    answer = upright(*resume, "--name", "three")
    assert answer.code == 0 and "Best: " in answer.out
    assert (tmp_path / "checkpoints/three/best.ckpt").exists()


def test_a_forced_run_that_fails_restores_the_old_one(upright: Upright, tmp_path: Path) -> None:
    assert upright("fit", "--config", LENET, *QUICK).code == 0
    before = (tmp_path / "checkpoints/lenet/best.ckpt").read_bytes()
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        upright("fit", "--config", LENET, "--force", "--data.augment", "[{class_path: torch.nn.Flatten}]", *QUICK)
    assert (tmp_path / "checkpoints/lenet/best.ckpt").read_bytes() == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["lenet"]


def test_a_complete_run_and_another_optimiser_cannot_resume(upright: Upright, run_folder: Path) -> None:
    answer = upright("fit", "--name", "small", "--ckpt_path", "last", "--wandb", "off")
    assert answer.code == 2 and "has done 2 epochs already; raise --trainer.max_epochs" in answer.err
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1, "--trainer.max_epochs", 3)
    answer = upright("fit", "--name", "small", "--ckpt_path", "last", "--wandb", "off", *sgd)
    assert answer.code == 2 and "was trained with model.optimizer torch.optim" in answer.err


@pytest.mark.slow
def test_two_processes_train_and_test_as_one(upright: Upright, tmp_path: Path) -> None:
    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", "upright", *map(str, arguments)]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert process.returncode == 0, process.stderr

    two = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    run("fit", "--config", STN, *QUICK, *two)
    plots = {path.stem for path in (tmp_path / "checkpoints/stn_lenet").glob("*.png")}
    assert plots == {"samples", "mistakes", "confusion", "transformer", "curves"}
    run("test", "--ckpt_path", "checkpoints/stn_lenet", *two)
    together = json.loads((tmp_path / "checkpoints/stn_lenet/test.json").read_text())["metrics"]
    tables = [(tmp_path / f"checkpoints/stn_lenet/test_{name}.csv").read_text() for name in ("confusion", "classes")]
    assert upright("test", "--ckpt_path", "checkpoints/stn_lenet").code == 0
    alone = json.loads((tmp_path / "checkpoints/stn_lenet/test.json").read_text())["metrics"]
    assert together == pytest.approx(alone, abs=1e-5) and set(alone) == METRICS
    assert tables == [
        (tmp_path / f"checkpoints/stn_lenet/test_{name}.csv").read_text() for name in ("confusion", "classes")
    ]


def test_force_does_not_delete_a_folder_that_is_no_run(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/lenet").mkdir(parents=True)
    (tmp_path / "checkpoints/lenet/thesis.tex").touch()
    answer = upright("fit", "--config", LENET, "--force", *QUICK)
    assert answer.code == 2 and "not the folder of a run" in answer.err
    assert (tmp_path / "checkpoints/lenet/thesis.tex").exists()


def test_last_resumes_with_only_the_name(upright: Upright, run_folder: Path) -> None:
    answer = upright("fit", "--name", "small", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--wandb", "off")
    assert answer.code == 0
    rows = read_csv(run_folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    # The folder is a copy: its best checkpoint is still the best.
    best = torch.load(run_folder / "best.ckpt", weights_only=True)["upright"]["metrics"]["val/loss"]
    assert best == pytest.approx(min(float(row["val/loss"]) for row in rows), abs=1e-5)


def test_a_failure_leaves_no_run(upright: Upright, tmp_path: Path) -> None:
    augment = "[{class_path: torch.nn.Flatten}]"
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        upright("fit", "--config", LENET, "--data.augment", augment, *QUICK)
    assert not (tmp_path / "checkpoints/lenet").exists()


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


ARGS = "--model.network.init_args"
BAD = [
    (("fit",), "fit needs an experiment, for example"),
    (("fit", "--config", "nope.yaml"), "File does not exist"),
    (("fit", "--config", STN, "--foo", 1), "unknown option '--foo'"),
    (("fit", "--config", STN, "--trainer.max_epochz", 1), "Did you mean 'trainer.max_epochs'?"),
    (("fit", "--config", STN, "--trainer.max_epochs", "x"), "trainer.max_epochs: expected int or null, got x"),
    (("fit", "--config", LENET, f"{ARGS}.widths", "[16, 48]"), "widths: expected list with 4 elements, got [16, 48]\n"),
    (("fit", "--config", LENET, f"{ARGS}.widths", "{a: 1}"), "widths: expected list, got {'a': 1}\n"),
    (("fit", "--config", LENET, "--data.augment", "[3]"), "expected import path or a subclass spec, got 3\n"),
    (("fit", "--config", STN, f"{ARGS}.netwrk", 1), "'netwrk'. Did you mean 'network'?"),
    (("fit", "--config", STN, "--model.network", "upright.architectures.lenet.LeNut"), "Did you mean 'LeNet'?"),
    (("fit", "--config", STN, "--model.network", "upright.architectures.lenut.LeNet"), "Did you mean 'lenet'?"),
    (("fit", "--config", STN, "--model.network", "own.LeNet"), "no module named 'own'. Is the file in the working"),
    (("fit", "--config", LENET, "--data.siz", 3), "'siz'. Did you mean 'size'? Allowed: angles"),
    (
        ("fit", "--config", LENET, "--model.scheduler", "upright.training.schedules.TorchScheduler"),
        "error: missing, without a default: scheduler. Allowed: interval, monitor, scheduler.\n",
    ),
    (("fit", "--config", LENET, "--data.size", 7), "must be at least 8, got size 7 and margin 4"),
    (("fit", "--config", LENET, "--data.size", 10, "--data.margin", 0), "at least 12x12 pixels, got 10x10"),
    (("fit", "--config", LENET, "--data", "upright.data.digits.Digts"), "Did you mean 'Digits'?"),
    (("fit", "--config", LENET, "--model.upright_weight", 1), "needs a SpatialTransformer"),
    (("fit", "--config", LENET, "--name", "a/b"), "must be a plain folder name"),
    (("fit", "--config", LENET, "--name", ""), "--name '' must be a plain folder name"),
    (("fit", "--config", ROOT / "docs/transformer.png"), "A config must be YAML in UTF-8"),
    (("fit", "--config", LENET, "--ckpt_path", "last"), "There is no 'checkpoints/lenet/last.ckpt'"),
    (("fit", "--name", "x", "--ckpt_path", "last"), "'checkpoints/x' holds no config.yaml"),
    (("fit", "--ckpt_path", "last"), "give --config or --name"),
    (("fit", "--config", LENET, "--data", ROOT / "configs/data/folder.yaml"), "my-images' does not exist"),
    (("fit", "--config", LENET, "--trainer.accelerator", "gpux"), "gpux"),
    (("test",), "test needs --ckpt_path"),
    (("test", "--ckpt_path", "nope.ckpt"), "'nope.ckpt' does not exist"),
    (("predict", "--ckpt_path", STN), "is not an Upright checkpoint"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_one_line_and_leaves_nothing(
    upright: Upright, tmp_path: Path, arguments: tuple[object, ...], text: str
) -> None:
    answer = upright(*arguments)
    assert answer.code == 2
    assert answer.err.startswith("upright: error: ") and answer.err.count("\n") == 1
    assert text in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_a_config_that_does_not_exist(upright: Upright, tmp_path: Path) -> None:
    for text, expected in (
        ("modell: {network: x}", "unknown option 'modell.network'. Did you mean 'model'?"),
        (
            "model: {netwrk: x}",
            "unknown option 'netwrk'. Did you mean 'network'? Allowed: init, loss, loss_weight, network",
        ),
        ("model: [", "while parsing"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        answer = upright("fit", "--config", tmp_path / "bad.yaml")
        assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


def test_a_target_that_cannot_be_written(upright: Upright, tmp_path: Path, run_folder: Path) -> None:
    (tmp_path / "file").touch()
    answer = upright("fit", "--config", LENET, "--trainer.default_root_dir", tmp_path / "file", *QUICK)
    assert answer.code == 2 and "Not a directory" in answer.err and answer.err.count("\n") == 1
    for path in (tmp_path, "/dev/null"):
        answer = upright("predict", "--ckpt_path", run_folder, "--output", path)
        assert answer.code == 2 and "Not a regular file" in answer.err and answer.err.count("\n") == 1
    answer = upright("predict", "--ckpt_path", run_folder, "--output", tmp_path / "no/such/folder/p.csv")
    assert answer.code == 2 and "No such file or directory" in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
def test_a_new_architecture_is_one_file_and_one_yaml(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "strip.py").write_text(
        "from torch import nn\n"
        "class Strip(nn.Sequential):\n"
        "    def __init__(self, input_shape, num_classes, *, width: int = 8):\n"
        "        channels, height, columns = input_shape\n"
        "        super().__init__(nn.Conv2d(channels, width, (height, 1)), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(width * columns, num_classes))\n"
    )
    config = yaml.safe_load(LENET.read_text())
    config["model"]["network"] = {"class_path": "strip.Strip", "init_args": {"width": 4}}
    config["data"] = str(ROOT / "configs/data/digits.yaml")
    (tmp_path / "strip.yaml").write_text(yaml.safe_dump(config))
    assert upright("fit", "--config", "strip.yaml", *QUICK).code == 0
    assert upright("test", "--ckpt_path", "checkpoints/strip").code == 0
    assert upright("export", "checkpoints/strip").code == 0
    assert upright("verify", "export/strip").code == 0


def test_without_wandb_a_run_works_and_prints_a_message(
    upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upright.runs.tracking.find_spec", lambda name: None)
    answer = upright("fit", "--config", LENET, *QUICK[:4])
    assert answer.code == 0 and "wandb is not installed (`pip install wandb`)" in answer.out
    assert (tmp_path / "checkpoints/lenet/metrics.csv").exists()
    answer = upright("fit", "--config", LENET, "--name", "b", *QUICK[:4], "--wandb", "online")
    assert answer.code == 2 and "needs the package wandb" in answer.err


def test_wandb_online_needs_an_account(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    answer = upright("fit", "--config", LENET, *QUICK[:4], "--wandb", "online")
    assert answer.code == 2 and "`wandb login` once, or set WANDB_API_KEY" in answer.err
    assert not (tmp_path / "checkpoints").exists()


def test_an_explanation_is_always_one_line() -> None:
    assert "\n" not in explain("an unknown error\nof jsonargparse\n  in three lines")


def test_a_run_resumes_in_its_own_folder(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upright("fit", "--config", LENET, *QUICK).code == 0
    (tmp_path / "elsewhere").mkdir()
    for epochs, path in ((2, "checkpoints/lenet/last.ckpt"), (3, "checkpoints/lenet")):
        monkeypatch.chdir(tmp_path / "elsewhere")
        answer = upright("fit", "--ckpt_path", f"../{path}", *QUICK[2:], "--trainer.max_epochs", epochs)
        assert answer.code == 0 and f"Run:  {tmp_path}/checkpoints/lenet" in answer.out, answer.err
        assert list((tmp_path / "elsewhere").iterdir()) == []
        rows = (tmp_path / "checkpoints/lenet/metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + epochs


# torch 2.13's compiler imports a deprecated function (torch/utils/mkldnn.py), and reads the gradients of all tensors.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_a_compiled_model_writes_the_same_checkpoint(upright: Upright, tmp_path: Path) -> None:
    assert upright("fit", "--config", STN, *QUICK, "--compile", "--name", "compiled").code == 0
    assert upright("fit", "--config", STN, *QUICK, "--name", "eager").code == 0
    weights = [
        torch.load(tmp_path / f"checkpoints/{name}/last.ckpt", weights_only=True)["state_dict"]
        for name in ("compiled", "eager")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-2), name
    assert upright("test", "--ckpt_path", tmp_path / "checkpoints/compiled/best.ckpt").code == 0


PAIRS = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import upright


class Pairs(L.LightningDataModule):
    def __init__(self, count: int = 64):
        super().__init__()
        self.save_hyperparameters()
        self.spec = upright.ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))

    def loader(self):
        images = torch.rand(self.hparams.count, 1, 28, 28)
        return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0.5).long()), batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class WithoutSpec(L.LightningDataModule):
    pass
"""


# The loaders of small datasets have no workers.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_other_datamodules_work_where_no_originals_are_needed(upright: Upright, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    (tmp_path / "pairs.yaml").write_text("class_path: pairs.Pairs\ninit_args: {count: 48}\n")
    fit = ("fit", "--config", LENET, "--wandb", "off", "--trainer.max_epochs", 1, "--name", "p")
    answer = upright(*fit, "--data", "pairs.WithoutSpec")
    assert answer.code == 2 and "WithoutSpec needs an attribute `spec`, an upright.images.ImageSpec" in answer.err
    assert upright(*fit, "--data", "pairs.yaml").code == 0
    assert upright("test", "--ckpt_path", "checkpoints/p").code == 0
    assert "(20 images)" in upright("predict", "--ckpt_path", "checkpoints/p", "--data.count", 20).out
    for command, reason in (("export", "Parity needs the originals"), ("report", "A report distorts original images")):
        answer = upright(command, "checkpoints/p")
        assert answer.code == 2 and reason in answer.err and "give --data with the YAML" in answer.err
