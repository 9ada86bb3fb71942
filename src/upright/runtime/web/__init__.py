"""``upright web``: write a static page that runs a bundle in the browser."""

import base64
import html
import json
import shutil
import tarfile
import zlib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from upright.errors import UserError, one_line
from upright.files import cache_folder, replacing_folder
from upright.options import Web
from upright.runtime.address import download
from upright.runtime.bundle import SAMPLES, Bundle
from upright.runtime.task import MultiLabel

RUNTIME_VERSION = "1.30.0"  # version of onnxruntime-web that this module downloads and the tests use
RUNTIME = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""SHA-256 of each file that runs WebAssembly."""
MIRRORS = tuple(
    f"{host}/onnxruntime-web@{RUNTIME_VERSION}/dist" for host in ("https://cdn.jsdelivr.net/npm", "https://unpkg.com")
)
ADVICE = (
    f"On a machine with a network, `npm pack onnxruntime-web@{RUNTIME_VERSION}` writes a file that you can give to "
    "--runtime."
)
PAGE = ("index.html", "style.css", "app.js")
MODEL = "model.json"
RUNTIME_FOLDER = "runtime"
ONE_FILE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src 'unsafe-inline'; "
    "img-src blob: data:; worker-src blob:"
)
"""Content security policy of a page that is one file. It forbids all network requests."""


def web(options: Web) -> int:
    """Write a page that needs no network. It replaces an older page."""
    bundle = Bundle.open(options.bundle, options.key, options.expect)
    model = bundle.model(options.precision)
    target = Path(options.to) / bundle.name
    if target.exists() and not (target.is_dir() and (_is_page(target) or not any(target.iterdir()))):
        raise UserError(
            f"'{target}' is not a page that `upright web` wrote, so it is not replaced; give another folder with --to."
        )
    runtime = read_runtime(options.runtime)
    with replacing_folder(target) as folder:
        (folder / RUNTIME_FOLDER).mkdir()
        for name, content in runtime.items():
            (folder / RUNTIME_FOLDER / name).write_bytes(content)
        (folder / SAMPLES).mkdir()
        for name in (model.name, *(sample["file"] for sample in bundle.samples)):
            (folder / name).write_bytes((bundle.files / name).read_bytes())
        (folder / MODEL).write_text(json.dumps(_facts(bundle, options.precision, folder)), encoding="utf-8")
        for name in PAGE:
            text = files(__package__).joinpath(name).read_text(encoding="utf-8")
            if name == "index.html":
                text = text.replace("{name}", html.escape(target.name))
            (folder / name).write_text(text, encoding="utf-8")
        if options.one_file:
            _into_one_file(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    has_views = any(name.startswith("warped") for name in bundle.manifest["other_outputs"])
    if not has_views and "Transformer" in json.dumps(bundle.manifest["provenance"]["model"]):
        print("Note: to show the output of the transformer, export with --outputs warped.")
    print(f"Page: {target}/index.html ({size / 1e6:.1f} MB, {options.precision})")
    server = f"python -m http.server --bind 127.0.0.1 --directory {target}, and open http://127.0.0.1:8000"
    print(f"Next: open {target}/index.html in a browser" if options.one_file else f"Next: {server}")
    return 0


def _is_page(folder: Path) -> bool:
    index = folder / "index.html"
    return index.is_file() and b'name="generator" content="upright web"' in index.read_bytes()[:2000]


def _facts(bundle: Bundle, precision: str, folder: Path) -> dict[str, Any]:
    """Return the data that the page reads. The manifest is not copied, because it names folders of the trainer."""
    manifest, spec, model = bundle.manifest, bundle.spec, bundle.model(precision).name
    runtime = {kind: f"{RUNTIME_FOLDER}/{name}" for kind, name in zip(("script", "wasm"), RUNTIME, strict=True)}
    return {
        "upright": version("upright"),
        "precision": precision,
        "tolerance": bundle.tolerance(precision),
        "threshold": bundle.threshold or 0,
        "thresholds": list(bundle.task.thresholds.values()) if isinstance(bundle.task, MultiLabel) else None,
        "task": spec.task,
        "classes": spec.classes,
        "channels": spec.channels,
        "network_size": [spec.height, spec.width],
        "resize": spec.resize,
        "background": spec.background,
        "shape": [length if isinstance(length, int) else None for length in manifest["input"]["shape"]],
        "views": [name for name in manifest["other_outputs"] if name.startswith("warped")],
        "model": model,
        "runtime": runtime,
        "bytes": {name: (folder / name).stat().st_size for name in (*runtime.values(), model)},
        "samples": [
            {key: sample[key] for key in ("file", "label") if key in sample}
            | {"expected": sample[bundle.task.output][precision]}
            for sample in bundle.samples
        ],
    }


def _into_one_file(folder: Path) -> None:
    """Embed all files in ``index.html``. A file that the page would fetch becomes an element with base64 text."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    style, app = ((folder / name).read_text(encoding="utf-8") for name in PAGE[1:])
    data = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in PAGE:
            content = base64.b64encode(path.read_bytes()).decode()
            data.append(f'<script type="text/plain" id="{name}">{content}</script>\n')
    policy = page.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    for old, new in (
        (policy, ONE_FILE_POLICY),
        ('<link rel="stylesheet" href="style.css">', f"<style>\n{style}</style>"),
        ('<script src="app.js" defer></script>\n', ""),
        ("</body>", f'{"".join(data)}<script id="app.js">\n{app}</script>\n</body>'),
    ):
        assert page.count(old) == 1
        page = page.replace(old, new)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "index.html").write_text(page, encoding="utf-8")


def read_runtime(source: str | None) -> dict[str, bytes]:
    """Return the files of onnxruntime-web by name.

    Args:
        source: the package, its ``dist`` folder, the file that ``npm pack`` writes, or the address of a folder with
            the files of `RUNTIME`. By default, the files come from the user's cache, which is filled from `MIRRORS`.

    Raises:
        UserError: if ``source`` does not exist, or is another version.
    """
    if source is None or source.startswith(("https://", "http://")):
        folders = [_download(MIRRORS if source is None else (source.rstrip("/"),))]
    elif Path(source).is_file():
        try:
            with tarfile.open(source) as package:
                members = {name: package.extractfile(f"package/dist/{name}") for name in RUNTIME}
                return {name: member.read() for name, member in members.items() if member}
        except (tarfile.TarError, zlib.error, KeyError, EOFError, OSError) as error:
            reason = one_line(error)
            raise UserError(f"--runtime '{source}' is not the package onnxruntime-web ({reason}). {ADVICE}") from None
    else:
        folders = [Path(source), Path(source) / "dist"]
    for folder in folders:
        if all((folder / name).is_file() for name in RUNTIME):
            return {name: (folder / name).read_bytes() for name in RUNTIME}
    raise UserError(f"--runtime '{source}' does not contain {' and '.join(RUNTIME)}. {ADVICE}")


def _download(mirrors: tuple[str, ...]) -> Path:
    folder = cache_folder() / f"onnxruntime-web-{RUNTIME_VERSION}"
    for name, digest in RUNTIME.items():
        failures = []
        for mirror in mirrors:
            try:
                download(f"{mirror}/{name}", digest, folder / name)
                break
            except UserError as error:
                failures.append(str(error))
        else:
            raise UserError(f"{' '.join(failures)} {ADVICE}")
    return folder
