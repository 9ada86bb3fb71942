"""``upright new``: write a project of your own.

`copier` reads the same template, by ``copier.yml`` in the root of Upright's repository. ``upright new`` needs neither
copier nor git nor a network.
"""

import keyword
import re
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from upright.errors import UserError
from upright.options import New

TEMPLATE = Path(__file__).parent / "template"
NAME = "[a-z][a-z0-9]*([-_][a-z0-9]+)*"
"""Regular expression of a project's name. ``copier.yml`` repeats it."""
TAKEN = ("build", "checkpoints", "configs", "dist", "export", "tests", "wandb")
"""Folders of a project that hold other things than its package."""


def new(options: New) -> int:
    """Write the project, unless its name cannot be used or its folder holds files."""
    folder = Path(options.project)
    # The name of "." is that of the working directory.
    name = folder.absolute().name
    package = package_name(name)
    # An empty clone of a repository is an empty folder, too.
    if folder.exists() and not (folder.is_dir() and all(path.name == ".git" for path in folder.iterdir())):
        raise UserError(f"'{folder}' exists and is not an empty folder; give another name, or delete it.")
    files = render(name, package)
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
    change = "" if folder.resolve() == Path.cwd() else f"  cd {folder}\n"
    print(f"Written: {folder} ({len(files)} files; the Python package is {package})\nNext:\n{change}  make demo")
    return 0


def package_name(name: str) -> str:
    """Return the name of the Python package of a project, unless the project cannot have this name."""
    if not re.fullmatch(NAME, name):
        similar = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        hint = f" Try '{similar}'." if re.fullmatch(NAME, similar) else ""
        raise UserError(
            f"Project name '{name}' must be lower-case letters and digits, with single dashes or underscores between "
            f"them, and start with a letter.{hint}"
        )
    package = name.replace("-", "_")
    if keyword.iskeyword(package):
        raise UserError(f"Project name '{name}' is a keyword of Python; give another name.")
    if package in TAKEN:
        raise UserError(f"Project name '{name}' is the name of another folder of the project; give another name.")
    # A folder without modules has a spec, too, but no origin.
    origin = getattr(find_spec(package), "origin", None)
    if origin or package in sys.stdlib_module_names:
        where = f" from '{origin}'" if origin else ""
        raise UserError(f"Project name '{name}': Python already imports '{package}'{where}; give another name.")
    return package


def render(name: str, package: str) -> dict[str, str]:
    """Return the files of a project: path -> content."""
    about = metadata("upright")
    urls = dict(url.split(", ") for url in about.get_all("Project-URL", ()))
    answers = {"_commit": f"v{about['Version']}", "_src_path": urls.get("Repository"), "project": name}
    values = {
        "project": name,
        "package": package,
        "_copier_conf": {"answers_file": ".copier-answers.yml"},
        "_copier_answers": {key: answer for key, answer in answers.items() if answer is not None},
    }
    # Copier's own settings, so that both write the same files.
    environment = Environment(keep_trailing_newline=True, undefined=StrictUndefined)
    files = {}
    for source in sorted(TEMPLATE.rglob("*.jinja")):
        path, text = source.relative_to(TEMPLATE).with_suffix("").as_posix(), source.read_text(encoding="utf-8")
        files[environment.from_string(path).render(values)] = environment.from_string(text).render(values)
    return files
