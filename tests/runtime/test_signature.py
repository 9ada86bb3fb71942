"""Signatures of bundles: forged bundles are refused, and the command of model-signing agrees."""

import base64
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT, Upright
from upright.errors import BundleError, UserError
from upright.options import Serve
from upright.runtime.bundle import SUMS, Bundle, checksums, file_hashes, file_names, write_archive
from upright.runtime.serving.loaded import open_predictor
from upright.runtime.signature import PASSWORD, SIGNATURE, read_signer, write_signature

DIGITS = ROOT / "export/digits"
signs = pytest.mark.skipif(find_spec("model_signing") is None, reason="needs the extra `sign`")


def write_keys(folder: Path, name: str, password: bytes | None = None) -> Path:
    """Write a pair of keys, and return the path of the private one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return private


def sign(bundle: Path, key: Path) -> None:
    (bundle / SIGNATURE).unlink(missing_ok=True)
    write_signature(bundle / SIGNATURE, bundle, file_hashes(bundle), read_signer(key))
    (bundle / SUMS).write_text(checksums(bundle))


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A signed bundle, beside the keys of its author, key.pem and key.pub, and of a forger, forger.pem."""
    bundle = tmp_path / "digits"
    shutil.copytree(DIGITS, bundle)
    write_keys(tmp_path, "forger")
    sign(bundle, write_keys(tmp_path, "key"))
    return bundle


def change(bundle: Path, choose: random.Random) -> None:
    """Change one byte of a file that is neither the signature nor the hashes."""
    path = bundle / choose.choice(sorted(set(file_names(bundle)) - {SUMS, SIGNATURE}))
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= choose.randrange(1, 256)
    path.write_bytes(content)


def add(bundle: Path, choose: random.Random) -> None:
    (bundle / f"samples/{choose.random()}.txt").write_bytes(choose.randbytes(choose.randrange(20)))


def remove(bundle: Path, choose: random.Random) -> None:
    (bundle / choose.choice(sorted(set(file_names(bundle)) - {SUMS, SIGNATURE}))).unlink()


