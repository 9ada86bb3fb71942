import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lightning import LightningDataModule
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.architectures.googlenet import GoogLeNet
from upright.architectures.inception_resnet import InceptionResNetV2
from upright.architectures.inception_v3 import InceptionV3
from upright.architectures.inception_v4 import InceptionV4
from upright.architectures.lenet import LeNet
from upright.architectures.localisers import Network
from upright.architectures.nin import NiN
from upright.architectures.resnet import ResNet, SmallResNet
from upright.architectures.spatial_transformer import SpatialTransformer, observing
from upright.architectures.transformer_network import SeriesTransformer, TransformerNetwork
from upright.errors import GateError, UprightError, UserError
from upright.exporting import export as export_module
from upright.exporting.graph import Form, Graph, write_graph
from upright.exporting.parity import Reference
from upright.images import ImageSpec
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import Predictor, open_session, run_batch
from upright.training.classifier import ImageClassifier
from upright.training.model import Model
from upright.training.restoring import restore

pytestmark = pytest.mark.usefixtures("traced_once")


def wrong_mean(model: Model, path: Path, form: Form | None = None) -> None:
    """Write a graph with a wrong mean, as a deployment with its own preprocessing might do."""
    mean = model.mean.clone()
    model.mean.add_(8)
    write_graph(model, path, form)
    model.mean.copy_(mean)


