"""Hostile input is refused with one line and has no side effects. `hostile` contains the campaigns."""

import builtins
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_bundle
from tests.runtime.hostile import CAMPAIGNS, DIGITS, SPECS, peak
from upright.architectures.lenet import LeNet
from upright.checkpoint import read_checkpoint
from upright.errors import UprightError
from upright.images import ImageSpec, decode
from upright.options import Infer, Verify
from upright.runtime.bundle import EXPECTED, MANIFEST, SUMS, Bundle, checksums, file_names, write_archive
from upright.runtime.infer import infer
from upright.runtime.predictor import Predictor
from upright.runtime.serving.protocol import Model
from upright.runtime.verify import verify

FULL_CASES = {"decoder": 50_000, "http": 30_000, "manifest": 15_000, "checkpoint": 10_000}
"""Number of cases of each complete campaign, 105,000 in total."""


@pytest.mark.parametrize("cases", [500, pytest.param(0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id="all")])
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_campaign(campaign: str, cases: int) -> None:
    """Every case is answered or refused within seconds. None crashes, needs much memory, or leaves its folder."""
    cases = cases or FULL_CASES[campaign]
    command = [sys.executable, "-m", "tests.runtime.hostile", campaign, str(cases)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout)
    print(campaign, result)
    assert sum(result["outcomes"].values()) == cases and len(result["outcomes"]) > 1
    assert result["grown_mb"] < 300


# One changed byte.


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_changed_byte_of_a_bundle_is_refused(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that opens a bundle refuses it before parsing, with the name of the file."""
    bundle = Path(shutil.copytree(DIGITS, tmp_path / "digits"))
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(0)
    openers: tuple[Callable[[], object], ...] = (
        lambda: Bundle.open(bundle),
        lambda: Predictor(bundle, "int8"),
        lambda: verify(Verify(str(bundle))),
        lambda: infer(Infer(str(bundle), [str(bundle / "samples")])),
    )
    for number in range(count):
        # Alternate between a uniform choice of files and a uniform choice of bytes.
        path = files[number // 2 % len(files)] if number % 2 else draw.choices(files, sizes)[0]
        content = path.read_bytes()
        at = draw.randrange(len(content))
        changed = bytearray(content)
        changed[at] ^= draw.choice((1 << draw.randrange(8), draw.randrange(1, 256)))
        path.write_bytes(changed)
        for opener in openers:
            with pytest.raises(UprightError, match="is damaged or was changed: ") as caught:
                opener()
            # A change in SHA256SUMS is reported with the name of some file.
            assert path.name == SUMS or path.relative_to(bundle).as_posix() in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(content)
    assert capsys.readouterr().out == ""
    assert verify(Verify(str(bundle))) == 0


# Images.


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bombs() -> dict[str, bytes]:
    """Return small files that declare a large image, or have large data beside a small image."""
    head = b"\x89PNG\r\n\x1a\n"
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0))
    rows, zeros = chunk(b"IDAT", zlib.compress(bytes(6))), zlib.compress(bytes(200_000_000))
    text, profile = chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"iCCP", b"a\0\0" + zeros)
    end = chunk(b"IEND", b"")
    files = {
        "size": head + huge + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + end,
        "text": head + small + text * 4 + rows + end,
        "profile": head + small + profile + rows + end,
        "rows": head + small + chunk(b"IDAT", zeros) + end,
    }
    for format, options in (("GIF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})):
        file = io.BytesIO()
        Image.new("L", (9_000, 9_000)).save(file, format, **options)
        files[format] = file.getvalue()
    jpeg = io.BytesIO()
    Image.new("L", (16, 16)).save(jpeg, "JPEG")
    content = bytearray(jpeg.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    files["JPEG"] = bytes(content)
    files["BMP"] = b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return files


def test_decompression_bombs_need_little_memory(tmp_path: Path) -> None:
    # Each file is decoded in its own process, which may refuse it or return an image within the limit.
    program = (
        "import sys; from tests.runtime.hostile import SPECS, peak; from upright.images import decode\n"
        "from upright.errors import UprightError; import warnings; warnings.simplefilter('ignore')\n"
        "content = open(sys.argv[1], 'rb').read(); import PIL.Image; PIL.Image.init()\n"
        "before = peak()\n"
        "try: print(decode(content, SPECS[1], 16_000_000).shape)\n"
        "except UprightError as error: print(error)\n"
        "print(peak() - before)"
    )
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
        process = subprocess.run(
            [sys.executable, "-c", program, tmp_path / name], cwd=ROOT, capture_output=True, text=True, check=True
        )
        result, growth = process.stdout.splitlines()
        print(name, len(content), result, growth)
        assert int(growth) < 300, (name, result)
        if name not in ("text", "profile", "rows"):
            assert "pixels are more than the limit of 16000000" in result or "cannot be decoded" in result, result


def test_only_allowed_formats_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would pass PostScript to Ghostscript."""
    calls: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "x.png").write_bytes(postscript)
    for source in (postscript, tmp_path / "x.png"):
        with pytest.raises(
            UprightError, match="is in none of the formats that can be read: BMP, GIF, JPEG, PNG, TIFF, WEBP"
        ):
            decode(source, SPECS[0])
    assert not calls


