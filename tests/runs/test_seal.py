"""The log of accesses to the test split."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Upright
from upright.errors import UprightError
from upright.files import file_hash
from upright.runs.seal import LOG_FILE, content_digest, count, open_test_split, openings
from upright.training.restoring import restore

QUICK = ("--trainer.limit_train_batches", "2", "--wandb", "off")


def test_every_access_is_logged(upright: Upright, run_folder: Path) -> None:
    best = run_folder / "best.ckpt"
    assert upright("validate", "--ckpt_path", best).code == 0 and not (run_folder / LOG_FILE).exists()
    first = upright("test", "--ckpt_path", best)
    assert first.code == 0 and "was opened" not in first.out
    second = upright("predict", "--ckpt_path", best)
    assert f"Note: the test split was opened 2 times for run '{run_folder}' ({LOG_FILE}).\n" in second.out
    log = openings(run_folder)
    assert [opening["by"] for opening in log] == ["upright test", "upright predict"]
    manifest = restore(best).data.manifest
    for opening in log:
        assert opening["sha256"] == file_hash(best) and opening["model"] == "best.ckpt"
        assert opening["split_digest"] == manifest.digest and opening["date"].endswith("+00:00")
    assert count(run_folder, content_digest(manifest.hashes["test"])) == 2 and count(run_folder, "another") == 0


def test_a_resumed_or_moved_run_keeps_its_log(upright: Upright, run_folder: Path) -> None:
    assert upright("test", "--ckpt_path", run_folder / "best.ckpt").code == 0
    before = (run_folder / LOG_FILE).read_text()
    answer = upright("fit", "--ckpt_path", run_folder / "last.ckpt", "--trainer.max_epochs", 3, *QUICK)
    assert answer.code == 0, answer.err
    moved = run_folder.rename(run_folder.with_name("moved"))
    assert (moved / LOG_FILE).read_text() == before
    again = upright("test", "--ckpt_path", moved / "best.ckpt")
    assert "was opened 2 times" in again.out and (moved / LOG_FILE).read_text().startswith(before)


def test_a_sweep_counts_the_accesses_of_all_trials(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, best = restore(run_folder).data, (run_folder / "best.ckpt").read_bytes()
    sweep = run_folder.parent / "sweep"
    for name in ("trial-000", "trial-001"):
        (sweep / name).mkdir(parents=True)
        (sweep / name / "best.ckpt").write_bytes(best)
    (sweep / "sweep.yaml").touch()
    for name in ("trial-000", "trial-000", "trial-001"):
        open_test_split(sweep / name / "best.ckpt", sweep / name, data, "upright test")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Note: the test split was opened 2 times for run '{sweep}/trial-000' ({LOG_FILE})."
    assert lines[1] == (
        f"Note: over the trials of '{sweep}' it was opened 3 times (trial-000 2, trial-001 1); a trial that is "
        "selected by its test accuracy looks better than it is."
    )
    assert len(lines) == 2


def test_concurrent_accesses_are_all_logged_and_a_full_disk_leaves_the_log(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, best = restore(run_folder).data, run_folder / "best.ckpt"
    data.manifest  # noqa: B018  # computed once
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_test_split(best, run_folder, data, "upright test"), range(24)))
    assert len(openings(run_folder)) == 24 and {path.suffix for path in run_folder.glob(".*")} == set()

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:-20].encode())
        raise OSError(28, "No space left on device")

    before = (run_folder / LOG_FILE).read_text()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        open_test_split(best, run_folder, data, "upright test")
    assert (run_folder / LOG_FILE).read_text() == before and not list(run_folder.glob(".*"))


def test_a_log_that_was_changed_by_hand_is_refused(run_folder: Path) -> None:
    (run_folder / LOG_FILE).write_text("once\n")
    with pytest.raises(UprightError, match=r"test_openings.jsonl' was changed by hand and cannot be read .*: fix it"):
        openings(run_folder)
