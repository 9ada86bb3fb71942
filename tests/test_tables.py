from pathlib import Path

from upright.tables import markdown, read_rows


def test_columns_are_aligned_and_numbers_to_the_right() -> None:
    table = markdown([["layer", "f"], ["conv", "5"], ["é", "12345"]], numbers=1)
    assert table == "| layer |     f |\n| ----- | ----: |\n| conv  |     5 |\n| é     | 12345 |\n"


def test_a_bar_in_a_cell_is_escaped() -> None:
    assert markdown([["run"], ["a|b"]]) == "| run  |\n| ---- |\n| a\\|b |\n"


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.csv") == []
    (tmp_path / "metrics.csv").write_text('epoch,name\n0,"a,\n""b"""\n', encoding="utf-8")
    assert read_rows(tmp_path / "metrics.csv") == [{"epoch": "0", "name": 'a,\n"b"'}]
