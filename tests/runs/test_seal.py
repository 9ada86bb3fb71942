"""Opening the test split is written down, and stays written down."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Upright
from upright.errors import UprightError
from upright.files import file_hash
from upright.runs.seal import FILE, content_digest, count, open_test_split, openings
from upright.training.restoring import restore

QUICK = ("--trainer.limit_train_batches", "2", "--wandb", "off")


def test_every_opening_is_written_down(upright: Upright, run_folder: Path) -> None:
    best = run_folder / "best.ckpt"
    assert upright("validate", "--ckpt_path", best).code == 0 and not (run_folder / FILE).exists()
    first = upright("test", "--ckpt_path", best)
    assert first.code == 0 and "was opened" not in first.out
    second = upright("predict", "--ckpt_path", best)
    assert f"Note: the test split was opened 2 times for run '{run_folder}' ({FILE}).\n" in second.out
    found = openings(run_folder)
    assert [opening["by"] for opening in found] == ["upright test", "upright predict"]
    manifest = restore(best).data.manifest
    for opening in found:
        assert opening["sha256"] == file_hash(best) and opening["model"] == "best.ckpt"
        assert opening["split_digest"] == manifest.digest and opening["date"].endswith("+00:00")
    assert count(run_folder, content_digest(manifest.hashes["test"])) == 2 and count(run_folder, "another") == 0


def test_a_run_that_goes_on_or_is_moved_keeps_it(upright: Upright, run_folder: Path) -> None:
    assert upright("test", "--ckpt_path", run_folder / "best.ckpt").code == 0
    before = (run_folder / FILE).read_text()
    answer = upright("fit", "--ckpt_path", run_folder / "last.ckpt", "--trainer.max_epochs", 3, *QUICK)
    assert answer.code == 0, answer.err
    moved = run_folder.rename(run_folder.with_name("moved"))
    assert (moved / FILE).read_text() == before
    again = upright("test", "--ckpt_path", moved / "best.ckpt")
    assert "was opened 2 times" in again.out and (moved / FILE).read_text().startswith(before)


def test_of_a_sweep_all_trials_count(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, best = restore(run_folder).data, (run_folder / "best.ckpt").read_bytes()
    sweep = run_folder.parent / "sweep"
    for name in ("trial-000", "trial-001"):
        (sweep / name).mkdir(parents=True)
        (sweep / name / "best.ckpt").write_bytes(best)
    (sweep / "sweep.yaml").touch()
    for name in ("trial-000", "trial-000", "trial-001"):
        open_test_split(sweep / name / "best.ckpt", sweep / name, data, "upright test")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"Note: the test split was opened 2 times for run '{sweep}/trial-000' ({FILE})."
    assert told[1] == (
        f"Note: over the trials of '{sweep}' it was opened 3 times (trial-000 2, trial-001 1); one that is chosen by "
        "it looks better there than it is."
    )
    assert len(told) == 2


def test_several_at_once_lose_none_and_a_full_disk_leaves_no_half_line(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, best = restore(run_folder).data, run_folder / "best.ckpt"
    data.manifest  # noqa: B018  # made once
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_test_split(best, run_folder, data, "upright test"), range(24)))
    assert len(openings(run_folder)) == 24 and {path.suffix for path in run_folder.glob(".*")} == set()

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:-20].encode())
        raise OSError(28, "No space left on device")

    before = (run_folder / FILE).read_text()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        open_test_split(best, run_folder, data, "upright test")
    assert (run_folder / FILE).read_text() == before and not list(run_folder.glob(".*"))


def test_a_record_that_was_changed_by_hand(run_folder: Path) -> None:
    (run_folder / FILE).write_text("once\n")
    with pytest.raises(UprightError, match=r"test_openings.jsonl' was changed by hand and cannot be read .*; mend it"):
        openings(run_folder)
