"""Transforms of single images draw from seeds of their own, in any process; those of packages: `tests/ecosystem`."""

import pickle
import random
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.digits import Digits
from upright.data.image_transforms import ImageTransforms
from upright.errors import UserError
from upright.recipes import build
from upright.training.poses import PoseLosses


class Noise:
    """A transform that draws from the generators of Python, NumPy and torch, and works in place."""

    def __init__(self, strength: int = 20) -> None:
        self.strength = strength

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        draws = (
            random.randrange(self.strength),
            np.random.randint(self.strength),
            torch.randint(self.strength, ()).item(),
        )
        for shift, value in enumerate(draws):
            image[:, shift] = int(value)
        return image


class Shift:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.roll(random.randrange(8), 2)


class OneOf:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = random.choice(self.transforms)(image)
        return result


class ToFloat:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image / 255


class Halve:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, ::2, ::2]


class ToArray:
    def __call__(self, image: torch.Tensor) -> Any:
        return image.numpy()


class Refuse:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        raise ValueError("only images of\n224 x 224")


def path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def digits(**options: Any) -> Digits:
    return Digits(**{"image_transforms": [partial(Noise, strength=200)], "num_workers": 0} | options)


def delivered(data: Digits, batches: int = 3, epoch: int = 0) -> dict[int, torch.Tensor]:
    """Return the images of the first training batches, by their position."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    chosen = list(islice(loader, batches))
    return {
        int(position): image for batch in chosen for position, image in zip(batch.position, batch.images, strict=True)
    }


def test_a_result_depends_only_on_the_image_and_its_seed() -> None:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    transforms = ImageTransforms([Noise, {"class_path": path(Noise), "init_args": {"strength": 50}}])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = transforms(images, [5, 6, 5])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1]) and not images.any()
    assert torch.equal(transforms(images[:1], [6])[0], first[1])
    assert torch.equal(ImageTransforms()(images, []), images)


def test_batches_do_not_depend_on_workers_batch_size_or_a_restart() -> None:
    expected = delivered(digits())
    others = {
        "workers": digits(num_workers=1),
        "batch size": digits(batch_size=192),
        "pickle": pickle.loads(pickle.dumps(digits())),
    }
    for name, data in others.items():
        images = delivered(data, 1 if name == "batch size" else 3)
        assert images.keys() == expected.keys(), name
        assert all(torch.equal(images[position], image) for position, image in expected.items()), name
    resumed = digits()
    resumed.load_state_dict({"epoch": 0, "position": 2})
    images = delivered(resumed, 1)
    assert all(torch.equal(image, expected[position]) for position, image in images.items()) and len(images) == 64
    later = delivered(digits(), epoch=1)
    both = later.keys() & expected.keys()
    assert both and not any(torch.equal(later[position], expected[position]) for position in both)


def test_only_training_images_are_transformed() -> None:
    data, plain = digits(), digits(image_transforms=[])
    changed = delivered(data, 1)
    assert not any(
        torch.equal(image, data.samples("train")[position : position + 1].images[0])
        for position, image in changed.items()
    )
    for split in ("val", "test"):
        assert torch.equal(next(iter(data.loader(split))).images, next(iter(plain.loader(split))).images)


def test_a_transform_contains_others_and_is_rebuilt_from_its_recipe() -> None:
    inner = [{"class_path": path(Noise), "init_args": {"strength": 9}}, {"class_path": path(Shift)}]
    data = digits(image_transforms=[{"class_path": path(OneOf), "init_args": {"transforms": inner}}])
    for each in (data, build(data.recipe)()):
        (one,) = each.image_transforms.parts
        assert isinstance(one, OneOf) and [type(part) for part in one.transforms] == [Noise, Shift]
        assert one.transforms[0].strength == 9


FIT = ("fit", "--config", ROOT / "configs/lenet.yaml", "--wandb", "off", "--trainer.max_epochs")
"""The words of a run, up to its number of epochs."""


@pytest.fixture
def yaml_file(upright: Upright) -> str:
    part = {"class_path": path(OneOf), "init_args": {"transforms": [{"class_path": path(Noise)}]}}
    arguments = {"num_workers": 0, "train_fraction": 0.2, "image_transforms": [part]}
    Path("data.yaml").write_text(yaml.safe_dump({"class_path": "upright.data.digits.Digits", "init_args": arguments}))
    return "data.yaml"


def test_a_run_records_them(upright: Upright, yaml_file: str) -> None:
    assert upright("preview", yaml_file).code == 0
    assert upright(*FIT, 1, "--name", "run", "--data", yaml_file, "--trainer.limit_val_batches", 1).code == 0
    expected = yaml.safe_load(Path(yaml_file).read_text())["init_args"]["image_transforms"]
    checkpoint = torch.load("checkpoints/run/last.ckpt", weights_only=True)
    assert checkpoint["upright"]["data"]["init_args"]["image_transforms"] == expected
    recorded = yaml.safe_load(Path("checkpoints/run/config.yaml").read_text())
    assert recorded["data"]["init_args"]["image_transforms"] == expected


@pytest.mark.slow
def test_a_run_with_them_resumes_exactly(upright: Upright, yaml_file: str) -> None:
    constant = ("--model.scheduler", "upright.training.schedules.Constant", "--model.scheduler.warmup", 0)
    fit = (*FIT[:-1], "--data", yaml_file, *constant, FIT[-1])
    assert upright(*fit, 2, "--name", "complete").code == upright(*fit, 1, "--name", "run").code == 0
    assert upright("fit", "--ckpt_path", "checkpoints/run/last.ckpt", *FIT[3:], 2).code == 0
    paths = [f"checkpoints/{name}/last.ckpt" for name in ("complete", "run")]
    complete, run = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(complete[name], run[name]) for name in complete)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([ToFloat], r"\(ToFloat\) must return a uint8 tensor of shape \(1, 28, 28\), .* got torch.float32 \(1, 28, "),
        ([Noise, Halve], r"\(Noise, Halve\) must return .* got torch.uint8 \(1, 14, 14\): Upright resizes, "),
        ([ToArray], r"\(ToArray\) must return .* got ndarray: "),
        ([Refuse], r"Refuse in data.init_args.image_transforms fails .*Error: only images of 224 x 224\. Modules"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_does_not_return_the_image_is_refused(parts: list[type], text: str, workers: int) -> None:
    with pytest.raises(UserError, match=text) as error:
        delivered(digits(image_transforms=parts, num_workers=workers))
    assert "\n" not in str(error.value)


def test_a_transform_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"image_transforms: .*Noise cannot be built: TypeError: .* argument 'sterngth'"
    ):
        digits(image_transforms=[{"class_path": path(Noise), "init_args": {"sterngth": 1}}])
    with pytest.raises(UserError, match=r"has no class 'Noize'\. Did you mean 'Noise'"):
        digits(image_transforms=[{"class_path": f"{__name__}.Noize"}])
    with pytest.raises(UserError, match=r"image_transforms: .*\.Noise is no transform: give class_path and init_args"):
        digits(image_transforms=[path(Noise)])
    with pytest.raises(UserError, match=r"'builtins\.object'.* is no transform: .* a method __call__\.$"):
        digits(image_transforms=[object])
    with pytest.raises(UserError, match=r"must be a list with one entry per transform, got {'class_path': '.*\.Noise'"):
        digits(image_transforms=partial(Noise, strength=2))


def test_the_losses_of_poses_refuse_a_transform_that_moves_pixels() -> None:
    prior = PoseLosses(TransformerNetwork((1, 28, 28), 10, network=LeNet), 0.0, 1.0)
    prior.check_data(digits())
    with pytest.raises(UserError, match="The prior needs the transform of each image, but Shift does not report it"):
        prior.check_data(digits(image_transforms=[Noise, Shift]))
