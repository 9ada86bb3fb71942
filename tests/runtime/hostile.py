"""Campaigns of hostile input: `python -m tests.runtime.hostile decoder 1000` runs a thousand cases.

The campaigns are `decoder`, `manifest`, `http` and `checkpoint`. The number of a case determines its input, so one case
can run alone: `... decoder 1 20448`. The last line is JSON: the number of cases by outcome, the slowest case in seconds
of processor time, and the growth of the process in MB. A failure is a traceback with the number of the case. Failures
are: an error of another kind, more than `SECONDS`, a file opened for writing outside the folder of the case, a new
process, and a connection.
"""

import asyncio
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from upright.errors import UprightError
from upright.images import ImageSpec, decode
from upright.runtime.bundle import EXPECTED, MANIFEST, SUMS, Bundle, checksums
from upright.runtime.predictor import Predictor

SECONDS = 10
WATCHING: list[bool] = []
DIGITS = ROOT / "export/digits"
TOKENS = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\0\0\0\1",
    b"\0\0",
    b"\n",
    b'"',
    b"[" * 50,
    b"{",
    b"-",
]
TOKENS += [b"../", b"/etc/passwd", b"1e999", b"NaN", b"9" * 30, b"\xed\xa0\x80", b"\\ud800", b"null", b"%00"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Flip bits; change, delete, repeat or insert bytes. Most changes are near the start, where formats store sizes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        at = draw.randrange(min(len(changed), draw.choice((64, 512, len(changed)))))
        match draw.randrange(6):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.randrange(256)
            case 2:
                del changed[at : at + draw.choice((1, 4, 100))]
            case 3:
                changed[at:at] = changed[at : at + draw.choice((1, 8, 64))]
            case 4:
                token = draw.choice(TOKENS)
                changed[at : at + draw.choice((0, len(token)))] = token
            case 5:
                del changed[at if draw.random() < 0.2 else len(changed) :]
    return bytes(changed)


def image_files() -> list[bytes]:
    """Return small images in every format, with most options of the format."""
    draw = np.random.default_rng(0)
    modes = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "I;16": 1, "LAB": 3}
    options: dict[str, list[dict[str, Any]]] = {
        "PNG": [{}, {"interlace": 1}],
        "JPEG": [
            {},
            {"progressive": True},
            {"quality": 10, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"},
        ],
        "WEBP": [{}, {"lossless": True}, {"save_all": True, "append_images": [Image.new("RGB", (20, 16))]}],
        "GIF": [{}, {"save_all": True, "append_images": [Image.new("L", (20, 16))]}],
        "BMP": [{}],
        "TIFF": [
            {"compression": name}
            for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "lzma", "zstd")
        ],
    }
    files = []
    for mode, channels in modes.items():
        pixels = draw.integers(0, 256, (16, 20, channels), np.uint8).squeeze()
        image = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else Image.new(mode, (20, 16), 5)
        if mode in ("L", "LA", "RGB", "RGBA"):
            image = Image.fromarray(pixels)
        for format, choices in options.items():
            for choice in choices:
                file = io.BytesIO()
                try:
                    image.save(file, format, **choice)
                except (OSError, ValueError, RuntimeError, KeyError):
                    continue  # the format does not support this mode
                files.append(file.getvalue())
    return files


SPECS = [ImageSpec(n, 28, 28, ("a", "b"), (0.5,) * n, (0.5,) * n) for n in (1, 3)]


def decoder(folder: Path) -> Callable[[random.Random], str]:
    """Pass mutated image files to `decode`."""
    valid = image_files()
    for image in valid:
        decode(image, SPECS[0])

    def case(draw: random.Random) -> str:
        spec, content = draw.choice(SPECS), mutated(draw.choice(valid), draw)
        try:
            pixels = decode(content, spec, draw.choice((4_000_000, 100_000, 320)))
        except UprightError as error:
            return one_line(error)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == spec.channels
        return "decoded"

    return case


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\n",
    "\ud800",
    [],
    {},
    [[]],
]
HOSTILE += [
    "/etc/passwd",
    "../../secret",
    "samples/../../secret",
    "C:\\secret",
    "\\\\host\\share",
    "file:///etc/passwd",
]
HOSTILE += [
    "http://localhost/x",
    "samples/link",
    "samples/\0",
    "samples/.",
    "~/x",
    "a" * 5000,
    {"a": 1},
    ["x"] * 3,
    "__class__",
]


