"""Results of the recipes in ``configs/``: test accuracy, uprightness and minutes over several seeds.

    python benchmarks/recipes.py [NAME ...] [--seeds 3] [--quick]

It trains ``configs/NAME.yaml`` (by default all) with the seeds 0, 1, ... in ``checkpoints/recipes/NAME-SEED``, tests
the best checkpoint, and prints a table. Complete runs are not trained again. ``--quick`` trains two steps in a
temporary folder, by default of ``stn_lenet``.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from shared import ROOT, UPRIGHT, command_line, heading, row

from upright.evidence.finding import mean_and_spread
from upright.tables import read_rows


def measure(name: str, seed: int, folder: Path, *options: str) -> dict[str, float]:
    """Return the metrics of the test split, and the duration of training and validation in minutes."""
    run = folder / f"{name}-{seed}"
    if not (run / "test.json").is_file():
        place = ["--trainer.default_root_dir", str(folder), "--name", run.name, "--force", "--wandb", "off"]
        config = ["--config", str(ROOT / f"configs/{name}.yaml"), "--seed_everything", str(seed)]
        test = ["test", "--ckpt_path", str(run / "best.ckpt")]
        for command in (["fit", *config, *place, *options], test):
            subprocess.run([*UPRIGHT, *command], check=True, stdout=subprocess.DEVNULL)
    seconds = sum(float(line["seconds"]) for line in read_rows(run / "metrics.csv"))
    metrics: dict[str, float] = json.loads((run / "test.json").read_text())["metrics"]
    return metrics | {"minutes": seconds / 60}


def main() -> None:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", help="names of configs; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least 2; default: 3")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2 to show a spread, got {options.seeds}")
    names = options.names or sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    folder, limits = Path("checkpoints/recipes"), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            names, options.seeds, folder = options.names or ["stn_lenet"], 2, Path(scratch)
            limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
        heading("recipe", "test accuracy", "uprightness", "minutes")
        for name in names:
            runs = [measure(name, seed, folder, *limits) for seed in range(options.seeds)]
            columns = {"test/accuracy": 4, "test/uprightness": 3}
            cells = [mean_and_spread([run[c] for run in runs if c in run], digits) for c, digits in columns.items()]
            row(name, *cells, f"{statistics.median(run['minutes'] for run in runs):.1f}")


if __name__ == "__main__":
    main()
