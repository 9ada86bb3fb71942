"""A spatial transformer trained by classification alone turns things upright only in part; the upright loss makes it.

Protocol: the digits, turned at random by up to 60 degrees in training; every test image at -60, -30, 0, 30 and 60
degrees; one split, the seeds change weights, order and augmentation; the checkpoint of the least validation loss.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from upright.errors import UprightError
from upright.evidence.study import mean_and_spread
from upright.files import write_text
from upright.training.cli import run as run_verb

VARIANTS = {
    "lenet": ("LeNet", ["--config", "configs/lenet.yaml"]),
    "transformer": ("spatial transformer", ["--config", "configs/stn_lenet.yaml", "--model.upright_weight", "0"]),
    "upright": ("with the upright loss", ["--config", "configs/stn_lenet.yaml"]),
}


def run(folder: Path, seeds: int) -> None:
    """Train every variant with every seed, test it, and write ``results.json`` and ``table.md`` into ``folder``."""
    if not Path("configs/stn_lenet.yaml").is_file():
        raise UprightError("There is no 'configs/stn_lenet.yaml' here; start the study in the checkout's own folder.")
    results: dict[str, list[dict[str, float]]] = {}
    for key, (_, options) in VARIANTS.items():
        for seed in range(seeds):
            name = f"{key}-{seed}"
            print(f"\n== {name}", flush=True)
            where = ["--trainer.default_root_dir", str(folder), "--name", name, "--force", "--wandb", "off"]
            run_verb("fit", [*options, *where, "--seed_everything", str(seed)])
            run_verb("test", ["--ckpt_path", str(folder / name / "best.ckpt")])
            metrics = json.loads((folder / name / "test.json").read_text())["metrics"]
            results.setdefault(key, []).append(metrics)
    table = _table(results)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.md", table)
    print(f"\n{table}\nWritten: {folder}/table.md, results.json; pictures: {folder}/*/test_transformer.png")


def _table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| network | test accuracy | uprightness |", "|---|---|---|"]
    for key, (title, _) in VARIANTS.items():
        cells = (mean_and_spread(results[key], name) for name in ("test/accuracy", "test/uprightness"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    plain, upright = (_values(results[key], "test/uprightness") for key in ("transformer", "upright"))
    held = max(upright) < min(plain)
    verdict = (
        f"The upright loss {'makes' if held else 'does not clearly make'} the transformer turn things upright: "
        f"uprightness {statistics.mean(plain):.3f} -> {statistics.mean(upright):.3f} "
        f"({'every' if held else 'not every'} seed with it is below every seed without it)."
    )
    count = len(results["upright"])
    return "\n".join([*lines, "", f"Mean ± standard deviation of {count} seeds. {verdict}", ""])


def _values(runs: list[dict[str, Any]], name: str) -> list[float]:
    return [run[name] for run in runs if name in run]