# Requests.


def test_text_among_numbers_needs_little_memory() -> None:
    """NumPy would allocate the size of the longest element for each: 20 GB."""
    data = ["a" * 250_000] + ["b"] * 20_000
    tensor = {"name": "images", "shape": [1, 1, 1, 1], "datatype": "UINT8", "data": data}
    model = Model("digits", "1", Predictor(DIGITS, threads=1).session, ())
    before = peak()
    with pytest.raises(UprightError, match="must be integers from 0 to 255"):
        model.read(json.dumps({"inputs": [tensor]}).encode(), None)
    assert peak() - before < 50


# Bundles.


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ImageSpec(1, 28, 28, ("a", "b", "c"), (0.5,), (0.5,))
    return write_bundle(tmp_path_factory.mktemp("original") / "made", spec, LeNet)


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, which the test may change."""
    return Path(shutil.copytree(original, tmp_path / "made"))


def with_new_sums(bundle: Path) -> Path:
    """Update the hashes of a bundle, as an attacker can do."""
    (bundle / SUMS).write_text(checksums(bundle))
    return bundle


OUTSIDE = ["../secret.png", "samples/../../secret.png", "{folder}/secret.png", "samples/link.png", "samples/00.png\0"]
OUTSIDE += [
    "C:\\secret.png",
    "\\\\host\\secret.png",
    "file:///etc/passwd",
    "http://localhost/x.png",
    "samples",
    "samples/..",
]


@pytest.mark.parametrize("file", OUTSIDE)
def test_samples_outside_of_the_bundle_are_refused(
    made: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, upright: Upright
) -> None:
    shutil.copy(made / "samples/00.png", tmp_path / "secret.png")
    samples = json.loads((made / EXPECTED).read_text())
    samples[0]["file"] = file.format(folder=tmp_path)
    (made / EXPECTED).write_text(json.dumps(samples))
    with_new_sums(made)
    opened, real = [], builtins.open

    def record(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return real(path, *args, **kwargs)

    for module in (builtins, io):  # `Path.open` calls `io.open`
        monkeypatch.setattr(module, "open", record)
    for command in (["verify", made], ["infer", made, made / "samples"], ["serve", made]):
        answer = upright(*command)
        assert answer.code == 2 and "the file or the label of sample" in answer.err
        assert len(answer.err.splitlines()) == 1
    assert opened and not any(path.endswith("secret.png") for path in opened)


def test_a_link_to_other_content_a_link_to_a_folder_and_a_pipe_are_refused(made: Path, tmp_path: Path) -> None:
    original, secret, sample = tmp_path / "original.png", tmp_path / "secret.png", made / "samples/00.png"
    shutil.copy(sample, original)
    secret.write_bytes(b"secret")
    sample.unlink()
    sample.symlink_to(secret)
    with pytest.raises(UprightError, match=r"is damaged or was changed: samples/00\.png"):
        Bundle.open(made)
    sample.unlink()
    os.mkfifo(sample)
    with pytest.raises(UprightError, match=r"holds '00\.png', which is not a file; replace it by a copy"):
        Bundle.open(made)
    sample.unlink()
    sample.symlink_to(original)
    Bundle.open(made)
    (made / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UprightError, match=r"holds 'more', which is not a file"):
        Bundle.open(made)


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    write_archive(made, tmp_path / "made.upright.zip")
    return tmp_path / "made.upright.zip"


def linked(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("entry", "compression", "message"),
    [
        ("bomb.bin", zipfile.ZIP_DEFLATED, "holds 'bomb.bin', which is compressed or encrypted; `upright export"),
        ("../x", 0, "holds '../x', which has a path that leads outside of the archive"),
        ("/etc/x", 0, "holds '/etc/x', which has a path that leads outside"),
        ("a//x", 0, "holds 'a//x', which has a path that leads outside"),
        ("a\\x", 0, r"holds 'a\\x', which has a path that leads outside"),
        ("./x", 0, "holds './x', which has a path that leads outside"),
        ("x\0y", 0, "holds 'x', which has a path that leads outside"),
        (linked("link"), 0, "holds 'link', which is not a file"),
        ("manifest.json", 0, "holds 'manifest.json', which is in it several times"),
        ("more.txt", 0, "is damaged or was changed: more.txt"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive(
    archive: Path, entry: str | zipfile.ZipInfo, compression: int, message: str, upright: Upright
) -> None:
    name = "x!y" if entry == "x\0y" else entry
    with zipfile.ZipFile(archive, "a", compression) as opened:
        opened.writestr(name, bytes(100_000))
    if name == "x!y":
        archive.write_bytes(archive.read_bytes().replace(b"x!y", b"x\0y"))
    for command in (["verify", archive], ["infer", archive, archive]):
        answer = upright(*command)
        assert answer.code == 2 and message in answer.err and len(answer.err.splitlines()) == 1


def test_an_archive_of_overlapping_files(archive: Path) -> None:
    """The bomb of David Fifield (2019): many entries of the directory share the same bytes."""
    with zipfile.ZipFile(archive, "a") as opened:
        for number in range(2000):
            info = zipfile.ZipInfo(f"{number}.onnx")
            first = opened.infolist()[0]
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = max(each.file_size for each in opened.infolist())
            opened.filelist.append(info)
        opened._didModify = True
    with pytest.raises(UprightError, match="holds files that overlap"):
        Bundle.open(archive)


def test_every_changed_byte_of_an_archive_is_refused_or_has_no_effect(archive: Path) -> None:
    """Only the date and the attributes of a file, which nobody reads, may differ."""
    choose, content = random.Random(0), archive.read_bytes()
    before = Bundle.open(archive)
    expected = {name: (before.files / name).read_bytes() for name in file_names(before.files)}
    outcomes = set()
    for _ in range(200):
        changed = bytearray(content)
        # Half of the changes are in the directory at the end.
        start = choose.choice((0, len(content) - 1500))
        changed[choose.randrange(start, len(content))] ^= 1 << choose.randrange(8)
        archive.write_bytes(changed)
        try:
            bundle = Bundle.open(archive)
        except UprightError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
        else:
            assert {name: (bundle.files / name).read_bytes() for name in file_names(bundle.files)} == expected
            outcomes.add("equal")
    assert "refused" in outcomes


def test_a_file_name_that_is_not_text(made: Path) -> None:
    with open(os.fsencode(made) + b"/\xff\n", "wb"):
        pass
    with pytest.raises(UprightError, match="is damaged or was changed") as caught:
        Bundle.open(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"].update(classes=["a", "b"]), "the output probabilities of fp32 in"),
        (lambda m: m["spec"].update(classes=[1, 2, 3]), "a key of manifest.json is missing, or its value has the"),
        (lambda m: m["spec"].update(channels=3), "mean and std need one number per channel"),
        (lambda m: m["spec"].update(height="28"), "not supported between instances"),
        (lambda m: m["precisions"]["fp32"].update(tolerance=float("nan")), "the tolerance of fp32 is nan"),
        (lambda m: m["precisions"].update({"../x": {"tolerance": 1}}), "KeyError: '../x'"),
        (lambda m: m.pop("other_outputs"), "a key of manifest.json is missing"),
        (lambda m: m["provenance"].pop("model"), "a key of manifest.json is missing"),
    ],
)
def test_an_invalid_manifest(made: Path, change: Callable[[Any], Any], message: str, upright: Upright) -> None:
    manifest = json.loads((made / MANIFEST).read_text())
    change(manifest)
    (made / MANIFEST).write_text(json.dumps(manifest))
    answer = upright("infer", with_new_sums(made), made / "samples")
    assert answer.code == 2 and "is not a bundle that `upright export` wrote" in answer.err and message in answer.err
    assert len(answer.err.splitlines()) == 1


def test_deep_json(made: Path, upright: Upright) -> None:
    for name in (MANIFEST, EXPECTED):
        content = (made / name).read_text()
        (made / name).write_text("[" * 200_000)
        answer = upright("verify", with_new_sums(made))
        assert answer.code == 2 and "RecursionError" in answer.err and len(answer.err.splitlines()) == 1
        (made / name).write_text(content)


# Models.


def with_external_tensor(location: str, minimal: bool = True) -> bytes:
    """Return an ONNX file with a tensor in another file. Without ``minimal``, a length has a longer encoding."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    node = helper.make_node("Identity", ["w"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    model = helper.make_model(helper.make_graph([node], "g", [], [output], [tensor]), ir_version=9)
    content: bytes = model.SerializeToString()
    if minimal:
        return content
    entry = tensor.external_data[0].SerializeToString()
    longer = entry.replace(b"\x08location", b"\x88\x00location")
    content = content.replace(entry, longer)
    # Increase the lengths of the enclosing messages; each length is one byte here.
    for start in (b"\x6a", b"\x2a", b"\x3a"):
        at = content.rindex(start, 0, content.index(b"\x88\x00location"))
        content = content[: at + 1] + bytes([content[at + 1] + 1]) + content[at + 2 :]
    assert onnx.load_from_string(content) == model
    return content


