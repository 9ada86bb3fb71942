"""Parameter groups for any optimiser: learning rates per module, and no weight decay for norms and biases."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from upright.errors import UserError

Groups = Iterable[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]


def grouped_optimizer(model: nn.Module, make: MakeOptimizer) -> Optimizer:
    """Build an optimiser over all trainable parameters, each in one group.

    There is one group per ``lr_factor`` of a module. If the optimiser has weight decay, parameters of one dimension
    (biases, scales of norms) and those of modules with ``no_weight_decay = True`` get a group without it (He et al.
    2019, arXiv:1812.01187). SGD, Adam and AdamW use torch's fused kernels, unless ``fused`` or ``foreach`` is set.

    Raises:
        UserError: if the optimiser refuses its arguments.
    """
    treatments = dict(_treatments(model, 1.0, True))
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, (factor, _) in treatments.items():
        groups.setdefault(factor, []).append(parameter)
    try:
        optimizer = make([{"params": parameters} for parameters in groups.values()])
    except ValueError as error:
        raise UserError(f"model.optimizer: {error}") from error
    # torch's default is a Python loop on a CPU, and several kernels on a GPU.
    fuses = isinstance(optimizer, (SGD, Adam)) and next(iter(treatments)).device.type in ("cpu", "cuda")
    # `add_param_group` extends the list during the loop.
    for factor, group in zip(groups, list(optimizer.param_groups), strict=True):
        group["lr"] *= factor
        if fuses and group["fused"] is None and not group["foreach"]:
            group["fused"] = True
        exempt = [parameter for parameter in group["params"] if not treatments[parameter][1]]
        if exempt and group.get("weight_decay"):
            group["params"] = [parameter for parameter in group["params"] if treatments[parameter][1]]
            optimizer.add_param_group({**group, "params": exempt, "weight_decay": 0.0})
    return optimizer


def _treatments(module: nn.Module, factor: float, decays: bool) -> Iterator[tuple[nn.Parameter, tuple[float, bool]]]:
    """Yield each trainable parameter with the product of all its ``lr_factor`` and whether it has weight decay."""
    factor *= getattr(module, "lr_factor", 1.0)
    decays = decays and not getattr(module, "no_weight_decay", False)
    for parameter in module.parameters(recurse=False):
        if parameter.requires_grad:
            own = factor * getattr(parameter, "lr_factor", 1.0)
            yield parameter, (own, decays and parameter.ndim > 1)
    for child in module.children():
        yield from _treatments(child, factor, decays)
