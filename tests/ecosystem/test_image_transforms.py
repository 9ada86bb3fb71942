"""albumentations and torchvision in `image_transforms`: `make test-ecosystem`."""

import random
import re
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.data.image_transforms import ImageTransforms
from upright.errors import UserError
from upright.recipes import build

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.timeout(600),
    # albumentations looks for a newer version of itself, and passes on warnings of Pydantic.
    pytest.mark.filterwarnings("ignore:Error fetching version info", "ignore::DeprecationWarning"),
]
IMAGES = torch.randint(256, (400, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def albumentations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    pytest.importorskip("albumentations")
    return import_module("albumentations")


@pytest.fixture
def v2() -> Any:
    pytest.importorskip("torchvision")
    return import_module("torchvision.transforms.v2")


class Flip:
    """A transform that draws from Python's global generator."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(1) if random.random() < 0.5 else image


def flips(transforms: ImageTransforms) -> Counter[str]:
    """Return how often each flip was drawn for an image."""
    results = transforms(IMAGES, range(400))
    assert torch.equal(results, transforms(IMAGES, range(400)))
    kinds = {"none": IMAGES, "left": IMAGES.flip(3), "up": IMAGES.flip(2), "both": IMAGES.flip(2, 3)}
    return Counter(
        next(kind for kind, images in kinds.items() if torch.equal(images[index], result))
        for index, result in enumerate(results)
    )


def test_flips_of_albumentations_are_independent(albumentations: Any) -> None:
    half = {"init_args": {"p": 0.5}}
    parts = [{"class_path": f"albumentations.{name}", **half} for name in ("HorizontalFlip", "VerticalFlip")]
    compose = [{"class_path": "albumentations.Compose", "init_args": {"transforms": parts}}]
    for transforms in (ImageTransforms(parts), ImageTransforms(compose), ImageTransforms([parts[0], Flip])):
        assert all(70 < count < 130 for count in flips(transforms).values()), flips(transforms)
        assert transforms.moving
    grey = ImageTransforms([{"class_path": "albumentations.GaussianBlur", "init_args": {"p": 1}}])
    assert grey(IMAGES[:, :1], range(400)).shape == (400, 1, 32, 32) and grey.moving is None


def test_flips_of_torchvision_are_independent(v2: Any) -> None:
    transforms = ImageTransforms([v2.RandomHorizontalFlip, v2.RandomVerticalFlip])
    assert all(70 < count < 130 for count in flips(transforms).values()) and transforms.moving == "RandomHorizontalFlip"
    colours = ImageTransforms([partial(v2.ColorJitter, brightness=0.4, hue=0.1), v2.ToPILImage, v2.PILToTensor])
    assert colours.moving is None and not torch.equal(colours(IMAGES, range(400)), IMAGES)


def test_mistakes_are_one_line(albumentations: Any) -> None:
    blur: dict[str, Any] = {"class_path": "albumentations.GaussianBlur", "init_args": {"strength": 3}}
    with pytest.raises(UserError, match=r"GaussianBlur cannot be built: UserWarning: Argument\(s\) 'strength' are not"):
        ImageTransforms([blur])
    blur["init_args"] = {"sigma_limit": "much"}
    with pytest.raises(UserError, match=r"GaussianBlur cannot be built: ValueError: .* valid number"):
        ImageTransforms([blur])
    with pytest.raises(
        UserError, match=r"\(Normalize\) must return a uint8 tensor .*, got torch.float32 \(3, 32, 32\)"
    ):
        ImageTransforms([albumentations.Normalize])(IMAGES[:1], [0])


def test_the_config_of_the_docs_trains(albumentations: Any, upright: Upright) -> None:
    page = (ROOT / "docs/how-to/augment.md").read_text(encoding="utf-8")
    (content,) = re.findall(r"^# my-transforms.yaml\n(.*?)^```", page, flags=re.M | re.S)
    Path("my-transforms.yaml").write_text(content)
    generator = np.random.default_rng(0)
    for number in range(24):
        file = Path(f"my-images/{number % 2}/{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(file)
    batches = []
    for workers in (0, 1):
        data = build(yaml.safe_load(content))(num_workers=workers)
        batches += [next(iter(data.train_dataloader())).images]
    assert torch.equal(*batches) and not torch.equal(batches[0], data.samples("train")[:].images)
    assert upright("preview", "my-transforms.yaml").code == 0
    fit = (
        *("fit", "--config", ROOT / "configs/lenet.yaml", "--data", "my-transforms.yaml", "--wandb", "off"),
        *("--model.scheduler", "upright.training.schedules.Constant", "--model.scheduler.warmup", 0),
        "--trainer.max_epochs",
    )
    assert upright(*fit, 2, "--name", "complete").code == upright(*fit, 1, "--name", "run").code == 0
    assert (
        upright("fit", "--ckpt_path", "checkpoints/run/last.ckpt", "--wandb", "off", "--trainer.max_epochs", 2).code
        == 0
    )
    paths = [f"checkpoints/{name}/last.ckpt" for name in ("complete", "run")]
    complete, run = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(complete[name], run[name]) for name in complete)