def swap(bundle: Path, choose: random.Random) -> None:
    one, other = (bundle / f"samples/{number:02d}.png" for number in choose.sample(range(16), 2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def remove_signature(bundle: Path, choose: random.Random) -> None:
    change(bundle, choose)
    (bundle / SIGNATURE).unlink()


def sign_with_another_key(bundle: Path, choose: random.Random) -> None:
    change(bundle, choose)
    sign(bundle, bundle.parent / "forger.pem")


def claim_the_authors_key(bundle: Path, choose: random.Random) -> None:
    """Sign with another key, and give the signature the author's hint, or none."""
    content = json.loads((bundle / SIGNATURE).read_text())
    hint = choose.choice([content["verificationMaterial"], {"publicKey": {}}])
    sign_with_another_key(bundle, choose)
    forged = json.loads((bundle / SIGNATURE).read_text()) | {"verificationMaterial": hint}
    (bundle / SIGNATURE).write_text(json.dumps(forged))


def take_the_signature_of_another_bundle(bundle: Path, choose: random.Random) -> None:
    content = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    change(bundle, choose)
    sign(bundle, bundle.parent / "key.pem")
    for path in content.keys() - {bundle / SIGNATURE}:
        path.write_bytes(content[path])


def rewrite_payload(bundle: Path, choose: random.Random) -> None:
    """Change a file, and its hash in what is signed; or exempt it from the signature."""
    content = json.loads((bundle / SIGNATURE).read_text())
    envelope = content["dsseEnvelope"]
    payload = json.loads(base64.b64decode(envelope["payload"]))
    before = file_hashes(bundle)
    change(bundle, choose)
    (changed,) = (name for name, value in file_hashes(bundle).items() if value != before[name])
    predicate = payload["predicate"]
    if choose.random() < 0.5:
        predicate["serialization"]["ignore_paths"].append(changed)
    for resource in predicate["resources"]:
        if resource["name"] == changed:
            resource["digest"] = file_hashes(bundle)[changed]
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (bundle / SIGNATURE).write_text(json.dumps(content))


def break_the_signature(bundle: Path, choose: random.Random) -> None:
    change(bundle, choose)
    content = (bundle / SIGNATURE).read_bytes()
    forged = [
        b"",
        b"{}",
        b"[" * 100_000,
        content[: len(content) // 2],
        choose.randbytes(100),
        b'{"dsseEnvelope": null}',
    ]
    (bundle / SIGNATURE).write_bytes(choose.choice(forged))


def hide_a_file_in_a_name(bundle: Path, choose: random.Random) -> None:
    """Change a file, and write its old line of SHA256SUMS into the name of another file."""
    line = file_hashes(bundle)["model.onnx"] + "  model.onnx"
    with open(bundle / "model.onnx", "ab") as file:
        file.write(choose.randbytes(8))
    folder = bundle / f"samples/15.png\n{line.partition('/')[0]}"
    (bundle / "samples/15.png").rename(folder)


FORGERIES: list[Callable[[Path, random.Random], None]] = [
    change,
    add,
    remove,
    swap,
    remove_signature,
    sign_with_another_key,
    claim_the_authors_key,
    take_the_signature_of_another_bundle,
    rewrite_payload,
    break_the_signature,
    hide_a_file_in_a_name,
]


def forge(bundle: Path, choose: random.Random, forgery: Callable[[Path, random.Random], None]) -> Path:
    """Return a forged copy of a bundle whose SHA256SUMS fits: a folder, or an archive in one of four cases."""
    copy = bundle.parent / "forged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    forgery(copy, choose)
    (copy / SUMS).write_text(checksums(copy))
    if choose.random() < 0.25:
        write_archive(copy, copy.with_suffix(".upright.zip"))
        return copy.with_suffix(".upright.zip")
    return copy


def model_signing_accepts(bundle: Path, key: Path) -> bool:
    from model_signing import verifying

    try:
        verifying.Config().use_elliptic_key_verifier(public_key=key).verify(bundle, bundle / SIGNATURE)
    except Exception:  # of many kinds
        return False
    return True


@signs
@pytest.mark.parametrize("count", [3, pytest.param(91, marks=pytest.mark.slow)])
def test_forged_bundles_are_refused(signed: Path, count: int) -> None:
    """The slow test forges 1001 bundles."""
    key = signed.parent / "key.pub"
    Bundle.open(signed, key)
    assert model_signing_accepts(signed, key)
    for forgery in FORGERIES:
        for seed in range(count):
            forged = forge(signed, random.Random(seed), forgery)
            with pytest.raises(BundleError, match=r"has no (valid )?signature"):
                Bundle.open(forged, key)
            if forged.is_dir() and (forged / SIGNATURE).exists():
                assert not model_signing_accepts(forged, key)


@signs
def test_the_command_of_model_signing_agrees(signed: Path, upright: Upright) -> None:
    key = signed.parent / "key.pub"

    def agreed(bundle: Path) -> int:
        command = ["-m", "model_signing", "verify", "key", bundle, "--signature", bundle / SIGNATURE]
        process = subprocess.run([sys.executable, *command, "--public_key", key], capture_output=True, check=False)
        assert (process.returncode == 0) == (upright("verify", bundle, "--key", key).code == 0)
        return process.returncode

    assert agreed(signed) == 0
    assert agreed(forge(signed, random.Random(0), change)) != 0
    write_archive(signed, signed.parent / "digits.upright.zip")
    answer = upright("verify", signed.parent / "digits.upright.zip", "--key", key)
    assert answer.code == 0 and f"signature of {key}, hashes, format 2" in answer.out
    answer = upright("verify", DIGITS, "--key", key)
    assert answer.code == 2 and "has no signature; `upright export --sign KEY` writes one" in answer.err


@signs
def test_every_command_checks_before_it_uses_a_bundle(signed: Path, upright: Upright, tmp_path: Path) -> None:
    key, digest = tmp_path / "key.pub", Bundle.open(signed).digest
    forged = forge(signed, random.Random(0), sign_with_another_key)
    commands = {
        "infer": [signed / "samples/00.png"],
        "benchmark": [],
        "serve": [],
        "straighten": [signed / "samples", "--to", tmp_path / "copies"],
        "web": [],
    }
    for command, arguments in commands.items():
        answer = upright(command, forged, *arguments, "--key", key)
        assert answer.code == 2 and f"'{forged}' has no valid signature by '{key}'" in answer.err
        answer = upright(command, forged, *arguments, "--expect", digest)
        assert answer.code == 2 and f"'{forged}' is not the expected bundle: its SHA256SUMS has the SHA" in answer.err
    answer = upright("infer", signed, signed / "samples", "--key", key, "--expect", digest.upper())
    assert answer.code == 0 and len(answer.out.splitlines()) == 16
    options = Serve(str(signed), key=str(key))
    assert open_predictor(options).bundle.digest == digest
    sign_with_another_key(signed, random.Random(0))
    with pytest.raises(BundleError, match="has no valid signature"):  # a reload
        open_predictor(options)


@signs
def test_export_signs(run_folder: Path, tmp_path: Path, upright: Upright) -> None:
    key = write_keys(tmp_path, "key")
    answer = upright("export", run_folder, "--sign", key, "--archive")
    assert answer.code == 0, answer.err
    for bundle in ("export/small", "export/small.upright.zip"):
        assert upright("verify", bundle, "--key", "key.pub").code == 0
        assert upright("verify", bundle).code == 0
    payload = json.loads((tmp_path / "export/small" / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    assert json.loads(base64.b64decode(payload))["subject"][0]["name"] == "small"


@signs
def test_keys(tmp_path: Path, signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encrypted = write_keys(tmp_path, "encrypted", b"secret")
    for password in (None, "wrong"):
        if password:
            monkeypatch.setenv(PASSWORD, password)
        with pytest.raises(UserError, match=rf"no private key .* If it is encrypted, {PASSWORD} must be its password"):
            read_signer(encrypted)
    monkeypatch.setenv(PASSWORD, "secret")
    sign(signed, encrypted)
    Bundle.open(signed, tmp_path / "encrypted.pub")
    for content in (b"", (tmp_path / "key.pem").read_bytes()):
        (tmp_path / "bad.pub").write_bytes(content)
        with pytest.raises(UserError, match=r"is no public key in a PEM file on the curve P-256, P-384 or P-521\.$"):
            Bundle.open(signed, tmp_path / "bad.pub")
    with pytest.raises(OSError, match=r"nope\.pub"):
        Bundle.open(signed, tmp_path / "nope.pub")


def test_signatures_need_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UserError, match=r"Signatures need the package 'model_signing': pip install 'upright\[sign\]'"):
        read_signer(tmp_path / "key.pem")
