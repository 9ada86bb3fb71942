import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upright.data.table import Table
from upright.errors import UprightError
from upright.recipes import build

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write six images of each of three grey levels."""
    (tmp_path / "größe").mkdir()
    for label in (2, 10, 30):
        for number in range(6):
            Image.new("L", (8 + number, 8), label).save(tmp_path / f"größe/{label}-{number}.png")
    return tmp_path


def rows(root: Path, split: bool = False) -> list[list[str]]:
    names = {0: "val", 1: "test"}
    return [
        [f"größe/{label}-{n}.png", str(label), *([names.get(n, "train")] if split else [])]
        for label in (2, 10, 30)
        for n in range(6)
    ]


def write(root: Path, *lines: list[str] | str, header: str = "path,label", name: str = "table.csv") -> str:
    text = "\n".join([header, *(line if isinstance(line, str) else ",".join(line) for line in lines)])
    (root / name).write_text(text, encoding="utf-8")
    return str(root / name)


def check(data: Table) -> None:
    assert data.spec.classes == ("2", "10", "30")
    assert [int(image[0, 0, 0]) for image in data.source.images] == [2] * 6 + [10] * 6 + [30] * 6
    assert data.source.labels == [0] * 6 + [1] * 6 + [2] * 6
    assert data.source.names[0] == "größe/2-0.png"


def test_a_csv_table(root: Path) -> None:
    data = Table(file=write(root, *rows(root)), size=8, channels=1, val_fraction=0.2)
    check(data)
    assert data.source.splits is None and {n: len(p) for n, p in data.splits.items()}["val"] == 4
    assert data.source.images[5].shape == (8, 13, 1)


def test_a_table_with_splits(root: Path) -> None:
    data = Table(file=write(root, *rows(root, split=True), header="path,label,split"))
    check(data)
    assert data.source.splits == {
        "train": [2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17], "val": [0, 6, 12], "test": [1, 7, 13]
    }  # fmt: skip


def test_a_missing_split_is_taken_from_training(root: Path) -> None:
    lines = [[path, label, split.replace("val", "train")] for path, label, split in rows(root, split=True)]
    data = Table(file=write(root, *lines, header="path,label,split"), val_fraction=0.2)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 12, "val": 3, "test": 3}


def parquet(root: Path, **columns: object) -> str:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), root / "table.parquet")
    return str(root / "table.parquet")


@pytest.mark.parametrize("kind", [str, int])
def test_a_parquet_table(root: Path, kind: type) -> None:
    paths, labels, splits = zip(*rows(root, split=True), strict=True)
    data = Table(file=parquet(root, other=[0.5] * 18, split=splits, label=[kind(v) for v in labels], path=paths))
    check(data)
    assert len(data.splits["test"]) == 3


def test_absolute_paths_quotes_spaces_other_columns_and_a_byte_order_mark(root: Path) -> None:
    Image.new("L", (8, 8), 200).save(root / 'a, "b".png')
    lines = [*rows(root), [f'"{root}/a, ""b"".png"', " 30 "], "", [f"{root}/größe/../größe/2-9.png", "2"]]
    Image.new("L", (8, 8), 2).save(root / "größe/2-9.png")
    text = "\n".join(["\ufeffsize, path , label", *(f"1, {','.join(line)}" if line else "" for line in lines)])
    (root / "table.CSV").write_text(text, encoding="utf-8")
    data = Table(file=str(root / "table.CSV"))
    assert data.spec.classes == ("2", "10", "30") and data.source.labels[-2:] == [2, 0]
    assert data.source.names[-2] == f'{root}/a, "b".png' and data.source.images[18].max() == 200


def test_text_labels_are_sorted_as_text(root: Path) -> None:
    lines = [[path, {"2": "b", "10": "-", "30": "10"}[label]] for path, label in rows(root)]
    assert Table(file=write(root, *lines)).spec.classes == ("-", "10", "b")
    lines = [[path, {"2": "b", "10": "-5", "30": "10"}[label]] for path, label in rows(root) if label != "2"]
    assert Table(file=write(root, *lines)).spec.classes == ("-5", "10")


def test_a_table_is_recorded_absolute_and_can_be_pickled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    write(root, *rows(root))
    data = Table(file="table.csv")
    assert data.recipe["init_args"]["file"] == str(root / "table.csv")
    monkeypatch.chdir(root.parent)
    assert build(data.recipe)().spec == data.spec
    images = pickle.loads(pickle.dumps(data.source.images))
    assert (images[3] == data.source.images[3]).all() and len(images) == 18


A, B = "größe/2-0.png,a", "größe/2-1.png,b"


@pytest.mark.parametrize(
    ("lines", "header", "text"),
    [
        ([A, B], "file,label", r"needs the columns path and label, and may have split, each once; it has \['file', 'l"),
        ([A, B], "path;label", r"it has \['path;label'\]"),
        ([A + ",x", B + ",y"], "path,label,label", "each once; it has"),
        ([], "path,label", "holds no images: no line follows the names"),
        ([], "", r"needs the columns path and label, .* it has \[\]"),
        ([A, B + ",c"], "path,label", "line 3: 3 cells under 2 names. A comma that belongs to a name needs quotes"),
        ([A, "größe/2-1.png"], "path,label", "line 3: 1 cells under 2 names"),
        ([A, "größe/2-1.png, "], "path,label", "line 3 has no label"),
        ([A, ",b"], "path,label", "line 3 has no path"),
        (
            [A + ",train", B + ",trian"],
            "path,label,split",
            r"line 3: split must be one of train, val, test \(validation, Test, \.\.\. also count\); got 'trian'",
        ),
        ([A + ",train", B + ",trian"], "path,label,split", "Did you mean 'train'?"),
        ([A + ",train", B + ","], "path,label,split", "line 3 has no split, and other lines have one"),
        ([A + ",val", B + ",test"], "path,label,split", r"has the splits \['test', 'val'\] but no 'train'"),
        ([A], "path,label", r"at least two labels for training; found \['a'\]"),
        (
            [A, B, "no.png,a"],
            "path,label",
            r"line 4: '.*/no.png' does not exist. Paths are absolute, or relative to '/",
        ),
        (
            [A, B, "no.png,a", "nor.png,b"],
            "path,label",
            "line 4: .*no.png' does not exist, and 1 other files do not exist either",
        ),
        ([A, B, "größe,a"], "path,label", "line 4: .*größe' does not exist"),
        ([A, B, "größe/../größe/2-0.png,b"], "path,label", "line 4: 'größe/../größe/2-0.png' is already in line 2"),
    ],
)
def test_invalid_tables_are_refused(lines: list[str], header: str, text: str, root: Path) -> None:
    with pytest.raises(UprightError, match=text):
        _ = Table(file=write(root, *lines, header=header)).source


def test_every_split_has_the_training_classes(root: Path) -> None:
    lines = rows(root, split=True)
    lines[0][1] = "20"
    with pytest.raises(
        UprightError, match=r"line 2: label '20' of split 'val' is not among the training labels \('2', "
    ):
        _ = Table(file=write(root, *lines, header="path,label,split")).source
    lines[0][1] = "10"
    with pytest.raises(UprightError, match=r"No image in class \['2'\] of split 'val' of '.*table.csv'"):
        _ = Table(file=write(root, *lines, header="path,label,split")).source


def test_invalid_files_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UprightError, match=r"no.csv' does not exist; `file` \(--data.file\) is a .csv or .parquet file"
    ):
        _ = Table(file=str(root / "no.csv")).spec
    with pytest.raises(UprightError, match=r"' is a folder; `file` \(--data.file\) is a .csv or .parquet file"):
        _ = Table(file=str(root)).spec
    (root / "table.xlsx").write_bytes(b"PK")
    with pytest.raises(UprightError, match=r"table.xlsx' must be a .csv or .parquet file"):
        _ = Table(file=str(root / "table.xlsx")).spec
    for encoding in ("latin1", "utf-16"):
        (root / "table.csv").write_text(f"path,label\n{A}\n", encoding=encoding)
        with pytest.raises(UprightError, match=r"table.csv' is not text in UTF-8; save it as UTF-8"):
            _ = Table(file=str(root / "table.csv")).spec
    (root / "table.csv").write_text(f'path,label\n"{"x" * 200_000}",a\n')
    with pytest.raises(UprightError, match=r"table.csv' cannot be read: field larger than"):
        _ = Table(file=str(root / "table.csv")).spec
    (root / "table.parquet").write_text("path,label")
    with pytest.raises(UprightError, match=r"table.parquet' cannot be read as Parquet: "):
        _ = Table(file=str(root / "table.parquet")).spec
    content = Path(parquet(root, path=["a"] * 100, label=list(range(100)))).read_bytes()
    (root / "table.parquet").write_bytes(content[:-20])
    with pytest.raises(UprightError, match=r"table.parquet' cannot be read as Parquet: "):
        _ = Table(file=str(root / "table.parquet")).spec
    with pytest.raises(UprightError, match=r"needs the columns path and label, .* it has \['paths'\]"):
        _ = Table(file=parquet(root, paths=["a"])).spec
    with pytest.raises(UprightError, match=r"line 2 has no label"):
        _ = Table(file=parquet(root, path=["a", "b"], label=["x", None])).spec
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UprightError, match=r"needs the package 'pyarrow': pip install 'upright\[parquet\]', or save it"
    ):
        _ = Table(file=str(root / "table.parquet")).spec


def test_an_invalid_image_is_named(root: Path) -> None:
    (root / "größe/2-0.png").write_bytes(b"")
    data = Table(file=write(root, *rows(root)))
    with pytest.raises(UprightError, match=r"größe/2-0.png' is in none of the formats"):
        data.source.images[0]
    assert data.source.images[1].dtype == np.uint8
