"""Copy the configs and the example bundle into the wheel. ``pyproject.toml`` has all other settings."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    """Add ``upright/examples_data``, which `upright.examples` reads. An editable install reads the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "export/digits"):
                target = Path(self.build_lib, "upright/examples_data", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithExamples})