def damaged(tree: Any, draw: random.Random) -> Any:
    """Return a copy of JSON data with some values replaced, removed, renamed or repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 2, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
                node = node[key]
                continue
            match draw.randrange(4):
                case 0:
                    del node[key]
                case 1 if isinstance(node, list):
                    node.append(node[key])
                case 2 if isinstance(node, dict):
                    node[draw.choice(("", "a", "file", "format"))] = node.pop(key)
                case _:
                    node[key] = draw.choice(HOSTILE)
            break
    return tree


def manifest(folder: Path) -> Callable[[random.Random], str]:
    """Run commands on a bundle with a mutated manifest, samples or hashes. The hashes of changed files match."""
    from upright.options import Infer, Verify
    from upright.runtime.infer import infer
    from upright.runtime.verify import verify

    bundle = folder / "bundle"
    shutil.copytree(DIGITS, bundle)
    (bundle / "model.int8.onnx").unlink()
    (folder / "secret").write_bytes((bundle / "samples/00.png").read_bytes())
    original = {name: json.loads((bundle / name).read_text()) for name in (MANIFEST, EXPECTED)}
    del original[MANIFEST]["precisions"]["int8"]
    for name, content in original.items():
        (bundle / name).write_text(json.dumps(content))
    sums = {line.partition("  ")[2].strip(): line for line in checksums(bundle).splitlines(keepends=True)}
    content = {name: (bundle / name).read_bytes() for name in (*original, SUMS)}
    Bundle.open(write(bundle, content, sums))

    def case(draw: random.Random) -> str:
        name = draw.choice((MANIFEST, MANIFEST, EXPECTED, SUMS))
        if name != SUMS and draw.random() < 0.7:
            changed = json.dumps(damaged(original[name], draw)).encode()
        else:
            changed = mutated(content[name], draw)
        write(bundle, content | {name: changed}, sums)
        if name == SUMS:
            (bundle / SUMS).write_bytes(mutated((bundle / SUMS).read_bytes(), draw))
        try:
            opened = Bundle.open(bundle)
            outcome = "opened"
            if draw.random() < 0.2:
                Predictor(opened)
                verify(Verify(str(bundle)))
                infer(Infer(str(bundle), [str(bundle / "samples/00.png")], top=2))
                outcome = "verified"
        except UprightError as error:
            return one_line(error)
        return outcome

    return case


def write(bundle: Path, content: dict[str, bytes], sums: dict[str, str]) -> Path:
    """Write the files and their hashes into a bundle."""
    from hashlib import sha256

    for name in (MANIFEST, EXPECTED):
        (bundle / name).write_bytes(content[name])
        sums[name] = f"{sha256(content[name]).hexdigest()}  {name}\n"
    (bundle / SUMS).write_text("".join(line for _, line in sorted(sums.items())))
    return bundle


def http(folder: Path) -> Callable[[random.Random], str]:
    """Send requests to the ASGI application of `serve`, without a socket and without uvicorn's parser of headers."""
    from upright.options import Serve
    from upright.runtime.serving.service import Service

    service = Service(
        Predictor(DIGITS, threads=1, max_pixels=1_000_000),
        Serve(str(DIGITS), max_body_mb=0.3, max_queue=64, max_pixels=1_000_000, timeout_s=SECONDS),
    )
    app, loop = service.app(), asyncio.new_event_loop()
    valid = [*image_files(), *(path.read_bytes() for path in sorted(DIGITS.glob("samples/*.png")))]
    edge = b"multipart/form-data; boundary=edge"
    part = b'--edge\r\nContent-Disposition: form-data; name="p"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    tensor = {"name": "images", "shape": [2, 2, 2, 1], "datatype": "UINT8", "data": [1, 2, 3, 4, 5, 6, 7, 8]}
    request = {
        "id": "x",
        "parameters": {"binary_data_output": False},
        "inputs": [tensor],
        "outputs": [{"name": "labels"}],
    }
    nested = {"inputs": [tensor | {"data": [[[[1], [2]], [[3], [4]]]] * 2}]}
    encoded = {"inputs": [tensor | {"datatype": "BYTES", "shape": [1], "data": ["iVBORw0KGgo="]}]}

    def random_request(draw: random.Random) -> tuple[bytes, bytes, bytes, list[tuple[bytes, bytes]]]:
        """Return path, query, body and headers."""
        image = draw.choice(valid)
        match draw.randrange(5):
            case 0:
                return (
                    b"/v1/classify",
                    draw.choice((b"", b"top=3", mutated(b"top=3", draw))),
                    mutated(image, draw),
                    [],
                )
            case 1:
                body = b"".join(part + image + b"\r\n" for _ in range(draw.choice((1, 2, 70)))) + b"--edge--\r\n"
                kind = edge if draw.random() < 0.8 else mutated(edge, draw).replace(b"\n", b"").replace(b"\r", b"")
                return b"/v1/classify", b"", mutated(body, draw), [(b"content-type", kind)]
            case 2:
                tree = draw.choice((request, nested, encoded))
                body = json.dumps(tree if draw.random() < 0.5 else damaged(tree, draw)).encode()
                return b"/v2/models/digits/infer", b"", body if draw.random() < 0.3 else mutated(body, draw), []
            case 3:
                binary = {"inputs": [{**tensor, "parameters": {"binary_data_size": 8}}]}
                del binary["inputs"][0]["data"]
                start = json.dumps(binary).encode()
                header = str(len(start)).encode() if draw.random() < 0.7 else mutated(b"100", draw)
                body = start + bytes(8) if draw.random() < 0.3 else mutated(start + bytes(8), draw)
                return b"/v2/models/digits/infer", b"", body, [(b"inference-header-content-length", header)]
        path = draw.choice(
            (b"/v2/models/digits/infer", b"/v2/models/digits/versions/1", b"/v1/classify", b"/metrics", b"/v2")
        )
        return mutated(path, draw), mutated(b"a=b", draw), b"{}", []

    async def ask(draw: random.Random) -> str:
        path, query, body, headers = random_request(draw)
        scope = {"type": "http", "http_version": "1.1", "method": draw.choice((*["POST"] * 10, "GET", "X"))}
        scope |= {"path": path.decode("latin-1"), "raw_path": path, "query_string": query, "scheme": "http"}
        scope |= {"headers": headers, "server": ("x", 80), "client": None}
        parts = [body[: len(body) // 2], body[len(body) // 2 :]] if draw.random() < 0.2 else [body]
        messages = iter([*({"type": "http.request", "body": one, "more_body": one is not parts[-1]} for one in parts)])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        status, answer = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
        assert status in (200, 400, 404, 405, 413, 422), (status, answer)
        if status in (400, 413, 422):
            message = json.loads(answer)["error"]
            assert message and "\n" not in message, message
        assert service.waiting == service.held_bytes == 0
        return str(status)

    return lambda draw: loop.run_until_complete(ask(draw))


def checkpoint(folder: Path) -> Callable[[random.Random], str]:
    """Read mutated checkpoints."""
    import torch

    from upright.checkpoint import read_checkpoint

    path, files = folder / "x.ckpt", []
    content = {
        "upright": {"format": 1, "versions": {"upright": "0"}},
        "state_dict": {"a.weight": torch.rand(4, 3)},
        "epoch": 1,
    }
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        read_checkpoint(path)
        files.append(path.read_bytes())

    def case(draw: random.Random) -> str:
        path.write_bytes(mutated(draw.choice(files), draw))
        try:
            read_checkpoint(path)
        except UprightError as error:
            return one_line(error)
        return "read"

    return case


CAMPAIGNS = {"decoder": decoder, "manifest": manifest, "http": http, "checkpoint": checkpoint}


def one_line(error: UprightError) -> str:
    """Check that the message of an error is one line."""
    message = str(error)
    assert message and "\n" not in message, message
    return "refused"


def watch(folder: Path) -> None:
    """Fail from now on if a case opens files outside ``folder``, starts a process, or connects."""
    allowed = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not WATCHING:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) if mode else bool(flags & 3)
            outside = isinstance(path, str) and not path.startswith(allowed)
            if outside and (writes or path.endswith(("secret", "passwd"))):
                raise RuntimeError(f"opened {path!r} ({mode}, {flags})")
        elif event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "os.remove",
            "os.rename",
        ):
            raise RuntimeError(f"{event} {arguments}")

    sys.addaudithook(hook)


