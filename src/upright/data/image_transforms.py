"""Transforms of single images by other packages, such as albumentations and torchvision, in the loader's workers."""

import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from upright.data.augmentation import probe
from upright.errors import UserError, one_line
from upright.recipes import load_class, recipe

MakeTransform = dict | Callable[[], Any]  # type: ignore[type-arg]
"""``class_path`` and ``init_args`` of a transform, or ``functools.partial`` of its class.

Not ``dict[str, Any]``: jsonargparse would build the objects inside ``init_args``, which no checkpoint can record.
"""
SEEDS = 2**32
"""Number of seeds: NumPy's global generator takes 32 bits."""


class ImageTransforms:
    """A sequence of transforms of one uint8 image.

    A transform of albumentations gets an array ``(H, W, C)``. Any other one gets the result of the one before it, at
    first a tensor ``(C, H, W)``, as torchvision's do. The last result is a uint8 tensor of the image's own shape.

    Args:
        parts: the transforms, in order.

    Raises:
        UserError: if ``parts`` is no list, or a transform cannot be built or called.
    """

    def __init__(self, parts: Sequence[MakeTransform] = ()) -> None:
        if not isinstance(parts, list | tuple):
            raise UserError(f"image_transforms must be a list with one entry per transform, got {recipe(parts)}.")
        self.parts = [_instance(recipe(part)) for part in parts]
        for part, transform in zip(parts, self.parts, strict=True):
            if not callable(transform):
                raise UserError(
                    f"image_transforms: {recipe(part)} is no transform: give class_path and init_args of a class with "
                    "a method __call__."
                )

    def __bool__(self) -> bool:
        return bool(self.parts)

    @cached_property
    def moving(self) -> str | None:
        """The name of the first transform that `probe` sees move pixels, if there is one."""
        return next((type(part).__name__ for part in self.parts if probe(_BatchPart(part)).moves), None)

    def __call__(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        """Transform uint8 images ``(B, C, H, W)``; each result depends only on the image and its seed below `SEEDS`.

        Raises:
            UserError: if a transform fails, or changes the shape or the type of an image.
        """
        if not self:
            return images
        with isolate_rng(include_cuda=False):
            return torch.stack([self._transformed(image, seed) for image, seed in zip(images, seeds, strict=True)])

    def _transformed(self, image: Tensor, seed: int) -> Tensor:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        # Another seed, so that they do not repeat the global ones.
        generators = np.random.default_rng(seed + 1), random.Random(seed + 1)
        result: Any = image.clone()  # a transform may work in place
        for part in self.parts:
            try:
                result = _apply(part, result, generators)
            except Exception as error:  # anything that another package raises
                raise UserError(
                    f"{type(part).__name__} in data.init_args.image_transforms fails with a uint8 image of shape "
                    f"{tuple(image.shape)}: {type(error).__name__}: {one_line(error, 300).rstrip('.')}. Modules for "
                    "batches, such as kornia's, go into data.init_args.augment."
                ) from error
        if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.shape != image.shape:
            kind = type(result).__name__
            kind = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else kind
            names = ", ".join(type(part).__name__ for part in self.parts)
            raise UserError(
                f"data.init_args.image_transforms ({names}) must return a uint8 tensor of shape {tuple(image.shape)}, "
                f"the image's own, got {kind}: Upright resizes, scales and normalises images itself, so leave out the "
                "transforms that do."
            )
        return result


def _apply(part: Any, image: Any, generators: tuple[np.random.Generator, random.Random]) -> Any:
    if not _is_albumentations(type(part)):  # type: ignore[arg-type]  # mypy: a class is not Hashable
        return part(image)
    if hasattr(part, "set_random_state"):  # older versions draw from the global generators
        # Not `set_random_seed`: it gives all transforms of a Compose one seed, so that two of them flip together.
        part.set_random_state(*generators)
    array = part(image=image.movedim(0, -1).numpy())["image"]
    return torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, 0)


@cache
def _is_albumentations(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "albumentations" for base in kind.__mro__)


def _instance(part: Any) -> Any:
    """Build the object of a recipe, and the objects inside its arguments."""
    if isinstance(part, list | tuple):
        return type(part)(map(_instance, part))
    if not isinstance(part, dict):
        return part
    if "class_path" not in part:
        return {key: _instance(value) for key, value in part.items()}
    try:
        cls = load_class(part["class_path"])
        with warnings.catch_warnings():
            # albumentations warns of an unknown argument.
            warnings.simplefilter("error", UserWarning)
            return cls(**_instance(part.get("init_args", {})))
    except UserError:
        raise
    except Exception as error:  # anything that another package raises
        raise UserError(
            f"image_transforms: {part['class_path']} cannot be built: {type(error).__name__}: {one_line(error, 300)}"
        ) from error


class _BatchPart(nn.Module):
    """A transform as a part of an augmentation, for `probe`."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.transforms = ImageTransforms()
        self.transforms.parts = [part]

    def forward(self, images: Tensor) -> Tensor:
        """Transform float images ``(B, C, H, W)`` in [0, 1]."""
        seeds = torch.randint(SEEDS, images.shape[:1]).tolist()
        return self.transforms((255 * images).byte(), seeds).float() / 255
