"""Run studies one after the other, and show in docs/studies.md what came of them.

    python benchmarks/studies.py [NAME ...] [--seeds 3] [--gather]

All of them by default. A study that was interrupted goes on; ``--gather`` runs nothing and shows those that are there.
The page has a part per study, as ``upright study`` wrote it, and the pictures are beside it in docs/studies/.
"""

import argparse
import importlib
import pkgutil
import re
import shutil
from pathlib import Path

from upright.cli import main as upright
from upright.evidence import studies
from upright.evidence.study import claim_and_protocol

NAMES = [module.name for module in pkgutil.iter_modules(studies.__path__)]
DOCS = Path(__file__).resolve().parents[1] / "docs"
NOT_RUN = "**Not run yet.**"
HEAD = """# Studies: what the textbooks claim, measured

`upright study NAME` runs one, `upright study` lists them, `--quick` shows in seconds that one runs. Each is a short
file in `src/upright/evidence/studies/`: its docstring is the claim and the protocol, written before the runs; a claim
that does not hold is reported as such. Tables are means ± standard deviations over seeds, bands in pictures go from the
least to the greatest. Of minutes of processor time two cores take half. This page is made by `python
benchmarks/studies.py`.
"""


def gather(root: Path) -> None:
    """Put the studies' own pages into docs/studies.md; what was not run again stays."""
    page = DOCS / "studies.md"
    old = page.read_text() if page.exists() else ""
    parts = {part.split("\n", 1)[0]: f"## {part.strip()}\n" for part in re.split(r"^## ", old, flags=re.M)[1:]}
    (DOCS / "studies").mkdir(exist_ok=True)
    for name in NAMES:
        # The full one shows all of the other, but for what that costs: the last line.
        shown = [path for path in (root / f"study-{name}-full", root / f"study-{name}") if (path / "study.md").exists()]
        if shown:
            shutil.copyfile(shown[0] / f"{name}.png", DOCS / "studies" / f"{name}.png")
            first, *others = [(folder / "study.md").read_text() for folder in shown]
            costs = "".join(f"\n{other.splitlines()[-1]}\n" for other in others)
            parts[name] = first.replace(f"]({name}.png)", f"](studies/{name}.png)") + costs
        elif NOT_RUN in parts.get(name, NOT_RUN):
            claim, protocol = claim_and_protocol(importlib.import_module(f"{studies.__name__}.{name}"))
            parts[name] = f"## {name}\n\n{claim}\n\n{protocol}\n\n{NOT_RUN} `upright study {name}`\n"
    page.write_text("\n".join([HEAD, *(parts[name] for name in NAMES)]))


def main() -> None:
    """Run, then gather."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--gather", action="store_true", help="run nothing")
    options = parser.parse_args()
    for name in () if options.gather else options.names:
        if upright(["study", name, "--seeds", str(options.seeds)]):
            raise SystemExit(1)
    gather(Path("checkpoints"))


if __name__ == "__main__":
    main()
