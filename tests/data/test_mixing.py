from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from upright.data.augmentation import Augmentation, RandomAffine
from upright.data.mixing import CutMix, Mixing, MixUp
from upright.errors import UprightError
from upright.recipes import build, recipe

COUNT = 300
LABELS = torch.arange(COUNT) % 10
TARGETS = one_hot(LABELS, 10).float()
PARTS = pytest.mark.parametrize("part", [MixUp, CutMix])


def plain() -> torch.Tensor:
    """Return images whose pixels all equal their number, so that a mixture shows its components."""
    return torch.arange(COUNT, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 7, 11).contiguous()


@PARTS
def test_targets_are_the_shares_of_each_image(part: type[Mixing]) -> None:
    images, targets = part(alpha=1.0)(plain(), TARGETS)
    assert images.shape == (COUNT, 2, 7, 11) and targets.shape == (COUNT, 10)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(COUNT))
    # The mean pixel of a mixture of neighbours i - 1 and i is i minus the share of i - 1.
    numbers = torch.arange(1, COUNT)
    own_shares = 1 - (numbers - images[1:].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(targets[numbers, LABELS[1:]], own_shares, atol=1e-4, rtol=0)
    torch.testing.assert_close(targets[numbers, LABELS[:-1]], 1 - own_shares, atol=1e-4, rtol=0)


@PARTS
def test_the_mean_share_is_a_half_and_alpha_its_spread(part: type[Mixing]) -> None:
    torch.manual_seed(0)

    def shares(alpha: float) -> torch.Tensor:
        return part(alpha=alpha)(plain(), TARGETS)[1][torch.arange(COUNT), LABELS]

    # Boxes are clipped at the border, so CutMix replaces less.
    assert 0.45 < shares(1.0).mean() < (0.55 if part is MixUp else 0.75)
    assert shares(0.1).std() > shares(1.0).std() > shares(20.0).std()


def test_cutmix_pastes_one_box() -> None:
    images, _ = CutMix()(plain(), TARGETS)
    other = (images != plain())[:, 0]
    rows, columns = other.any(dim=2), other.any(dim=1)
    assert torch.equal(other, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):
        assert (line.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
    # Each pixel comes from one of the two images.
    assert torch.equal(images, torch.where(other[:, None], plain().roll(1, 0), plain()))


@PARTS
def test_probability_is_the_share_of_mixed_images(part: type[Mixing]) -> None:
    images, targets = part(probability=0.0)(plain(), TARGETS)
    assert torch.equal(images, plain()) and torch.equal(targets, TARGETS)
    _, targets = part(probability=0.3, alpha=20.0)(plain(), TARGETS)
    assert abs((targets.amax(dim=1) < 1).float().mean() - 0.3) < 0.1


@PARTS
def test_a_part_is_rebuilt_from_its_recipe_and_draws_from_the_seed(part: type[Mixing]) -> None:
    factory, views = partial(part, alpha=0.5, probability=0.9), []
    for each in (factory, build(recipe(factory)), factory):
        torch.manual_seed(len(views) // 2)
        views.append(each()(plain(), TARGETS))
    for first, again, other in zip(*views, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


@PARTS
def test_a_mixture_is_a_part_of_an_augmentation(part: type[Mixing]) -> None:
    augmentation = Augmentation([RandomAffine(rotate=20), part(), RandomAffine(flip=1)])
    assert augmentation.mixes == part.__name__ and Augmentation([RandomAffine()]).mixes is None
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), dtype=torch.uint8)
    before = images.clone()
    view = augmentation(images, TARGETS)
    assert view.images.shape == images.shape and torch.equal(images, before)
    assert view.targets.shape == TARGETS.shape and not torch.equal(view.targets, TARGETS)
    assert augmentation(images).targets is None
    assert torch.equal(Augmentation([RandomAffine()])(images, LABELS).targets, LABELS)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MixUp(alpha=0), "alpha must be above 0, got 0"),
        (lambda: CutMix(probability=1.5), "probability must be from 0 to 1, got 1.5"),
        (lambda: MixUp()(plain(), LABELS), r"MixUp needs targets as probabilities \(B, K\), got labels \(300,\): give"),
    ],
)
def test_refuses(call: Callable[[], object], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        call()
