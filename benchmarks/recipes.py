"""Results of the recipes in ``configs/``: test accuracy, uprightness and minutes over several seeds.

    python benchmarks/recipes.py [NAME ...] [--seeds 3] [--quick]

It trains ``configs/NAME.yaml`` (by default all) with the seeds 0, 1, ... in ``checkpoints/recipes/NAME-SEED``, tests
the best checkpoint, prints a table, and updates its rows in docs/reference/recipes.md. README and the comments at the
top of the configs repeat these figures, and a test compares them. Complete runs are not trained again. ``--quick``
trains two steps in a temporary folder, by default of ``stn_lenet``, and does not change the page.
"""

import json
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

import yaml
from shared import ROOT, UPRIGHT, command_line, heading, row

from upright.evidence.finding import mean_and_spread
from upright.tables import read_rows

PAGE = ROOT / "docs/reference/recipes.md"


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


def update(results: dict[str, str]) -> None:
    """Replace the rows of these recipes in the page, or add them."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {name: line for line, name in re.findall(r"^(\| `(\w+)` \|.*)$", text, flags=re.M)}
    table = "".join(f"{line}\n" for _, line in sorted((rows | results).items()))
    PAGE.write_text(re.sub(r"^(\| `.*\n)+", lambda _: table, text, count=1, flags=re.M), encoding="utf-8")


def main() -> None:
    """Print a table and update the page."""
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
        heading("recipe", "data", "test accuracy", "uprightness", "minutes", "seeds")
        for name in names:
            data = Path(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))["data"]).stem
            runs = [measure(name, seed, folder, *limits) for seed in range(options.seeds)]
            columns = {"test/accuracy": 4, "test/uprightness": 3}
            cells = [mean_and_spread([run[c] for run in runs if c in run], digits) for c, digits in columns.items()]
            minutes = f"{statistics.median(run['minutes'] for run in runs):.1f}"
            line = row(f"`{name}`", f"`{data}`", *cells, minutes, options.seeds)
            if not options.quick:
                update({name: line})


if __name__ == "__main__":
    main()
