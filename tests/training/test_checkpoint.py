import pickle
import random
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from upright.architectures.lenet import LeNet
from upright.checkpoint import find_checkpoint, read_checkpoint
from upright.data.digits import Digits
from upright.errors import UprightError
from upright.runs.checkpoint_io import AtomicCheckpointIO
from upright.training.classifier import ImageClassifier
from upright.training.restoring import restore


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("code of a checkpoint ran",))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a complete checkpoint"),
        (b"hello", "not an Upright checkpoint|not a complete checkpoint"),
        (pickle.dumps(Exploit()), "not an Upright checkpoint.*would run code"),
    ],
    ids=["empty", "text", "pickle"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(UprightError, match=text):
        read_checkpoint(path)


def test_a_zip_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "upright": Exploit()}, tmp_path / "x.ckpt")
    with pytest.raises(UprightError, match=r"would run code"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_random_bytes_are_refused_in_one_line(tmp_path: Path, run_folder: Path) -> None:
    choose = random.Random(0)
    whole = (run_folder / "best.ckpt").read_bytes()
    for number in range(200):
        content = bytearray(whole) if number % 2 else bytearray(choose.randbytes(choose.randrange(1, 60)))
        for _ in range(20):
            content[choose.randrange(min(len(content), 3000))] = choose.randrange(256)
        (tmp_path / "x.ckpt").write_bytes(content)
        try:
            read_checkpoint(tmp_path / "x.ckpt")
        except UprightError as error:
            assert "x.ckpt" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(run_folder: Path, fraction: float) -> None:
    path = run_folder / "best.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UprightError, match=r"damaged"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    with pytest.raises(UprightError, match=r"not a checkpoint that `upright fit` wrote"):
        read_checkpoint(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UprightError, match=r"not a checkpoint that `upright fit` wrote"):
        read_checkpoint(tmp_path / "list.ckpt")


def edit(path: Path, **changes: object) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["upright"].update(changes)
    torch.save(checkpoint, path)


def test_a_newer_format_is_refused(run_folder: Path) -> None:
    edit(run_folder / "best.ckpt", format=99)
    with pytest.raises(UprightError, match=r"format 99, written by Upright .* reads up to 1"):
        restore(run_folder)


def test_a_missing_class_is_named(run_folder: Path) -> None:
    edit(run_folder / "best.ckpt", data={"class_path": "upright.data.digits.Digts", "init_args": {}})
    with pytest.raises(UprightError, match=r"no class 'Digts'. Did you mean 'Digits'"):
        restore(run_folder)
    edit(run_folder / "best.ckpt", data={"class_path": "gone.Digits", "init_args": {}})
    with pytest.raises(UprightError, match=r"cannot import module 'gone'"):
        restore(run_folder)


def test_a_run_without_data_needs_a_datamodule(run_folder: Path) -> None:
    edit(run_folder / "best.ckpt", data=None)
    with pytest.raises(UprightError, match=r"It needs data, but the checkpoint was trained without a datamodule; give"):
        restore(run_folder).image_data("It needs data")
    assert restore(run_folder, data=Digits(angles=(0,))).data.angles == (0,)


def test_changed_data_are_refused(run_folder: Path) -> None:
    ours = read_checkpoint(run_folder)["upright"]
    ours["data"]["init_args"]["split_seed"] = 5
    edit(run_folder / "best.ckpt", data=ours["data"])
    with pytest.raises(UprightError, match=r"have changed since it was trained: other images, or other splits"):
        restore(run_folder)


def test_other_data_with_training_images_are_refused(run_folder: Path) -> None:
    assert restore(run_folder, data=Digits(angles=(10,))).data.angles == (10,)
    with pytest.raises(
        UprightError, match=r"of 270 images in split 'val' of these data are images that .* was trained"
    ):
        restore(run_folder, data=Digits(split_seed=5))


def test_a_checkpoint_of_an_older_version_has_no_mask_and_is_bilinear(run_folder: Path) -> None:
    checkpoint = read_checkpoint(run_folder)
    spec, data = checkpoint["upright"]["spec"], checkpoint["upright"]["data"]["init_args"]
    assert spec.pop("mask") == data.pop("mask") == "none" and spec.pop("interpolation") == "bilinear"
    restored = restore(run_folder, content=checkpoint)
    assert restored.classifier.spec.mask == restored.data.spec.mask == "none"


def test_the_mask_of_the_checkpoint_counts_and_not_that_of_other_data(run_folder: Path) -> None:
    """The same rule as for mean, deviation and resizing: the model was trained with its own."""
    masked = restore(run_folder, Digits(mask="disc"), evaluated_on=())
    assert masked.data.spec.mask == "disc" and masked.classifier.model.spec.mask == "none"


def test_data_of_other_classes_are_refused(run_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    from upright.data.folder import Folder

    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "x" / name / "0.png")
    with pytest.raises(UprightError, match=r"1 channel.* the data have 1 channel.*\['a', 'b'\]"):
        restore(run_folder, data=Folder(root=str(tmp_path / "x"), channels=1))


def test_weights_of_another_network_are_refused(run_folder: Path) -> None:
    checkpoint = torch.load(run_folder / "best.ckpt", weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, run_folder / "best.ckpt")
    with pytest.raises(UprightError, match=r"weights of another network: .*Missing key"):
        restore(run_folder)


def test_find_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run_folder) == run_folder / "best.ckpt"
    with pytest.raises(UprightError, match=r"bst.ckpt' does not exist. Did you mean '.*best.ckpt'"):
        find_checkpoint(run_folder / "bst.ckpt")
    with pytest.raises(UprightError, match=r"holds no best.ckpt"):
        find_checkpoint(tmp_path)


def test_a_run_from_python_is_restored_exactly(tmp_path: Path) -> None:
    data = Digits(size=16, batch_size=128)
    network = partial(LeNet, widths=(4, 8, 32, 16), activation="relu")
    classifier = ImageClassifier(data.spec, network, partial(torch.optim.SGD, lr=0.1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    restored = restore(tmp_path / "x.ckpt")
    images = data.samples("test")[:].images
    with torch.no_grad():
        assert torch.equal(restored.classifier(images), classifier.eval()(images))
    assert not restored.classifier.training
    assert restored.data.manifest.digest == data.manifest.digest
    assert restored.contents["metrics"]["val/accuracy"] > 0


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(2)}, path)
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(2), "b": lambda: None}, path)
    assert list(torch.load(path, weights_only=True)) == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
