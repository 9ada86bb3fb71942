"""Print the notes of a release, which are the section of CHANGELOG.md for its version.

Usage: python .ci/release_notes.py v1.2.3

The tag must be ``v`` and the version of pyproject.toml. The heading of the section must be ``## [1.2.3] - YYYY-MM-DD``.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(tag: str) -> str:
    """Return the notes.

    Raises:
        SystemExit: if the tag is not the version, or if the section is missing, undated or empty.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        raise SystemExit(f"The tag is '{tag}', and pyproject.toml has version {version}: the tag must be 'v{version}'.")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n"
    section = re.search(rf"{heading}(.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M | re.S)
    if section is None or not section[1].strip():
        raise SystemExit(f"CHANGELOG.md needs a section '## [{version}] - YYYY-MM-DD' with text.")
    return section[1].strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python .ci/release_notes.py v1.2.3")
    print(release_notes(sys.argv[1]))
