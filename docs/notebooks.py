"""A hook of MkDocs: turn each notebook into a page of the site, with the outputs that are stored in it.

mkdocs-jupyter does the same with a stylesheet of its own, and its pages load MathJax from another host.
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``NAME.md`` and its images beside every ``NAME.ipynb``."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path, folder = notebook.src_uri.removesuffix(".ipynb"), notebook.src_uri.rpartition("/")[0]
        text, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
        files.append(File.generated(config, f"{path}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to a notebook lead to its page."""
    return re.sub(r"(\]\([^)]*)\.ipynb", r"\1.md", markdown)
