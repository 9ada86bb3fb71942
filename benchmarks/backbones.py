"""The line from training to a verified bundle, for a small network of each of 20 families of timm.

    python benchmarks/backbones.py [NAME ...] [--quick]

It needs timm (``pip install 'upright[timm]'``). Weights and images are random: for each network it runs `upright fit`
for one step, `upright export --precision int8 --outputs logits`, and `upright verify`, in a temporary folder. It prints
a table, and updates its rows in docs/reference/backbones.md. ``--quick`` runs one tiny network and does not change the
page.

A cell is the number of the step, or the error of the command. ``export`` refuses a graph whose probabilities differ
from PyTorch's by more than 1e-4. The error of int8 has no limit here (``--max-drop 100``), because random weights have
no accuracy to lose.
"""

import json
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shared import ROOT, command_line, heading, row

from upright.cli import main as upright

PAGE = ROOT / "docs/reference/backbones.md"
CONFIG = ROOT / "configs/finetuning/timm.yaml"
FAMILIES = {
    "convolutional": (
        *("resnet10t", "densenet121", "mobilenetv3_small_050", "efficientnet_lite0", "regnetx_002", "ghostnet_050"),
        *("repvgg_a0", "mobileone_s0", "convnext_atto", "mambaout_femto"),
    ),
    "transformer": ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "xcit_nano_12_p16_224"),
    "perceptron": ("mixer_s32_224",),
    "hybrid": ("mobilevit_xxs", "edgenext_xx_small", "levit_128s", "fastvit_t8", "efficientformer_l1"),
}
KINDS = {name: kind for kind, names in FAMILIES.items() for name in names}
SIZES = {"efficientformer_l1": 224}
"""Sizes of networks that take only one; the others get `SIZE`."""
SIZE = 64
IMAGES = 20
"""Images per class."""


def write_images(root: Path) -> None:
    """Write random images of two classes."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(0, 256, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def run(*arguments: object) -> str | None:
    """Run a command of Upright. Return the last line of its error, or None if it succeeds."""
    errors = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        try:
            code = upright([str(argument) for argument in arguments])
        except Exception as error:  # a traceback is a result, too
            return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    lines = errors.getvalue().splitlines()
    return None if code == 0 else lines[-1].removeprefix("upright: error: ")[:120]


def measure(name: str, folder: Path) -> list[str]:
    """Return the cells of a network: image size, parameters, and the results of the three commands."""
    size, runs, bundle = SIZES.get(name, SIZE), folder / "checkpoints", folder / "export" / name
    fit = ["fit", "--config", CONFIG, "--name", name, "--trainer.default_root_dir", runs, "--wandb", "off"]
    fit += ["--data.root", folder / "images", "--data.size", size, "--data.batch_size", 8, "--trainer.callbacks", "[]"]
    fit += ["--model.network.name", name, "--model.network.pretrained", "false"]
    fit += ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1]
    if error := run(*fit):
        return [str(size), "", error, "", "", ""]
    state = torch.load(runs / name / "best.ckpt", weights_only=True)["state_dict"]
    millions = sum(value.numel() for key, value in state.items() if key.startswith("model.network")) / 1e6
    cells = [str(size), f"{millions:.1f}", "1 step"]
    export = ["export", runs / name, "--to", bundle.parent, "--outputs", "logits", "--max-drop", 100]
    if error := run(*export, "--precision", "int8"):
        only_int8 = run(*export) is None
        return [*cells, "within 1e-4, without int8" if only_int8 else error, "", error if only_int8 else ""]
    precisions = json.loads((bundle / "parity.json").read_text())["precisions"]
    return [
        *cells,
        f"{precisions['fp32']['largest_difference']:.1g}, logits {precisions['fp32']['other_outputs']['logits']:.1g}",
        run("verify", bundle) or "yes",
        f"{precisions['int8']['largest_difference']:.1g}, {bytes_ratio(precisions):.2f}",
    ]


def bytes_ratio(precisions: dict[str, dict[str, float]]) -> float:
    """Return the size of the int8 model, divided by that of the float32 model."""
    return precisions["int8"]["bytes"] / precisions["fp32"]["bytes"]


def update(results: dict[str, str]) -> None:
    """Replace the rows of these networks in the page, or add them; the order is that of `FAMILIES`."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {name: line for line, name in re.findall(r"^(\| `(\w+)` \|.*)$", text, flags=re.M)} | results
    table = "".join(f"{rows[name]}\n" for name in KINDS if name in rows)
    PAGE.write_text(re.sub(r"^(\| `.*\n)+", lambda _: table, text, count=1, flags=re.M), encoding="utf-8")


def main() -> None:
    """Print a table and update the page."""
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks of the table; default: all")
    options = parser.parse_args()
    if unknown := set(options.names) - KINDS.keys():
        parser.error(f"unknown networks {sorted(unknown)}; the table has {', '.join(KINDS)}")
    heading(
        "network", "kind", "size", "million parameters", "fit", "ONNX differs by", "verify", "int8 differs by, bytes"
    )
    for name in ["test_vit"] if options.quick else options.names or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder, "images"))
            line = row(f"`{name}`", KINDS.get(name, "transformer"), *measure(name, Path(folder)))
        if not options.quick:
            update({name: line})


if __name__ == "__main__":
    main()
