"""`upright select`: the ranking, the corrected accuracy of the best run, and stored predictions."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Upright
from upright.cli import main
from upright.errors import UprightError
from upright.evidence.selecting import candidates, selection
from upright.evidence.selecting.candidates import (
    PREDICTIONS_FILE,
    Candidate,
    ValidationPredictions,
    find_candidates,
    predictions_of,
)
from upright.evidence.selecting.selection import rank
from upright.intervals import Share

LENET = ROOT / "configs/lenet.yaml"
QUICK = ("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4", "--wandb", "off")
RATES = {"slow": "0.0001", "good": "0.01", "fair": "0.003"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs of two epochs."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        for name, rate in RATES.items():
            where = ("--name", name, "--trainer.default_root_dir", "runs", "--model.optimizer.lr", rate)
            assert main(["fit", "--config", str(LENET), *where, *QUICK]) == 0
    return folder / "runs"


@pytest.fixture
def runs(three: Path, tmp_path: Path) -> Path:
    """A copy of the three runs, which the test may change."""
    shutil.copytree(three, tmp_path / "runs")
    return tmp_path / "runs"


def read_selection(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "selection.json").read_text())
    return record


def test_runs_are_ranked_by_their_validation_accuracy(upright: Upright, runs: Path, tmp_path: Path) -> None:
    answer = upright("select", *(runs / name for name in RATES), "--to", "out")
    assert answer.code == 0, answer.err
    record = read_selection(tmp_path / "out")
    expected = {
        name: torch.load(runs / name / "best.ckpt", weights_only=True)["upright"]["metrics"]["val/accuracy"]
        for name in RATES
    }
    assert {row["name"]: pytest.approx(row["accuracy"], abs=1e-6) for row in record["ranking"]} == expected
    accuracies = [row["accuracy"] for row in record["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True)
    # The validation split has 15 % of 1,797 digits, each at five angles.
    assert (record["images"], record["views"], record["candidates"]) == (270, 5, 3)
    assert [row["epochs"] for row in record["ranking"]] == [2, 2, 2] and record["test_openings"] == {}
    first = f"{record['ranking'][0]['name']} is the best of 3 runs: accuracy {accuracies[0]:.4f} on 270 validation"
    assert record["sentence"].startswith(first)
    assert record["estimate"]["value"] == pytest.approx(accuracies[0] - record["optimism"])
    text = (tmp_path / "out/selection.md").read_text()
    assert answer.out.startswith(f"\n{text}") and answer.out.endswith("Written: out/selection.md, .json, .png\n")
    assert " ".join(text.split()).startswith(record["sentence"]) and (tmp_path / "out/selection.png").is_file()
    # The result does not depend on the order of the arguments.
    assert upright("select", *(runs / name for name in reversed(RATES)), "--to", "again").code == 0
    assert read_selection(tmp_path / "again")["sentence"] == record["sentence"]


def test_predictions_are_stored_and_outdated_ones_are_not_used(
    upright: Upright, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upright("select", runs / "slow", runs / "good", "--to", "first").code == 0
    restored: list[Path] = []
    restore = candidates.restore
    monkeypatch.setattr(
        candidates, "restore", lambda path, *data, **options: restored.append(path) or restore(path, *data, **options)
    )
    assert upright("select", runs / "slow", runs / "good", "--to", "second").code == 0
    assert not restored and read_selection(Path("second")) == read_selection(Path("first"))
    shutil.copy(runs / "good/best.ckpt", runs / "slow/best.ckpt")
    (runs / "good" / PREDICTIONS_FILE).write_bytes((runs / "good" / PREDICTIONS_FILE).read_bytes()[:-50])
    assert upright("select", runs / "slow", runs / "good", "--to", "third").code == 0
    assert restored == [runs / "slow/best.ckpt", runs / "good/best.ckpt"]
    one, other = read_selection(Path("third"))["ranking"]
    assert one["accuracy"] == other["accuracy"] and read_selection(Path("third"))["optimism"] == 0


def test_a_single_run_and_no_files_without_a_folder(upright: Upright, runs: Path, tmp_path: Path) -> None:
    answer = upright("select", runs / "good", runs / "good")
    text = " ".join(answer.out.split())
    assert (
        answer.code == 0 and "good is the only complete run of 1, so its accuracy is not corrected: accuracy 0." in text
    )
    assert "Written" not in answer.out and "No files were written; --to FOLDER writes them." in answer.out
    assert not list(tmp_path.rglob("selection.*"))


def test_concurrent_processes_do_not_conflict(runs: Path, tmp_path: Path) -> None:
    def checkpoints(_: int) -> list[str]:
        return [each.checkpoint for each in predictions_of(find_candidates([str(runs / name) for name in RATES]))]

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(checkpoints, range(3))
    assert all(other == first for other in others) and len(set(first)) == 3
    assert all((runs / name / PREDICTIONS_FILE).is_file() and not list((runs / name).glob(".*")) for name in RATES)


def test_data_replace_the_data_of_the_checkpoints(upright: Upright, runs: Path) -> None:
    changed = "have changed since it was trained: other images, or other splits"
    for name, message in (("mnist", changed), ("digits", "")):
        answer = upright("select", runs / "good", "--data", ROOT / f"configs/data/{name}.yaml")
        assert (answer.code, answer.err.count("\n")) == ((2, 1) if message else (0, 0)) and message in answer.err


def test_all_trials_of_a_sweep_count(upright: Upright, runs: Path, tmp_path: Path) -> None:
    runs.rename(tmp_path / "sweep")
    sweep = tmp_path / "sweep"
    for name, state in {"slow": "pruned", "good": "complete", "fair": "complete"}.items():
        (sweep / name / "trial.json").write_text(json.dumps({"state": state}))
    (sweep / "stopped").mkdir()
    (sweep / "stopped/trial.json").write_text(json.dumps({"state": "stopped"}))
    (sweep / "sweep.yaml").touch()
    rows = [
        "trial,state,folder",
        "0,pruned,old/slow",
        "1,complete,old/good",
        "2,complete,old/far",
        "3,same as 1,old/good",
    ]
    (sweep / "trials.csv").write_text("\n".join([*rows, "4,failed,old/none"]))
    answer = upright("select", sweep)
    assert answer.code == 0, answer.err
    record = read_selection(sweep)
    assert {row["name"] for row in record["ranking"]} == {"good", "fair"}
    assert record["candidates"] == 5 and "the best of 2 complete runs (5 in all)" in record["sentence"]
    assert record["notes"][0].startswith("Runs: 2 complete, 1 pruned, 2 elsewhere.")
    assert "None of these runs was evaluated on the test split." in record["notes"]
    for _ in range(2):
        assert upright("test", "--ckpt_path", sweep / "good/best.ckpt").code == 0
    answer = upright("test", "--ckpt_path", sweep / "slow/best.ckpt")
    assert "over the trials of" in answer.out and "it was opened 3 times (good 2, slow 1)" in answer.out
    assert upright("select", sweep).code == 0
    record = read_selection(sweep)
    assert record["test_openings"] == {"good": 2, "slow": 1}
    assert "These runs were evaluated 3 times on the test split (good 2, slow 1)." in record["notes"]
    assert any("would be a second validation split" in note for note in record["notes"])
    note = "Some runs are trials of the sweep 'sweep'. Give its folder to count all trials."
    assert note not in record["notes"] and note in upright("select", sweep / "good").out


def test_runs_that_cannot_be_compared_are_refused(upright: Upright, runs: Path, tmp_path: Path) -> None:
    def changed_run(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(runs / "good", folder)
        checkpoint = torch.load(folder / "best.ckpt", weights_only=True)
        for key, value in changes.items():
            checkpoint["upright"][key] |= value
        torch.save(checkpoint, folder / "best.ckpt")
        return folder

    own = torch.load(runs / "good/best.ckpt", weights_only=True)["upright"]
    others = own["split"]["hashes"] | {"val": own["split"]["hashes"]["val"][1:]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.yaml").touch()
    for arguments, message in (
        (
            [runs / "godo"],
            f"'{runs}/godo' does not exist. Did you mean '{runs}/good'? Give folders of runs, or of a sweep",
        ),
        ([tmp_path / "empty"], "empty' is neither the folder of a run (with best.ckpt) nor of a sweep; give one"),
        ([tmp_path / "sweep"], "sweep' is complete; there is nothing to choose from"),
        (
            [runs / "good", changed_run("letters", spec={"classes": list("abcdefghij")})],
            "'letters' and 'good' have different classes; give runs with the same classes",
        ),
        (
            [runs / "good", changed_run("split", split={"hashes": others})],
            "'split' and 'good' have different validation images; give runs with the same validation images",
        ),
        (
            [runs / "good", changed_run("turned", data={"init_args": own["data"]["init_args"] | {"angles": [0.0]}})],
            "'good' and 'turned' were validated on different images (angles, draws or task",
        ),
        ([runs / "good", changed_run("changed", split={"digest": "other"})], "have changed since it was trained"),
    ):
        answer = upright("select", *arguments)
        assert answer.code == 2 and answer.err.count("\n") == 1 and message in answer.err, answer.err


def test_a_target_that_is_a_file_is_refused_before_the_models_run(upright: Upright, runs: Path) -> None:
    Path("taken").touch()
    answer = upright("select", runs / "slow", runs / "good", "--to", "taken")
    assert (answer.code, answer.out) == (2, "") and "'taken' is not a selection (it has no" in answer.err
    assert not list(runs.rglob(PREDICTIONS_FILE))


def validation_predictions(correct: list[list[int]], losses: list[float]) -> list[ValidationPredictions]:
    labels = np.zeros(len(correct[0]), np.int64)
    return [
        ValidationPredictions("", "", "", 1, labels, 1 - np.array(row), np.full(len(row), loss, np.float32))
        for row, loss in zip(correct, losses, strict=True)
    ]


def test_the_sentence_and_the_notes_match_the_numbers() -> None:
    runs = [Candidate(name, Path(name), "complete", 3) for name in ("a", "b", "c")]
    # b and c have the same accuracy, and c has the lower loss. a has the lowest loss.
    correct = [[1] * 50 + [0] * 50, [1] * 95 + [0] * 5, [0] * 5 + [1] * 95]
    predictions = validation_predictions(correct, [0.1, 0.3, 0.2])
    result = rank(runs, predictions, [*runs, Candidate("d", Path("d"), "pruned", 1)])
    assert [each["name"] for each in result["ranking"]] == ["c", "b", "a"]
    optimism, estimate = result["optimism"], Share(**result["estimate"])
    assert 0.005 < optimism < 0.03 and estimate.value == pytest.approx(0.95 - optimism)
    assert result["ranking"][0]["interval"] == pytest.approx([estimate.low + optimism, estimate.high + optimism])
    assert result["sentence"] == (
        f"c is the best of 3 complete runs (4 in all): accuracy 0.9500 on 100 validation images. Corrected for the "
        f"choice of the best, its expected accuracy is {estimate.value:.4f} (95 % interval {estimate.low:.4f} to "
        f"{estimate.high:.4f}). The correction of {optimism:.4f} is a bootstrap estimate over the validation "
        "images."
    )
    notes = selection._notes(result, runs, [Path()])
    assert "a has the lowest loss (0.1000, with an accuracy of 0.5000)." in notes
    assert any("A search that adapts to these scores" in note for note in notes)


def test_a_single_complete_run_among_others() -> None:
    a, c = (Candidate(name, Path(name), state, 1) for name, state in (("a", "complete"), ("c", "elsewhere")))
    result = rank([a], validation_predictions([[1] * 90 + [0] * 10], [0.1]), [a, c])
    sentence = "a is the only complete run of 2, so its accuracy is not corrected: accuracy 0.9000 on 100"
    assert result["sentence"].startswith(sentence) and result["optimism"] == 0
    assert "Runs: 1 complete, 1 elsewhere." in selection._notes(result, [a, c], [])[0]


def test_one_image_and_nan_are_refused() -> None:
    a = Candidate("a", Path("a"), "complete", 1)
    with pytest.raises(UprightError, match="The validation split has one image, but a selection needs"):
        rank([a], validation_predictions([[1]], [0.1]), [a])
    with pytest.raises(UprightError, match="'a' predicts NaN or infinity; omit this run"):
        rank([a], validation_predictions([[1, 0]], [float("nan")]), [a])


def test_names_are_not_parsed_as_mathematics(tmp_path: Path) -> None:
    a = Candidate("lr$\\frac{$", Path("a"), "complete", 1)
    result = rank([a], validation_predictions([[1, 0]], [0.1]), [a])
    selection._draw(result).savefig(tmp_path / "a.png")


def test_another_folder_is_not_written_into(upright: Upright, runs: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes/selection.md"
    notes.parent.mkdir()
    notes.write_text("my own")
    answer = upright("select", runs / "good", "--to", notes.parent)
    assert answer.code == 2 and "is not a selection (it has no selection.json)" in answer.err
    assert notes.read_text() == "my own"


def test_a_failed_comparison_after_a_sweep_is_only_a_note(upright: Upright, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    search = "upright.runs.sweeping.sweep.sweep"
    monkeypatch.setattr(search, lambda *args, **kwargs: calls.append((args, kwargs)) or 0)
    answer = upright("sweep", "a/try.yaml", "--trials", 3, "--", "--wandb", "off")
    assert answer.code == 0
    assert answer.err.startswith("Note: the trials cannot be compared: 'checkpoints/try' does not exist.")
    assert calls == [(("a/try.yaml", 3, None, ["--wandb", "off"]), {})]
    monkeypatch.setattr(search, lambda *args, **kwargs: 130)
    assert upright("sweep", "a/try.yaml") == (130, "", "")
