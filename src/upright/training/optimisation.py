"""Parameter groups for any optimiser, and the optimiser Muon for networks with convolutions."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, SparseAdam

from upright.errors import UserError

Groups = Iterable[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]


def grouped_optimizer(model: nn.Module, make: MakeOptimizer) -> Optimizer:
    """Build an optimiser over all trainable parameters, each in one group.

    There is one group per ``lr_factor`` of a module. If the optimiser has weight decay, parameters of one dimension
    (biases, scales of norms) and those of modules with ``no_weight_decay = True`` get a group without it (He et al.
    2019, arXiv:1812.01187). SGD, Adam and AdamW use torch's fused kernels, unless ``fused`` or ``foreach`` is set.

    Raises:
        UserError: if the optimiser refuses its arguments, or cannot train these networks.
    """
    treatments = dict(_treatments(model, 1.0, True))
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, (factor, _) in treatments.items():
        groups.setdefault(factor, []).append(parameter)
    try:
        optimizer = make([{"params": parameters} for parameters in groups.values()])
    except ValueError as error:
        raise UserError(f"model.optimizer: {error}") from error
    if isinstance(optimizer, (LBFGS, SparseAdam)):
        name = type(optimizer).__name__
        raise UserError(f"model.optimizer: {name} takes no dense, channels-last gradients; use AdamW, SGD or Muon.")
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


class Muon(AdamW):
    """Muon for the weights of convolutions and linear layers, and AdamW for all other parameters.

    The step of a matrix is its momentum, made orthogonal: all directions learn equally fast (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). It is scaled to the size of a step of AdamW, so both use the same
    learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982, section 2.2). Matrices with fewer than 16 rows or
    columns, such as the classifier of ten classes and depthwise convolutions, are left to AdamW.

    ``torch.optim.Muon`` takes matrices only, and no other parameters.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: of the matrices.
        weight_decay: decoupled, as in AdamW.
        betas: of AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.003,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}.")
        # Fused kernels would scale gradients back in 16-mixed precision, which a matrix's step needs before.
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)
        for group in self.param_groups:
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change all parameters by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is not None and weight.ndim > 1 and min(len(weight), weight[0].numel()) >= 16:
                    self._step(weight, gradient, group)
                    gradients[weight], weight.grad = gradient, None  # hidden from AdamW
        super().step()
        for weight, gradient in gradients.items():
            weight.grad = gradient
        return loss

    def _step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            # AdamW expects a count of steps when it loads a checkpoint.
            state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(weight))
        state["step"] += 1
        momentum = state["momentum_buffer"]
        momentum.mul_(group["momentum"]).add_(gradient)
        step = orthogonalised(gradient.add(momentum, alpha=group["momentum"]).flatten(1))  # Nesterov's
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(step.view_as(weight), alpha=-0.2 * math.sqrt(max(step.shape)) * group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about ``U @ V.T`` of a ``matrix`` with the singular value decomposition ``U @ S @ V.T``.

    Five iterations of Newton and Schulz bring every singular value to 0.7 to 1.2. On a GPU they compute in bfloat16; a
    CPU may have no instructions for it.
    """
    tall = len(matrix) > matrix.shape[1]
    wide = (matrix.T if tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    orthogonal: Tensor = (wide.T if tall else wide).to(matrix.dtype)
    return orthogonal