def peak() -> int:
    """Return the peak memory of this process in MB. In a child process, getrusage starts at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def cases(campaign: str, count: int, first: int = 0) -> Iterator[tuple[int, random.Random]]:
    """Yield the number and the random generator of each case."""
    for number in range(first, first + count):
        yield number, random.Random(f"{campaign} {number}")


def run(campaign: str, count: int, first: int = 0) -> dict[str, Any]:
    """Run ``count`` cases of a campaign, beginning with number ``first``."""

    def late(*_: object) -> None:
        raise TimeoutError(f"a case took {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    warnings.filterwarnings("ignore", module="PIL")
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        case = CAMPAIGNS[campaign](Path(folder))
        for _, draw in cases(f"{campaign} before", 100):
            case(draw)  # load modules and plugins before the measurement
        before = peak()
        watch(Path(folder))
        WATCHING.append(True)
        for number, draw in cases(campaign, count, first):
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                outcomes[case(draw)] += 1
            except BaseException:
                print(f"case {number} of {campaign}", file=sys.stderr)
                raise
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
        WATCHING.clear()
        grown = peak() - before
    return {"outcomes": dict(outcomes), "slowest_s": round(slowest, 3), "grown_mb": grown}


if __name__ == "__main__":
    sys.stdout, out = io.TextIOWrapper(io.BytesIO()), sys.stdout
    result = run(sys.argv[1], *map(int, sys.argv[2:]))
    print(json.dumps(result), file=out, flush=True)
    import os

    os._exit(0)  # do not wait for the server's threads
