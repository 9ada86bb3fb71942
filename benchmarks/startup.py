"""From the command `upright fit` to its first step, against importing what it has imported by then.

    python benchmarks/startup.py [--rounds 7]

Fresh processes in turn: `upright fit --config configs/stn_lenet.yaml`, which ends itself at its first step, with W&B
off and offline; and a Python that imports what that run uses and does nothing. Medians of seconds; the last columns are
what `fit` takes beyond the imports, round by round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).resolve().parents[1]
USES = "upright.runs.cli.run, upright.architectures.transformer_network, upright.architectures.lenet, sklearn.datasets"


class StopAtFirstStep(Callback):
    """Says when that is, and ends the process."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At the first step."""
        Path(os.environ["FIRST_STEP"]).write_text(str(time.time()))
        os._exit(0)


def fit(wandb: str, folder: Path) -> float:
    """Seconds to the first step."""
    reached = folder / "first_step"
    environment = os.environ | {"FIRST_STEP": str(reached), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "upright", "fit", "--config", str(ROOT / "configs/stn_lenet.yaml")]
    command += ["--trainer.callbacks+=startup.StopAtFirstStep", "--wandb", wandb, "--force"]
    start = time.time()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return float(reached.read_text()) - start


def imports(wandb: str) -> float:
    """Seconds to import what it uses."""
    start = time.time()
    program = f"import {USES}" + (", wandb" if wandb != "off" else "")
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.time() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    options = parser.parse_args()
    print("| W&B | fit to its first step, s | its imports, s | beyond them, s | least | greatest |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wandb in ("off", "offline"):
            rounds = []
            for _ in range(options.rounds + 1):
                rounds.append((fit(wandb, folder), imports(wandb)))
            fits, imported = zip(*rounds[1:], strict=True)
            beyond = [one - other for one, other in rounds[1:]]
            cells = [statistics.median(fits), statistics.median(imported), statistics.median(beyond)]
            row = [*(f"{cell:.2f}" for cell in cells), f"{min(beyond):.2f}", f"{max(beyond):.2f}"]
            print(f"| {wandb} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
