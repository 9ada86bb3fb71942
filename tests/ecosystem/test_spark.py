"""A predictor in Spark, as docs/how-to/many-images.md shows it; it needs pyspark and Java."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from upright import Predictor

sql = pytest.importorskip("pyspark.sql")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
]


def test_a_function_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyspark.sql.functions import udf

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    predictor = Predictor(ROOT / "export/digits", threads=1)
    paths = sorted(map(str, Path(ROOT / "export/digits/samples").glob("*.png")))
    builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    try:
        frame = spark.createDataFrame([(path,) for path in paths], "path string").repartition(4)
        frame = frame.withColumn("label", udf(lambda path: predictor(path).label)("path"))
        labels = {row["path"]: row["label"] for row in frame.collect()}
    finally:
        spark.stop()
    assert labels == {path: answer.label for path, answer in zip(paths, predictor.predict(paths), strict=True)}
