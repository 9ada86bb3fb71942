import json
import shutil
from pathlib import Path

import yaml

from tests.conftest import ROOT, Upright


def test_the_demo_runs_all_commands(upright: Upright, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = yaml.safe_load((tmp_path / "configs/stn_lenet.yaml").read_text())
    config["trainer"]["max_epochs"] = 2
    (tmp_path / "configs/stn_lenet.yaml").write_text(yaml.safe_dump(config))
    for _ in range(2):
        answer = upright("demo")
        assert answer.code == 0, answer.err
    for command in ("fit", "test", "export", "verify", "infer"):
        assert f"\n$ upright {command} " in answer.out
    metrics = json.loads((tmp_path / "checkpoints/demo/test.json").read_text())["metrics"]
    assert f"PyTorch, from the datamodule    {metrics['test/accuracy']:.4f}" in answer.out
    # PNG files and the graph preserve the pixels, so the predictions are the same.
    assert f"ONNX Runtime, from PNG files    {metrics['test/accuracy']:.4f}" in answer.out
    assert f"Uprightness                       {metrics['test/uprightness']:.3f}" in answer.out
    assert f"Median deviation                  {metrics['test/relative_degrees_median']:.1f} " in answer.out
    assert len(list((tmp_path / "checkpoints/demo/test-images").rglob("*.png"))) == 3231
    assert (tmp_path / "checkpoints/demo/test_transformer.png").exists()
