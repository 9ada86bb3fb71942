"""Which of several runs is the best, what that says, and that it stays true when files move."""

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
from upright.evidence.selecting.candidates import ANSWERS, Answers, Run, answers_of, find_runs
from upright.evidence.selecting.selection import Selection

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
    """An own copy of them."""
    shutil.copytree(three, tmp_path / "runs")
    return tmp_path / "runs"


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "selection.json").read_text())
    return found


def test_runs_are_ranked_as_validation_has_them(upright: Upright, runs: Path, tmp_path: Path) -> None:
    answer = upright("select", *(runs / name for name in RATES), "--to", "out")
    assert answer.code == 0, answer.err
    found = report(tmp_path / "out")
    measured = {
        name: torch.load(runs / name / "best.ckpt", weights_only=True)["upright"]["metrics"]["val/accuracy"]
        for name in RATES
    }
    assert {row["name"]: pytest.approx(row["accuracy"], abs=1e-6) for row in found["ranking"]} == measured
    accuracies = [row["accuracy"] for row in found["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True)
    # 1,797 digits, of which validation has 15 %, each at five angles.
    assert (found["images"], found["views"], found["candidates"]) == (270, 5, 3)
    assert [row["epochs"] for row in found["ranking"]] == [2, 2, 2] and found["test_openings"] == {}
    first = f"{found['ranking'][0]['name']} is the best of 3 runs: accuracy {accuracies[0]:.4f} on 270 validation"
    assert found["sentence"].startswith(first)
    assert found["estimate"]["value"] == pytest.approx(accuracies[0] - found["optimism"])
    text = (tmp_path / "out/selection.md").read_text()
    assert answer.out.startswith(f"\n{text}") and answer.out.endswith("Written: out/selection.md, .json, .png\n")
    assert " ".join(text.split()).startswith(found["sentence"]) and (tmp_path / "out/selection.png").is_file()
    # The same again, to the last digit.
    assert upright("select", *(runs / name for name in reversed(RATES)), "--to", "again").code == 0
    assert report(tmp_path / "again")["sentence"] == found["sentence"]


def test_answers_are_kept_and_stale_ones_are_not_used(
    upright: Upright, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upright("select", runs / "slow", runs / "good", "--to", "first").code == 0
    restored: list[Path] = []
    restore = candidates.restore
    monkeypatch.setattr(candidates, "restore", lambda path, data: restored.append(path) or restore(path, data))
    assert upright("select", runs / "slow", runs / "good", "--to", "second").code == 0
    assert not restored and report(Path("second")) == report(Path("first"))
    shutil.copy(runs / "good/best.ckpt", runs / "slow/best.ckpt")
    (runs / "good" / ANSWERS).write_bytes((runs / "good" / ANSWERS).read_bytes()[:-50])
    assert upright("select", runs / "slow", runs / "good", "--to", "third").code == 0
    assert restored == [runs / "slow/best.ckpt", runs / "good/best.ckpt"]
    one, other = report(Path("third"))["ranking"]
    assert one["accuracy"] == other["accuracy"] and report(Path("third"))["optimism"] == 0


def test_one_alone_and_nothing_written_without_a_folder(upright: Upright, runs: Path, tmp_path: Path) -> None:
    answer = upright("select", runs / "good", runs / "good")
    text = " ".join(answer.out.split())
    assert answer.code == 0 and "good is the only complete run of 1, so nothing is corrected: accuracy 0." in text
    assert "Written" not in answer.out and "Nothing is written without --to FOLDER." in answer.out
    assert not list(tmp_path.rglob("selection.*"))


def test_two_that_end_at_once_do_not_meet(runs: Path, tmp_path: Path) -> None:
    def answer(_: int) -> list[str]:
        return [each.checkpoint for each in answers_of(find_runs([str(runs / name) for name in RATES]))]

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(answer, range(3))
    assert all(other == first for other in others) and len(set(first)) == 3
    assert all((runs / name / ANSWERS).is_file() and not list((runs / name).glob(".*")) for name in RATES)


def test_data_that_are_elsewhere(upright: Upright, runs: Path) -> None:
    for name, text in (("mnist", "have changed since it was trained: other images, or other splits"), ("digits", "")):
        answer = upright("select", runs / "good", "--data", ROOT / f"configs/data/{name}.yaml")
        assert (answer.code, answer.err.count("\n")) == ((2, 1) if text else (0, 0)) and text in answer.err


def test_a_sweep_counts_what_it_has_looked_at(upright: Upright, runs: Path, tmp_path: Path) -> None:
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
    found = report(sweep)
    assert {row["name"] for row in found["ranking"]} == {"good", "fair"}
    assert found["candidates"] == 5 and "the best of 2 complete runs (5 in all)" in found["sentence"]
    assert found["notes"][0].startswith("Runs: 2 complete, 1 pruned, 2 elsewhere.")
    assert "The test split was not opened for any of these runs." in found["notes"]
    for _ in range(2):
        assert upright("test", "--ckpt_path", sweep / "good/best.ckpt").code == 0
    answer = upright("test", "--ckpt_path", sweep / "slow/best.ckpt")
    assert "over the trials of" in answer.out and "it was opened 3 times (good 2, slow 1)" in answer.out
    assert upright("select", sweep).code == 0
    found = report(sweep)
    assert found["test_openings"] == {"good": 2, "slow": 1}
    assert "The test split was opened 3 times (good 2, slow 1)." in found["notes"]
    assert any("makes it a second validation split" in note for note in found["notes"])
    told = "Some runs are trials of the sweep 'sweep'. Give its folder to count all trials."
    assert told not in found["notes"] and told in upright("select", sweep / "good").out


def test_what_cannot_be_chosen_among(upright: Upright, runs: Path, tmp_path: Path) -> None:
    def retold(name: str, **changes: Any) -> Path:
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
    for given, text in (
        (
            [runs / "godo"],
            f"'{runs}/godo' does not exist. Did you mean '{runs}/good'? Give folders of runs, or of a sweep",
        ),
        ([tmp_path / "empty"], "empty' is neither the folder of a run (with best.ckpt) nor of a sweep; give one"),
        ([tmp_path / "sweep"], "sweep' is complete; there is nothing to choose from"),
        (
            [runs / "good", retold("letters", spec={"classes": list("abcdefghij")})],
            "'letters' has other classes than 'good': choose among runs with one validation split",
        ),
        (
            [runs / "good", retold("split", split={"hashes": others})],
            "'split' has other validation images than 'good': choose among runs with one validation split",
        ),
        (
            [runs / "good", retold("turned", data={"init_args": own["data"]["init_args"] | {"angles": [0.0]}})],
            "'good' and 'turned' were validated on different images (angles, draws or task",
        ),
        ([runs / "good", retold("changed", split={"digest": "other"})], "have changed since it was trained"),
    ):
        answer = upright("select", *given)
        assert answer.code == 2 and answer.err.count("\n") == 1 and text in answer.err, answer.err


def test_a_file_is_no_folder_to_write_to_and_nothing_is_asked(upright: Upright, runs: Path) -> None:
    Path("taken").touch()
    answer = upright("select", runs / "slow", runs / "good", "--to", "taken")
    assert (answer.code, answer.out) == (2, "") and "'taken' is not a selection (it has no" in answer.err
    assert not list(runs.rglob(ANSWERS))


def answers(right: list[list[int]], losses: list[float]) -> list[Answers]:
    labels = np.zeros(len(right[0]), np.int64)
    return [
        Answers("", "", "", 1, labels, 1 - np.array(row), np.full(len(row), loss, np.float32))
        for row, loss in zip(right, losses, strict=True)
    ]


def test_the_sentence_says_what_the_numbers_say() -> None:
    runs = [Run(name, Path(name), "complete", 3) for name in ("a", "b", "c")]
    # b and c are right as often; c is so by a better loss, and a by the best.
    right = [[1] * 50 + [0] * 50, [1] * 95 + [0] * 5, [0] * 5 + [1] * 95]
    found = Selection.of(runs, answers(right, [0.1, 0.3, 0.2]), [*runs, Run("d", Path("d"), "pruned", 1)])
    assert [each.name for each in found.ranking] == ["c", "b", "a"]
    estimate = found.estimate
    assert 0.005 < found.optimism < 0.03 and estimate.value == pytest.approx(0.95 - found.optimism)
    assert found.ranking[0].interval == pytest.approx((estimate.low + found.optimism, estimate.high + found.optimism))
    assert found.sentence == (
        f"c is the best of 3 complete runs (4 in all): accuracy 0.9500 on 100 validation images. Corrected for the "
        f"choice of the best, its expected accuracy is {estimate.value:.4f} (95 % interval {estimate.low:.4f} to "
        f"{estimate.high:.4f}). The correction of {found.optimism:.4f} is a bootstrap estimate over the validation "
        "images."
    )
    notes = selection._notes(found, runs, [Path()])
    assert "By loss a is first (0.1000, accuracy 0.5000)." in notes
    assert any("A search that adapts to these scores" in note for note in notes)


def test_one_that_is_ranked_among_others_that_are_not() -> None:
    a, c = (Run(name, Path(name), state, 1) for name, state in (("a", "complete"), ("c", "elsewhere")))
    alone = Selection.of([a], answers([[1] * 90 + [0] * 10], [0.1]), [a, c])
    assert alone.sentence.startswith("a is the only complete run of 2, so nothing is corrected: accuracy 0.9000 on 100")
    assert alone.optimism == 0
    assert "Runs: 1 complete, 1 elsewhere." in selection._notes(alone, [a, c], [])[0]


def test_what_cannot_be_ranked() -> None:
    a = Run("a", Path("a"), "complete", 1)
    with pytest.raises(UprightError, match="The validation split has one image; a choice needs"):
        Selection.of([a], answers([[1]], [0.1]), [a])
    with pytest.raises(UprightError, match="'a' answers with NaN or infinity: leave it out"):
        Selection.of([a], answers([[1, 0]], [float("nan")]), [a])


def test_a_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    a = Run("lr$\\frac{$", Path("a"), "complete", 1)
    found = Selection.of([a], answers([[1, 0]], [0.1]), [a])
    selection._draw(found).savefig(tmp_path / "a.png")


def test_what_is_no_selection_is_not_written_into(upright: Upright, runs: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes/selection.md"
    notes.parent.mkdir()
    notes.write_text("my own")
    answer = upright("select", runs / "good", "--to", notes.parent)
    assert answer.code == 2 and "is not a selection (it has no selection.json)" in answer.err
    assert notes.read_text() == "my own"


def test_a_sweep_whose_trials_cannot_be_compared_has_still_ended(
    upright: Upright, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[Any, ...]] = []
    search = "upright.runs.sweeping.sweep.sweep"
    monkeypatch.setattr(search, lambda *given, **options: searched.append((given, options)) or 0)
    answer = upright("sweep", "a/try.yaml", "--trials", 3, "--", "--wandb", "off")
    assert answer.code == 0
    assert answer.err.startswith("Note: the trials cannot be compared: 'checkpoints/try' does not exist.")
    assert searched == [(("a/try.yaml", 3, None, ["--wandb", "off"]), {})]
    monkeypatch.setattr(search, lambda *given, **options: 130)
    assert upright("sweep", "a/try.yaml") == (130, "", "")
