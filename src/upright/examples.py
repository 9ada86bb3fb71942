"""``upright configs``: the configs and the example bundle that come with Upright.

They are in the wheel (``setup.py`` copies them), and in the root folder of a checkout.
"""

import shutil
from pathlib import Path

from upright.errors import UserError, nearest
from upright.options import Configs

BUNDLE = Path("export/digits")
INSTALLED = Path(__file__).parent / "examples_data"
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2]  # the folder that contains `configs` and `BUNDLE`


def configs(options: Configs) -> int:
    """List the configs with the comment at their top, or copy them and the example bundle."""
    if options.action == "list":
        names = known_configs()
        width = max(map(len, names))
        for name, path in names.items():
            comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
            # The first comment of an experiment is its command.
            about = next((text for text in comments if not text.startswith("upright ")), "")
            print(f"{name:<{width}}  {about.removesuffix(' Measured by:')}")
        print(f"\nUse one: upright fit --config stn_lenet\nExample bundle: {ROOT / BUNDLE}")
        return 0
    targets = {folder: Path(options.to, folder) for folder in (Path("configs"), BUNDLE)}
    for target in filter(Path.exists, targets.values()):
        raise UserError(f"'{target}' exists and is not replaced; give another folder with --to.")
    for folder, target in targets.items():
        shutil.copytree(ROOT / folder, target)
        print(f"Copied: {target}")
    return 0


def known_configs() -> dict[str, Path]:
    """Return the configs that come with Upright, by their name below ``configs/`` without suffix."""
    folder = ROOT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """Return an existing path, or else the config of this name that comes with Upright, or else the path.

    ``stn_lenet``, ``stn_lenet.yaml`` and ``configs/stn_lenet.yaml`` name the same config, and so do ``data/digits`` and
    ``configs/data/digits.yaml``.

    Raises:
        UserError: for a name that is almost one of them.
    """
    path, key = Path(name), str(name).removeprefix("configs/").removesuffix(".yaml")
    if path.exists():
        return path
    configs_by_name = known_configs()
    is_name = not path.suffix and not key.startswith((".", "/"))
    if is_name and key not in configs_by_name and (similar := nearest(key, configs_by_name)):
        raise UserError(f"There is no config '{name}'.{similar} `upright configs list` lists all.")
    return configs_by_name.get(key, path)
