"""Images per second of `upright.runtime.ray_data.infer_images` with two workers, beside one.

    python benchmarks/many_images.py [--bundle export/digits] [--images 16000] [--rounds 2] [--quick]

The images are JPEGs of 640 x 480 pixels. One worker and two take turns. A round includes the start of the run, but not
that of the processes, which answer a few images before. It needs two free cores, and the extra `ray`.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from shared import ROOT, command_line, heading, quartiles, row

from upright.runtime.ray_data import infer_images


def write_images(folder: Path, count: int) -> None:
    """Write copies of one photograph: noise of few pixels, enlarged."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    image.save(folder / "0.jpg", quality=90)
    content = (folder / "0.jpg").read_bytes()
    for number in range(1, count):
        (folder / f"{number}.jpg").write_bytes(content)


def main() -> None:
    """Print the images per second of each number of workers, and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--bundle", default=str(ROOT / "export/digits"), help="the bundle; default: export/digits")
    parser.add_argument("--images", type=int, default=16000, help="number of images; default: 16000")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds; default: 2")
    options = parser.parse_args()
    count, rounds = (600, 2) if options.quick else (options.images, options.rounds)
    # With one worker, the process of the other one is idle; it must not end.
    settings = {"idle_worker_killing_time_threshold_ms": 600_000}
    ray.init(num_cpus=2, include_dashboard=False, _system_config=settings)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "few", 600)
        write_images(Path(scratch) / "images", count)
        infer_images(f"{scratch}/few", options.bundle, f"{scratch}/first", workers=2)
        for number in range(rounds):
            for workers in speeds:
                start, answers = time.perf_counter(), f"{scratch}/answers-{number}-{workers}"
                infer_images(f"{scratch}/images", options.bundle, answers, workers=workers)
                speeds[workers].append(count / (time.perf_counter() - start))
    one, two = speeds.values()
    heading("workers", "images per second, each round", "x one worker")
    row(1, ", ".join(f"{speed:.0f}" for speed in one), 1)
    row(2, ", ".join(f"{speed:.0f}" for speed in two), quartiles(two, one))


if __name__ == "__main__":
    main()
