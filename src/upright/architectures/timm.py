"""Networks of timm (Wightman 2019, github.com/huggingface/pytorch-image-models), with or without pretrained weights."""

from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upright.errors import one_line


class Pretrained(NamedTuple):
    """Published weights of a network."""

    weights: dict[str, Tensor]
    """Tensors under the names of the network's state dict. The head is that of the published classes."""
    origin: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Timm(nn.Module):
    """A network of timm by its name, such as ``mobilenetv3_small_100`` (``pip install 'upright[timm]'``).

    Building it loads no weights: `upright.training.finetuning.start_from` does so when training begins, and a
    checkpoint is enough for everything later.

    Args:
        name: name of the network, with or without the tag of its weights: ``resnet18``, ``resnet18.a1_in1k``.
        pretrained: start from the published weights. timm downloads them once, to the cache of Hugging Face.
        options: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        name: str,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.pretrained = name, pretrained
        config = _config(name)
        if pretrained and not (config.hf_hub_id or config.url):
            raise ValueError(f"timm has no weights of '{name}': leave out `pretrained`.")
        channels, *size = input_shape
        self._options: dict[str, Any] = {"in_chans": channels} | (options or {})
        if config.fixed_input_size:
            self._options.setdefault("img_size", tuple(size))
        try:
            self.backbone: nn.Module = _timm().create_model(name, num_classes=num_classes, **self._options)
        except (TypeError, AttributeError, LookupError, AssertionError) as error:
            reason = one_line(error, 200)
            raise ValueError(f"timm cannot build '{name}' for images of {input_shape}: {reason}") from None

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone(images)
        return logits

    @classmethod
    def image_format(cls, name: str, **_: object) -> dict[str, Any]:
        """Return size, normalisation and interpolation of the images that the published weights were trained on.

        They are the defaults of the data options of the same names; see `upright.data.configs.adopt_format`.
        """
        config = _config(name)
        interpolation = "bicubic" if config.interpolation == "bicubic" else "bilinear"
        return {
            "size": config.input_size[1],
            "mean": tuple(config.mean),
            "std": tuple(config.std),
            "interpolation": interpolation,
        }

    def published(self) -> Pretrained:
        """Load the published weights.

        timm adapts them to the number of channels and, for networks of one image size, to that size.

        Raises:
            ValueError: if they can neither be downloaded nor found in the cache.
        """
        config = _config(self.name)
        try:
            with torch.random.fork_rng(devices=[]):
                backbone = _timm().create_model(self.name, pretrained=True, **self._options)
        except Exception as error:  # the clients of the Hub raise errors of many kinds
            raise ValueError(
                f"The weights of '{self.name}' can neither be downloaded nor found in the cache "
                f"({one_line(error, 200)}). Give their file with --start_from, or train from scratch with pretrained: "
                "false."
            ) from None
        weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        return Pretrained(weights, config.hf_hub_id or config.url, tuple(config.mean), tuple(config.std))


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        if error.name != "timm":
            raise
        raise ValueError("Timm needs the package timm: pip install 'upright[timm]'.") from None
    return timm


def _config(name: str) -> Any:
    """Return timm's configuration of a network and its weights.

    Raises:
        ValueError: if timm has no network of this name, or no weights of this tag.
    """
    timm = _timm()
    if not timm.is_model(name):
        similar = get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "`timm.list_models()` lists all names."
        raise ValueError(f"timm has no network '{name}'. {hint}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"timm has no weights '{name}': {one_line(error, 200)}") from None
    return config