def test_the_bundle_is_complete(bundle: Path, trained: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    samples = {f"samples/{number:02d}.png" for number in range(16)} | {"samples/expected.json"}
    assert files == {"model.onnx", "manifest.json", "parity.json", "README.md", "bom.cdx.json", "SHA256SUMS"} | samples
    restored = restore(trained / "checkpoints/small")
    manifest = Bundle.open(bundle).manifest
    assert manifest["format"] == 2 and Bundle.open(bundle).spec == restored.data.spec
    provenance = manifest["provenance"]
    assert provenance["run"] == restored.contents["run"]
    # JSON converts the tuples of a recipe to lists.
    recipes = json.loads(json.dumps({part: restored.contents[part] for part in ("model", "data")}))
    assert provenance["model"] == recipes["model"] and provenance["data"] == recipes["data"]
    assert provenance["split"]["digest"] == restored.data.manifest.digest
    assert provenance["metrics"] == restored.contents["metrics"]
    assert set(provenance["versions"]) == {"upright", "torch", "onnx", "onnxscript", "onnxruntime"}


def test_theta_and_warped_images_as_outputs(run_folder: Path, upright: Upright, monkeypatch) -> None:
    answer = upright("export", run_folder, "--name", "more", "--outputs", "theta", "warped")
    assert answer.code == 0, answer.err
    bundle = Bundle.open("export/more")
    assert bundle.manifest["other_outputs"] == ["theta", "warped"]
    assert "`probabilities`: float32 (batch, 10), `theta`, `warped` |" in (bundle.folder / "README.md").read_text()
    assert upright("verify", "export/more").code == 0
    model, session = (
        restore(run_folder).classifier.model.eval(),
        onnxruntime.InferenceSession(bundle.folder / "model.onnx", providers=["CPUExecutionProvider"]),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    probabilities, theta, warped = session.run(["probabilities", "theta", "warped"], {"images": pixels})
    with torch.no_grad(), observing() as observations:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        expected = model(images).softmax(dim=1)
    assert np.abs(probabilities - expected.numpy()).max() < 1e-5
    assert np.abs(theta - observations[0].theta.numpy()).max() < 1e-5 and np.abs(theta).max() > 0.01
    expected_warped = (observations[0].output * model.std + model.mean).permute(0, 2, 3, 1).numpy()
    assert warped.shape == (3, 28, 28, 1) and np.abs(warped - expected_warped).max() < 0.05
    assert np.abs(warped - pixels).max() > 20
    differences = json.loads((bundle.folder / "parity.json").read_text())["precisions"]["fp32"]["other_outputs"]
    assert set(differences) == {"theta", "warped"}
    assert 0 < differences["theta"] < 1e-3 and 0 < differences["warped"] < 0.5


def test_the_gate_compares_the_other_outputs_too(run_folder: Path, upright: Upright, monkeypatch) -> None:
    def wrong_theta(model: Model, path: Path, form: Form) -> None:
        write_graph(model, path, form)
        graph = onnx.load(path)
        (node,) = (node for node in graph.graph.node if "theta" in node.output)
        names = ["before" if name == "theta" else name for name in node.output]
        node.output[:] = names
        for other in graph.graph.node:
            other.input[:] = ["before" if name == "theta" else name for name in other.input]
        graph.graph.node.append(onnx.helper.make_node("Neg", ["before"], ["theta"]))
        onnx.save(graph, path)

    monkeypatch.setattr(export_module, "write_graph", wrong_theta)
    answer = upright("export", run_folder, "--name", "wrong", "--outputs", "theta", "theta")
    assert answer.code == 1 and "disagree on 0 of" in answer.err and "other outputs: {'theta': " in answer.err
    assert not Path("export/wrong").exists()


def test_warped_images_show_the_padding_of_the_transformer(tmp_path: Path) -> None:
    spec = ImageSpec(1, 16, 16, ("a", "b"), (0.4,), (0.5,))
    shift = partial(SpatialTransformer, transform="translation", start=(0.5, 0.0))
    model = Model(spec, TransformerNetwork((1, 16, 16), 2, network=LeNet, transformer=shift)).eval()
    write_graph(model, tmp_path / "model.onnx", Form(outputs=("warped",)))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (warped,) = session.run(["warped"], {"images": np.full((1, 16, 16, 1), 200, np.uint8)})
    # The padding of zeros comes after the normalisation, so it is the mean and not black.
    assert np.abs(warped[0, :, :12] - 200).max() < 0.01 and np.abs(warped[0, :, 12:] - 0.4 * 255).max() < 0.01


def test_outputs_need_a_transformer(upright: Upright) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--wandb", "off")
    assert upright("fit", "--config", ROOT / "configs/lenet.yaml", *options).code == 0
    answer = upright("export", "checkpoints/lenet", "--outputs", "theta")
    assert answer.code == 2 and "The network has no spatial transformer, so it has no output theta." in answer.err
    assert not Path("export/lenet").exists()


@pytest.mark.parametrize(
    "network",
    [
        partial(SmallResNet, depth=8, width=4),
        partial(ResNet, widths=(4, 8), stem="small"),
        partial(NiN, widths=(8, 8, 8), stem=(5, 1, 2)),
        pytest.param(partial(GoogLeNet, width=0.1, batch_norm=True), id="GoogLeNet", marks=pytest.mark.slow),
        pytest.param(partial(InceptionV3, width=0.1), id="InceptionV3", marks=pytest.mark.slow),
        pytest.param(partial(InceptionV4, width=0.1, blocks=(1, 1, 1)), id="InceptionV4", marks=pytest.mark.slow),
        pytest.param(partial(InceptionResNetV2, width=0.1, blocks=(1, 1, 2)), id="Residual", marks=pytest.mark.slow),
    ],
    ids=lambda network: network.func.__name__,
)
def test_a_network_with_a_global_mean_accepts_any_size(network: Network, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ImageSpec(3, 80, 80, ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, resize="none")
    classifier = ImageClassifier(spec, network, partial(torch.optim.SGD, lr=0.1), init="he_normal").eval()
    write_graph(classifier.model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    generator, rows = np.random.default_rng(0), []
    for batch, height, width in ((1, 80, 80), (3, 75, 96), (2, 131, 77)):
        pixels = generator.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        (actual,) = session.run(["probabilities"], {"images": pixels})
        with torch.no_grad():
            expected = classifier(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        assert np.abs(actual - expected).max() < 1e-4, (height, width)
        rows.append(actual[0])
    assert np.abs(rows[0] - rows[1]).max() > 0


def test_several_transformers_are_numbered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))
    affine = partial(SpatialTransformer, transform="affine")
    network = TransformerNetwork(spec.input_shape, 2, network=LeNet, transformer=affine, places=["input", "features.3"])
    write_graph(Model(spec, network).eval(), tmp_path / "model.onnx", Form(outputs=("theta", "warped")))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"images": pixels}), strict=True))
    assert {name: value.shape for name, value in outputs.items()} == {
        "probabilities": (2, 2),
        "theta_1": (2, 6),
        "theta_2": (2, 6),
        "warped_1": (2, 28, 28, 1),
        "warped_2": (2, 14, 14, 1),
    }
    # Both transformers are the identity. The second one is inside the network, at the size of its feature maps.
    assert np.abs(outputs["warped_1"] - pixels).max() < 0.01
    halves = pixels.reshape(2, 14, 2, 14, 2, 1).mean(axis=(2, 4))
    assert np.abs(outputs["warped_2"] - halves).max() < 0.01


