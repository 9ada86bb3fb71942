"""Run studies one after the other, and write their results to docs/explanation/studies.md.

    python benchmarks/studies.py [NAME ...] [--seeds 3] [--gather] [--quick]

By default all studies run. An interrupted study is resumed. ``--gather`` runs nothing and collects the results of
earlier runs. ``--quick`` runs `upright study NAME --quick` and does not change the page. The page has the output of
``upright study`` for each study, and the plots are in docs/explanation/studies/.
"""

import importlib
import pkgutil
import re
import shutil
from pathlib import Path

from shared import ROOT, command_line

from upright.cli import main as upright
from upright.evidence import studies
from upright.evidence.study import claim_and_protocol

NAMES = [module.name for module in pkgutil.iter_modules(studies.__path__)]
DOCS = ROOT / "docs/explanation"
NOT_RUN = "**Not run yet.**"
HEAD = """# Studies: textbook claims, measured

Run a study with `upright study NAME`. `upright study` lists all of them, and `--quick` shows within seconds that one
runs.

- Each study is a short file in `src/upright/evidence/studies/`. Its docstring is the claim and the protocol, written
  before the runs.
- A claim that does not hold is reported as such.
- Tables give means ± standard deviations over seeds. Bands in plots go from the smallest to the largest value.
- The cost is processor time. On two cores, halve it.

`python benchmarks/studies.py` runs all studies and writes this page.
"""


def gather(root: Path) -> None:
    """Write docs/explanation/studies.md; keep the sections of studies without new results."""
    page = DOCS / "studies.md"
    old = page.read_text() if page.exists() else ""
    parts = {part.split("\n", 1)[0]: f"## {part.strip()}\n" for part in re.split(r"^## ", old, flags=re.M)[1:]}
    (DOCS / "studies").mkdir(exist_ok=True)
    for name in NAMES:
        # The full study includes the standard one, except for its cost, which is the last line.
        pages = [path for path in (root / f"study-{name}-full", root / f"study-{name}") if (path / "study.md").exists()]
        if pages:
            shutil.copyfile(pages[0] / f"{name}.png", DOCS / "studies" / f"{name}.png")
            first, *others = [(folder / "study.md").read_text() for folder in pages]
            costs = "".join(f"\n{other.splitlines()[-1]}\n" for other in others)
            parts[name] = first.replace(f"]({name}.png)", f"](studies/{name}.png)") + costs
        elif NOT_RUN in parts.get(name, NOT_RUN):
            claim, protocol = claim_and_protocol(importlib.import_module(f"{studies.__name__}.{name}"))
            parts[name] = f"## {name}\n\n{claim}\n\n{protocol}\n\n{NOT_RUN} `upright study {name}`\n"
    page.write_text("\n".join([HEAD, *(parts[name] for name in NAMES)]))


def main() -> None:
    """Run the studies, then gather their results."""
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--gather", action="store_true", help="only collect the results of earlier runs")
    options = parser.parse_args()
    limits = ["--quick", "--seeds", "2"] if options.quick else ["--seeds", str(options.seeds)]
    for name in () if options.gather else options.names:
        if upright(["study", name, *limits]):
            raise SystemExit(1)
    if not options.quick:
        gather(Path("checkpoints"))


if __name__ == "__main__":
    main()