@pytest.mark.parametrize("where", ["../secret", "{folder}/secret", "inside.bin", "/dev/zero", "*/_ORT_MEM_ADDR_/*", ""])
@pytest.mark.parametrize("minimal", [True, False])
def test_weights_in_other_files(made: Path, tmp_path: Path, where: str, minimal: bool) -> None:
    """Onnxruntime 1.22 would read any file, and crash on an address."""
    (tmp_path / "secret").write_bytes(bytes(8))
    (made / "inside.bin").write_bytes(bytes(8))
    (made / "model.onnx").write_bytes(with_external_tensor(where if minimal else where[:6], minimal))
    with pytest.raises(UprightError, match=r"model\.onnx refers to other files, and a bundle's model is one file"):
        Predictor(with_new_sums(made))


def small_model(operator: str, domain: str = "", **attributes: Any) -> bytes:
    """Return a model with one operator from ``images`` to ``probabilities``."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", "h", "w", 1])
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["b", 3])
    node = helper.make_node(operator, ["images"], ["probabilities"], domain=domain, **attributes)
    domains = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph([node], "g", [images], [probabilities])
    content: bytes = helper.make_model(graph, ir_version=9, opset_imports=domains).SerializeToString()
    return content


def with_huge_tensor() -> bytes:
    """Return a model with a tensor that declares 4 EB and has one byte."""
    model = onnx.load_from_string(small_model("Cast", to=TensorProto.FLOAT))
    model.graph.initializer.append(
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**30, 2**30], raw_data=b"x")
    )
    model.graph.node.append(helper.make_node("Identity", ["w"], ["unused"]))
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a bundle that `upright export` wrote"),
        (b"x" * 1000, "cannot load"),
        (small_model("Evil", "com.evil"), "cannot load"),
        (small_model("PyOp", "ai.onnx.contrib"), "cannot load"),
        (small_model("Cast", to=TensorProto.DOUBLE), "cannot load"),
        (with_huge_tensor(), "cannot load"),
    ],
)
def test_invalid_models(made: Path, content: bytes, message: str, upright: Upright) -> None:
    (made / "model.onnx").write_bytes(content)
    before = peak()
    answer = upright("infer", with_new_sums(made), made / "samples")
    assert answer.code == 2 and message in answer.err and len(answer.err.splitlines()) == 1
    assert peak() - before < 300


def test_a_model_with_other_classes_than_its_manifest(made: Path, upright: Upright) -> None:
    # This model is valid, but has ten classes, and the manifest has three.
    shutil.copy(DIGITS / "model.onnx", made)
    answer = upright("infer", with_new_sums(made), made / "samples")
    assert answer.code == 2 and "made/model.onnx' do not match the manifest." in answer.err


# Checkpoints.


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_does_not_run(tmp_path: Path, upright: Upright) -> None:
    import torch

    harm, path = tmp_path / "harm", tmp_path / "x.ckpt"
    for write in (
        lambda: torch.save({"upright": {"format": 1}, "state_dict": Harm(harm)}, path),
        lambda: torch.save({"state_dict": Harm(harm)}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Harm(harm))),
    ):
        write()
        for command in (["export", path], ["describe", path], ["test", "--ckpt_path", path]):
            answer = upright(*command)
            assert answer.code == 2 and len(answer.err.splitlines()) == 1, answer.err
        assert not harm.exists()
    pickle.loads(path.read_bytes())
    assert harm.exists()


def test_a_checkpoint_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x/data.pkl", "w") as file:
            for _ in range(300):
                file.write(bytes(1_000_000))
        archive.writestr("x/version", "3\n")
    assert path.stat().st_size < 1_000_000
    before = peak()
    with pytest.raises(UprightError, match=r"damaged or truncated \(its content is larger than the file\)"):
        read_checkpoint(path)
    assert peak() - before < 100


def test_names_in_a_checkpoint_are_not_paths(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "run/x.ckpt"
    path.parent.mkdir()
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../../escaped", "/escaped", "x/../../escaped"):
            archive.writestr(name, "x")
    with pytest.raises(UprightError, match=r"x\.ckpt'"):
        read_checkpoint(path)
    assert {file.name for file in tmp_path.rglob("*")} == {"run", "x.ckpt"}
