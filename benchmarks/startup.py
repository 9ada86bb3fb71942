"""Time from the command `upright fit` to its first step, compared with importing the modules that it uses.

    python benchmarks/startup.py [--rounds 7] [--quick]

Two fresh processes take turns: `upright fit --config configs/stn_lenet.yaml`, which ends at its first step, and a
Python that only imports the modules of that run. Both run with W&B off and offline. The table has medians in seconds.
Its last columns are the time of `fit` beyond the imports of the same round.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from shared import ROOT, UPRIGHT, command_line, heading, row

MODULES = (
    "upright.runs.cli.run, upright.architectures.transformer_network, upright.architectures.lenet, sklearn.datasets"
)


class StopAtFirstStep(Callback):
    """Record the time of the first step, and end the process."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        Path(os.environ["FIRST_STEP"]).write_text(str(time.time()))
        os._exit(0)


def fit(wandb: str, folder: Path) -> float:
    """Return the seconds to the first step."""
    first_step = folder / "first_step"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"FIRST_STEP": str(first_step), "PYTHONPATH": path}
    command = [*UPRIGHT, "fit", "--config", str(ROOT / "configs/stn_lenet.yaml")]
    command += ["--trainer.callbacks+=startup.StopAtFirstStep", "--wandb", wandb, "--force"]
    start = time.time()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return float(first_step.read_text()) - start


def imports(wandb: str) -> float:
    """Return the seconds that the imports take."""
    start = time.time()
    program = f"import {MODULES}" + (", wandb" if wandb != "off" else "")
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.time() - start


def main() -> None:
    """Print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; default: 7")
    options = parser.parse_args()
    heading("W&B", "fit to its first step, s", "its imports, s", "beyond the imports, s", "least", "greatest")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wandb in ("off",) if options.quick else ("off", "offline"):
            rounds = [(fit(wandb, folder), imports(wandb)) for _ in range(1 if options.quick else options.rounds + 1)]
            # The first round is a warm-up.
            fits, import_times = zip(*rounds[not options.quick :], strict=True)
            beyond = [one - other for one, other in zip(fits, import_times, strict=True)]
            medians = [statistics.median(column) for column in (fits, import_times, beyond)]
            row(wandb, *(f"{seconds:.2f}" for seconds in (*medians, min(beyond), max(beyond))))


if __name__ == "__main__":
    main()