def test_votes_have_the_number_of_their_transformer(tmp_path: Path) -> None:
    affine, rotation = (partial(SpatialTransformer, transform=name) for name in ("affine", "rotation"))
    series = partial(SeriesTransformer, transformers=[affine, rotation])
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))
    network = TransformerNetwork(spec.input_shape, 2, network=LeNet, transformer=series)
    write_graph(Model(spec, network).eval(), tmp_path / "model.onnx", Form(outputs=("theta", "votes", "confidence")))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["probabilities", "theta_1", "theta_2", "votes_2", "confidence_2"]
    votes, confidence = session.run(names[-2:], {"images": np.full((3, 28, 28, 1), 100, np.uint8)})
    assert votes.shape == (3, 32) and confidence.shape == (3, 1)
    # A blank image has equal votes.
    assert np.abs(votes - 1 / 32).max() < 1e-5 and confidence.max() < 0.02


def test_votes_need_a_localiser_that_votes() -> None:
    affine = partial(SpatialTransformer, transform="affine")
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.5,), (0.5,))
    network = TransformerNetwork(spec.input_shape, 2, network=LeNet, transformer=affine)
    with pytest.raises(UserError, match="has a localiser that votes, so it has no output votes; those of upright"):
        Graph(Model(spec, network), Form(outputs=("votes",)))


def test_the_hashes_are_in_the_format_of_sha256sum(bundle: Path) -> None:
    import hashlib

    for line in (bundle / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest


def test_inputs_outputs_and_metadata_of_the_graph(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)] and model.ir_version == 8
    names = {axis.dim_param for info in model.graph.value_info for axis in info.type.tensor_type.shape.dim} - {""}
    assert {re.sub(r"\d+\*", "", name) for name in names} == {"batch", "height", "width"}
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 1])
    assert (probabilities.name, probabilities.type) == ("probabilities", "tensor(float)")
    assert probabilities.shape == ["batch", 10]
    assert json.loads(session.get_modelmeta().custom_metadata_map["upright"])["classes"] == list("0123456789")


def test_parity_covers_the_complete_validation_split(bundle: Path, trained: Path) -> None:
    parity = json.loads((bundle / "parity.json").read_text())
    data = restore(trained / "checkpoints/small").data
    assert parity["images"] == 3 * len(data.splits["val"]) and parity["sources"] == len(data.splits["val"])
    exact = parity["precisions"]["fp32"]
    assert exact["agreement"] == 1 and 0 <= exact["largest_difference"] < 1e-4 and exact["flipped"] == []
    metrics = torch.load(trained / "checkpoints/small/best.ckpt", weights_only=True)["upright"]["metrics"]
    accuracy = metrics["val/accuracy"]
    # The originals already have the network's size, so they equal the cached images.
    assert all(value == pytest.approx(accuracy) for value in (exact["accuracy"], *parity["accuracy"].values()))
    card = (bundle / "README.md").read_text()
    texts = (
        f"{accuracy:.4f}",
        f"{exact['largest_difference']:.2e}",
        f"{parity['images']} original images",
        "100.0000%",
    )
    assert all(text in card for text in texts)


def test_samples_are_validation_images_with_the_predictions_of_the_graph(bundle: Path, trained: Path) -> None:
    originals = {o.name: o for o in restore(trained / "checkpoints/small").data.originals("val")}
    for sample in json.loads((bundle / "samples/expected.json").read_text()):
        original = originals[sample["name"]]
        assert np.array_equal(np.asarray(Image.open(bundle / sample["file"])), original.pixels[:, :, 0])
        assert sample["label"] == str(original.label)
        assert sum(sample["probabilities"]["fp32"]) == pytest.approx(1, abs=1e-5)


