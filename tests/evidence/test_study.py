import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright
from upright.evidence.studies import uprightness

QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]


def results(plain: list[float], upright: list[float]) -> dict[str, list[dict[str, float]]]:
    def runs(measured: list[float]) -> list[dict[str, float]]:
        return [{"test/accuracy": 0.98 + i / 100, "test/uprightness": value} for i, value in enumerate(measured)]

    return {"lenet": [{"test/accuracy": 0.9}] * 2, "transformer": runs(plain), "upright": runs(upright)}


def test_the_sentence_says_what_the_numbers_say() -> None:
    held = uprightness._table(results([0.2, 0.3], [0.1, 0.19]))
    assert "The upright loss makes the transformer turn" in held and "(every seed" in held
    assert "| LeNet | 0.9000 ± 0.0000 | - |" in held
    assert "| with the upright loss | 0.9850 ± 0.0071 | 0.1450 ± 0.0636 |" in held
    not_held = uprightness._table(results([0.2, 0.3], [0.1, 0.21]))
    assert "does not clearly make" in not_held and "(not every seed" in not_held


def test_the_study_measures_what_it_writes(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    quick = {key: (title, [*options, *QUICK]) for key, (title, options) in uprightness.VARIANTS.items()}
    monkeypatch.setattr(uprightness, "VARIANTS", quick)
    answer = upright("study", "uprightness", "--seeds", 2)
    assert answer.code == 0
    folder = tmp_path / "checkpoints/study-uprightness"
    found = json.loads((folder / "results.json").read_text())
    assert {key: len(runs) for key, runs in found.items()} == {"lenet": 2, "transformer": 2, "upright": 2}
    assert found["upright"][1] == json.loads((folder / "upright-1/test.json").read_text())["metrics"]
    assert found["upright"][0] != found["upright"][1]
    assert (folder / "table.md").read_text() == uprightness._table(found)
    assert (folder / "upright-0/test_transformer.png").exists()
