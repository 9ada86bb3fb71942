import os
from pathlib import Path

import pytest

from upright.errors import UprightError
from upright.files import check_replaceable, replacing_file, replacing_folder, write_text


def test_a_file_is_replaced_completely(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "öld")
    with replacing_file(tmp_path / "a.txt") as new:
        new.write_text("new")
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "öld"
    assert (tmp_path / "a.txt").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_an_error_while_writing_changes_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing_file(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "b") as first:
        pass
    first.mkdir()
    (first / "old").touch()
    with replacing_folder(tmp_path / "b") as folder:
        (folder / "x").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "x"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_that_cannot_be_renamed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    target = tmp_path / "b"
    if existing:
        target.mkdir()
        (target / "old").touch()
    rename = os.replace

    def fail(source: Path, destination: Path) -> None:
        if source.name.endswith(".new"):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), replacing_folder(target) as folder:
        (folder / "x").touch()
    assert [path.name for path in tmp_path.rglob("*")] == (["b", "old"] if existing else [])


def test_only_empty_folders_and_own_folders_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"
    message = rf"'{target}' is not a thing \(it has no mark\), so it is not replaced; give another path\."
    check_replaceable(target, "a thing", "mark")
    target.touch()
    with pytest.raises(UprightError, match=message):
        check_replaceable(target, "a thing", "mark")
    target.unlink()
    target.mkdir()
    check_replaceable(target, "a thing", "mark")
    (target / "thesis.tex").touch()
    with pytest.raises(UprightError, match=message):
        check_replaceable(target, "a thing", "mark")
    (target / "mark").touch()
    check_replaceable(target, "a thing", "mark")


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(UprightError, match=r"file\.txt' is a file, so '.*x' cannot be created; give another path"):
        check_replaceable(tmp_path / "file.txt/x", "a report", "report.json")