def test_the_gate_fails_for_a_graph_with_a_wrong_mean(trained: Path, tmp_path: Path) -> None:
    restored = restore(trained / "checkpoints/small")
    wrong_mean(restored.classifier.model, tmp_path / "wrong.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "wrong.onnx", providers=["CPUExecutionProvider"])
    comparison = Reference(restored.classifier.model, restored.data, Form()).compare(session)
    assert comparison.differences.max() > 1e-3
    assert comparison.names == [original.name for original in restored.data.originals("val")]
    with pytest.raises(GateError, match=f"disagree on {(comparison.differences > 1e-4).sum()} of 810 validation"):
        export_module.check_exact(comparison)


def test_the_gate_fails_for_nan(trained: Path, tmp_path: Path) -> None:
    restored = restore(trained / "checkpoints/small")
    model = restored.classifier.model
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        write_graph(model, tmp_path / "nan.onnx")
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    session = onnxruntime.InferenceSession(tmp_path / "nan.onnx", providers=["CPUExecutionProvider"])
    comparison = Reference(model, restored.data, Form()).compare(session)
    with pytest.raises(GateError, match="disagree on 810 of 810"):
        export_module.check_exact(comparison)


def test_a_wrong_graph_writes_no_bundle(
    upright: Upright, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "write_graph", wrong_mean)
    answer = upright("export", run_folder)
    assert answer.code == 1
    assert "disagree on" in answer.err and "No bundle was written." in answer.err
    assert answer.out.count("  digit-") == int(answer.err.split("disagree on ")[1].split(" ")[0])
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("broken", ["write_graph", "Reference.compare", "write_records", "card", "seal"])
def test_the_bundle_is_written_completely_or_not_at_all(
    upright: Upright, bundle: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(f"upright.exporting.export.{broken}", fail)
    for arguments in (("--name", "new"), ("--force",)):
        answer = upright("export", run_folder, *arguments)
        assert answer.code == 2 and answer.err == "upright: error: No space left on device: 'somewhere'.\n"
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["small"]


def test_only_force_replaces_an_existing_bundle(upright: Upright, bundle: Path, run_folder: Path) -> None:
    (bundle / "README.md").write_text("mine")
    answer = upright("export", run_folder)
    assert answer.code == 2 and "export/small' exists: --force replaces it" in answer.err
    assert (bundle / "README.md").read_text() == "mine"
    archive = bundle.parent / "small.upright.zip"
    archive.write_bytes(b"mine")
    answer = upright("export", run_folder, "--name", "small", "--archive")
    assert answer.code == 2 and "exists: --force replaces it" in answer.err and archive.read_bytes() == b"mine"
    answer = upright("export", run_folder, "--force", "--archive")
    assert answer.code == 0 and "Archive: export/small.upright.zip\n" in answer.out
    for path in (bundle, archive):
        assert upright("verify", path).code == 0
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["small", "small.upright.zip"]


def test_a_bundles_name_is_a_plain_folder_name(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    for name in ("../y", "", ".hidden"):
        answer = upright("export", run_folder, "--name", name)
        assert answer.code == 2 and f"--name '{name}' must be a plain folder name" in answer.err
    assert not (tmp_path / "export").exists()


def test_data_replaces_the_data_of_the_checkpoint(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("class_path: upright.data.digits.Digits\ninit_args: {angles: [20]}\n")
    assert upright("export", run_folder, "--data", "data.yaml").code == 0
    assert json.loads((tmp_path / "export/small/parity.json").read_text())["images"] == 270
    manifest = json.loads((tmp_path / "export/small/manifest.json").read_text())
    assert manifest["provenance"]["data"]["init_args"] == {"angles": [20]}
    for content, message in (
        ("[", "cannot be read as YAML"),
        ("a: 1", "needs a class_path"),
        ("class_path: os.Nope", "no class"),
    ):
        (tmp_path / "data.yaml").write_text(content)
        answer = upright("export", run_folder, "--force", "--data", "data.yaml")
        assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (LightningDataModule(), "on a LightningDataModule, which is not an ImageDataModule"),
        (None, "without a datamodule"),
    ],
    ids=["another datamodule", "none"],
)
def test_parity_needs_originals(
    upright: Upright, run_folder: Path, monkeypatch: pytest.MonkeyPatch, data: LightningDataModule | None, source: str
) -> None:
    monkeypatch.setattr(export_module, "restore", lambda *arguments: restore(*arguments)._replace(data=data))
    answer = upright("export", run_folder)
    assert answer.code == 2 and answer.err.count("\n") == 1 and not Path("export").exists()
    assert f"Parity needs the originals of the validation split, but the checkpoint was trained {source}" in answer.err
    assert "give --data with the YAML of an ImageDataModule, such as configs/data/folder.yaml." in answer.err


def test_force_does_not_replace_another_folder(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "export/small").mkdir(parents=True)
    (tmp_path / "export/small/thesis.tex").touch()
    answer = upright("export", run_folder, "--force")
    assert answer.code == 2 and "is not a bundle (it has no SHA256SUMS), so it is not replaced" in answer.err
    assert (tmp_path / "export/small/thesis.tex").exists()


def test_safetensors_needs_its_package_and_does_not_replace_a_file(
    upright: Upright, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "find_spec", lambda _: None)
        answer = upright("export", run_folder, "--safetensors")
    assert answer.code == 2
    assert answer.err.endswith("--safetensors needs the package safetensors: pip install 'upright[timm]'.\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/small.safetensors").touch()
    answer = upright("export", run_folder, "--safetensors")
    assert answer.code == 2 and "'export/small.safetensors' exists: --force replaces it" in answer.err
    assert not Path("export/small").exists()


def test_a_target_that_cannot_be_written(upright: Upright, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "export").touch()
    answer = upright("export", run_folder)
    assert (
        answer.code == 2
        and "'export' is a file, so 'export/small' cannot be created" in answer.err
        and answer.err.count("\n") == 1
    )


def test_an_image_that_the_model_does_not_accept_is_one_line(tmp_path: Path) -> None:
    spec = ImageSpec(1, 20, 20, ("a", "b"), (0.4,), (0.5,), resize="none")
    network = NiN((1, 20, 20), 2, widths=(4, 4, 4), stem=(5, 1, 2))
    write_graph(Model(spec, network).eval(), tmp_path / "model.onnx")
    with pytest.raises(UprightError, match=r"onnxruntime failed on 1 images of \(H, W, C\) 2x2x1: "):
        run_batch(open_session(tmp_path / "model.onnx"), np.zeros((1, 2, 2, 1), np.uint8))


@pytest.mark.slow
def test_a_mask_goes_from_training_to_the_predictions_of_the_bundle(upright: Upright) -> None:
    config, data = ROOT / "configs/lenet.yaml", ROOT / "configs/data/digits.yaml"
    masked = ("--data", data, "--data.mask", "disc")
    quick = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 5, "--wandb", "off")
    assert upright("fit", "--config", config, *masked, "--name", "disc", *quick).code == 0
    # These data have no mask, but the bundle has the mask of the model.
    assert upright("export", "checkpoints/disc", "--data", data, "--precision", "int8", "fp16").code == 0
    manifest = json.loads(Path("export/disc/manifest.json").read_text())
    assert manifest["mask"] == "disc" and "mask" not in manifest["spec"]
    assert "normalisation, mask disc |" in Path("export/disc/README.md").read_text(encoding="utf-8")
    assert upright("verify", "export/disc").code == 0
    pixels = np.array(Image.open("export/disc/samples/00.png"))
    for precision in ("fp32", "fp16", "int8"):
        predict = Predictor("export/disc", precision)
        before = predict(pixels).probabilities
        changed = pixels.copy()
        changed[:4, :4] = changed[-4:, -4:] = 255
        assert predict(changed).probabilities == before
        changed[12:16, 12:16] ^= 255
        assert predict(changed).probabilities != before
    answer = upright("preview", "checkpoints/disc")
    assert answer.code == 0 and "The network sees every image through a mask: disc." in answer.out
