"""Private names of kornia (tested with 0.9)."""

from typing import Literal

from torch import nn


def has_part(module: nn.Module, kind: Literal["geometric", "mix"]) -> bool:
    """Return whether a module is, or contains, an augmentation of kornia that moves or mixes pixels.

    Kornia's public classes do not distinguish the kinds. The folders of their modules do, and this needs no import.
    """
    folder = f"kornia.augmentation._2d.{kind}."
    return any(cls.__module__.startswith(folder) for each in module.modules() for cls in type(each).__mro__)
