"""What every recipe in ``configs/`` reaches: test accuracy, uprightness and minutes over several seeds.

    python benchmarks/recipes.py [NAME ...] [--seeds 3]

Trains ``configs/NAME.yaml`` (all of them by default) with the seeds 0, 1, ... into ``checkpoints/recipes/NAME-SEED``,
tests the best checkpoint, and prints a table. What is there already is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from upright.evidence.finding import mean_and_spread
from upright.tables import read_rows

FOLDER = Path("checkpoints/recipes")
UPRIGHT = [sys.executable, "-m", "upright"]


def measure(name: str, seed: int) -> dict[str, float]:
    """Metrics of the test split, and the minutes of training and validation."""
    run = FOLDER / f"{name}-{seed}"
    if not (run / "test.json").is_file():
        where = ["--trainer.default_root_dir", str(FOLDER), "--name", run.name, "--force", "--wandb", "off"]
        config = ["--config", f"configs/{name}.yaml", "--seed_everything", str(seed)]
        subprocess.run([*UPRIGHT, "fit", *config, *where], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*UPRIGHT, "test", "--ckpt_path", str(run / "best.ckpt")], check=True, stdout=subprocess.DEVNULL)
    seconds = sum(float(row["seconds"]) for row in read_rows(run / "metrics.csv"))
    metrics: dict[str, float] = json.loads((run / "test.json").read_text())["metrics"]
    return metrics | {"minutes": seconds / 60}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of configs; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2; default: 3")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2 to show a spread, got {options.seeds}")
    names = options.names or sorted(path.stem for path in Path("configs").glob("*.yaml"))
    print("| recipe | test accuracy | uprightness | minutes |\n|---|---|---|---|")
    for name in names:
        runs = [measure(name, seed) for seed in range(options.seeds)]
        columns = {"test/accuracy": 4, "test/uprightness": 3}
        cells = [mean_and_spread([run[c] for run in runs if c in run], digits) for c, digits in columns.items()]
        minutes = statistics.median(run["minutes"] for run in runs)
        print("|", " | ".join([name, *cells, f"{minutes:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
