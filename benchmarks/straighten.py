"""Quality and speed of `upright straighten`, on photographs that this script rotates by known angles.

    python benchmarks/straighten.py BUNDLE PHOTOGRAPHS... [--count 1000] [--quick] [-- OPTIONS]

PHOTOGRAPHS are upright images, or folders of them. The script writes COUNT rotated versions of them to a temporary
folder: half of them by exact quarter turns of the pixels, the others by a random angle, resampled and cropped. It runs
`upright straighten` with the OPTIONS on this folder, and checks that it changed no source.

The angle that remains is that of the copy. A copy is right if it is nearer to upright than to the three other quarter
turns. The 95 % interval of a share (Wilson) treats the images as independent.
"""

import csv
import hashlib
import io
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from shared import UPRIGHT, command_line, heading, row

from upright.image_paths import find_images
from upright.images import FORMATS
from upright.runtime.rotation import QUARTERS, Resampling, rotate
from upright.runtime.task import deviation


def write_rotated(photographs: list[Path], count: int, folder: Path, seed: int) -> dict[str, float]:
    """Write rotated versions of the photographs, and return their angles anticlockwise in degrees by file name."""
    generator, angles = random.Random(seed), {}
    for number in range(count):
        if not number % len(photographs):
            generator.shuffle(photographs)
        with Image.open(photographs[number % len(photographs)], formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        turns, exact = generator.randrange(4), number % 2 == 0
        angle = 90.0 * turns if exact else generator.uniform(-180, 180)
        image.info.clear()
        if exact and turns:
            image = image.transpose(QUARTERS[4 - turns])
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        content = buffer.getvalue() if exact else rotate(buffer.getvalue(), 0, -angle, Resampling())[0]
        name = f"{number:05d}.jpg"
        (folder / name).write_bytes(content)
        angles[name] = angle
    return angles


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def remaining_angle(line: dict[str, str], angle: float) -> float:
    """Return the angle of a copy in degrees, from 0 to 180."""
    estimate = float(line["angle"] or 0)
    if line["action"] != "rotated":
        estimate = 0.0
    elif line["how"] != "resampled":
        estimate = 90.0 * round(estimate / 90)
    return float(deviation(np.array([angle - estimate]))[0])


def share(right: int, total: int) -> str:
    """Return a share with its 95 % interval (Wilson), in percent."""
    if not total:
        return "-"
    z, mean = 1.96, right / total
    centre, spread = mean + z * z / total / 2, z * (mean * (1 - mean) / total + (z / total / 2) ** 2) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z * z / total) for sign in (-1, 1))
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    """Print the shares of right copies, the counts of actions, and the speed."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = command_line(__doc__)
    parser.add_argument("bundle", help="a bundle that estimates the orientation")
    parser.add_argument("photographs", nargs="+", help="upright images, or folders of them")
    parser.add_argument("--count", type=int, default=1000, help="number of rotated images; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="seed of the angles; default: 0")
    options = parser.parse_args(sys.argv[1:end])
    photographs = list(find_images(options.photographs))
    with tempfile.TemporaryDirectory() as scratch:
        folder, copies = Path(scratch) / "rotated", Path(scratch) / "copies"
        folder.mkdir()
        angles = write_rotated(photographs, 40 if options.quick else options.count, folder, options.seed)
        before, start = hashes(folder), time.perf_counter()
        command = [*UPRIGHT, "straighten", options.bundle, str(folder), "--to", str(copies), *sys.argv[end + 1 :]]
        code = subprocess.run(command, check=False).returncode
        seconds = time.perf_counter() - start
        if code:
            sys.exit(f"upright straighten exited with {code}.")
        if hashes(folder) != before:
            sys.exit("upright straighten changed a source.")
        with open(copies / "straighten.csv", newline="", encoding="utf-8") as file:
            table = {line["copy"]: line for line in csv.DictReader(file)}
        if not table.keys() == angles.keys() == {path.name for path in copies.glob("*.jpg")}:
            sys.exit("upright straighten lost an image.")
    print(f"\n{len(photographs)} photographs, {len(angles)} rotated versions; no source was changed or lost.\n")
    remaining = {name: remaining_angle(line, angles[name]) for name, line in table.items()}
    exact = {name for number, name in enumerate(angles) if number % 2 == 0}
    upright = {name for name in exact if not angles[name]}
    heading("images", "number", "rotated", "upright", "unsure", "right of the rotated", "median angle of the rotated")
    for title, names in (
        ("all", angles.keys()),
        ("exact quarter turns", exact),
        ("other angles", angles.keys() - exact),
        ("already upright", upright),
    ):
        actions = [table[name]["action"] for name in names]
        rotated = [remaining[name] for name in names if table[name]["action"] == "rotated"]
        counts = [actions.count(action) for action in ("rotated", "upright", "unsure")]
        median = f"{np.median(rotated):.1f}" if rotated else "-"
        row(title, len(actions), *counts, share(sum(angle < 45 for angle in rotated), len(rotated)), median)
    print(f"\n{len(angles) / seconds:.1f} images per second, with the start of the process.")


if __name__ == "__main__":
    main()
