"""Describe the layers of a network: output shapes, receptive fields, parameters, multiply-adds."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from upright.internals.torch import ADAPTIVE_POOLS, BATCH_NORM, OperatorObserver, aten

Shape = tuple[int, ...]

MAX_REDUCTION = 8
"""A layer gets a warning if it divides the number of positions by more than this, unless it reduces an axis to one."""
ELSEWHERE = "(elsewhere)"
"""Name of the row for operations and parameters outside of all layers."""


@dataclass(frozen=True)
class Window:
    """Kernel (with its dilation), stride and padding of a convolution or pooling, per axis."""

    kernel: Shape
    stride: Shape
    padding: tuple[float, ...]


@dataclass(frozen=True)
class Layer:
    """One call of a module whose submodules are not called; or all operations outside of such modules.

    Args:
        name: path of the module in the network.
        kind: class of the module.
        window: window of a convolution or pooling.
        output: shape of the output for one image.
        receptive_field: rows and columns of the image that influence one output position; None if unknown.
        jump: rows and columns of the image between neighbouring positions; 0 if all depend on the complete image.
        parameters: number of parameters, without those of earlier layers.
        multiply_adds: multiply-adds of convolutions and matrix products, without biases, for one image.
        activations: number of output values for one image.
        connections: multiply-adds, divided by those of a dense layer between the same input and output.
        weights: number of weights, divided by that of such a dense layer.
    """

    name: str
    kind: str
    window: Window | None
    output: Shape
    receptive_field: Shape | None
    jump: Shape | None
    parameters: int
    multiply_adds: int
    activations: int
    connections: float | None = None
    weights: float | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over a network; ``megabytes`` (10^6 bytes) is the size of its parameters as float32."""

    parameters: int
    trainable: int
    multiply_adds: int
    activations: int
    megabytes: float


@dataclass(frozen=True)
class Description:
    """The result of `describe`."""

    input: Shape
    layers: list[Layer]
    totals: Totals
    warnings: list[str]


def describe(network: nn.Module, input_shape: Shape) -> Description:
    """Run one image of zeros ``(C, H, W)`` through ``network``, in evaluation mode, and describe every layer.

    The network may be on any device; on ``meta`` nothing is computed.
    """
    network.eval()
    device = next((tensor.device for tensor in chain(network.parameters(), network.buffers())), None)
    images = torch.zeros(1, *input_shape, device=device)
    fields = _Fields(images)
    counter = FlopCounterMode(display=False, custom_mapping={aten.mkldnn_rnn_layer: _rnn_flops})
    names = {module: name for name, module in network.named_modules()}
    layers: list[Layer] = []
    warnings: list[str] = []
    earlier_parameters: set[nn.Parameter] = set()
    starts: list[tuple[int, int]] = []

    def before(*_: Any) -> None:
        starts.append((len(layers), counter.get_total_flops()))

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        layers_before, flops_before = starts.pop()
        image, output = next(_tensors((args, kwargs)), None), next(_tensors(result), None)
        if len(layers) > layers_before or image is None or output is None:
            return
        field = fields.of.get(output)
        parameters = set(module.parameters())
        multiply_adds = (counter.get_total_flops() - flops_before) // 2
        connections = weights = None
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            dense = image.numel() * output.numel()
            connections, weights = multiply_adds / dense, module.weight.numel() / dense
        layer = Layer(
            name=names[module],
            kind=type(module).__name__ + (" (ceil)" if getattr(module, "ceil_mode", False) else ""),
            window=_window(module),
            output=tuple(output.shape[1:] if len(output) == 1 else output.shape),
            receptive_field=field and field.size,
            jump=field and field.jump,
            parameters=_size(parameters - earlier_parameters),
            multiply_adds=multiply_adds,
            activations=output.numel(),
            connections=connections,
            weights=weights,
        )
        layers.append(layer)
        earlier_parameters.update(parameters)
        if image.ndim == output.ndim == 4:
            inputs, outputs = prod(image.shape[2:]), prod(output.shape[2:])
            if min(output.shape[2:]) > 1 and outputs < inputs / MAX_REDUCTION:
                warnings.append(
                    f"{layer.name} ({layer.kind}) keeps {outputs:,} of {inputs:,} positions, "
                    f"1 in {inputs / outputs:.0f}; smaller strides in several layers lose less detail."
                )

    hooks = [module.register_forward_pre_hook(before) for module in names]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in names]
    try:
        with torch.no_grad(), fields, counter:
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    every = set(network.parameters())
    totals = Totals(
        parameters=_size(every),
        trainable=_size(parameter for parameter in every if parameter.requires_grad),
        multiply_adds=counter.get_total_flops() // 2,
        activations=sum(layer.activations for layer in layers),
        megabytes=4 * _size(every) / 1e6,
    )
    rest = totals.multiply_adds - sum(layer.multiply_adds for layer in layers)
    if rest or every - earlier_parameters:
        layers.append(Layer(ELSEWHERE, "", None, (), None, None, _size(every - earlier_parameters), rest, 0))
    return Description(tuple(input_shape), layers, totals, warnings)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | Mapping):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(part)


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _rnn_flops(sequence: Shape, input_weight: Shape, state_weight: Shape, *_: Any, **__: Any) -> int:
    """Return the flops of a recurrent layer. On the CPU it is one operation, whose flops torch does not count."""
    return 2 * prod(sequence[:-1]) * (prod(input_weight) + prod(state_weight))


def _window(module: Any) -> Window | None:
    if not hasattr(module, "kernel_size") or not hasattr(module, "padding") or getattr(module, "transposed", False):
        return None
    kernel, stride, dilation = (
        _pair(value) for value in (module.kernel_size, module.stride, getattr(module, "dilation", 1))
    )
    kernel = tuple((f - 1) * d + 1 for f, d in zip(kernel, dilation, strict=True))
    if isinstance(module.padding, str):
        return Window(kernel, stride, tuple((f - 1) / 2 if module.padding == "same" else 0 for f in kernel))
    return Window(kernel, stride, _pair(module.padding))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


class _Field(NamedTuple):
    """Receptive field and jump, each as rows and columns."""

    size: Shape
    jump: Shape


_LOCAL = {
    *(aten.view, aten.expand, aten.unsqueeze, aten.squeeze, aten.select, aten.unbind),
    *(aten.split, aten.split_with_sizes, aten.cat, aten.stack),
    # By convention the statistics of a normalisation do not enlarge the receptive field.
    *(BATCH_NORM, aten.native_group_norm, aten.native_layer_norm),
}
"""Operators that keep values in their rows and columns, provided that the last two dimensions stay the same."""
_PADDING = {aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d}


class _Fields(OperatorObserver):  # type: ignore[no-untyped-call]
    """Track the receptive field of every tensor that depends on ``images``.

    With several inputs, the largest field counts. After any other operator than the local ones (such as a matrix
    product, a mean, or sampling at computed points), a value depends on the complete image.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.image = tuple(images.shape[-2:])
        self.of: MutableMapping[Tensor, _Field] = WeakTensorKeyDictionary()
        self.of[images] = _Field((1, 1), (1, 1))

    def observe(self, operator: Any, arguments: dict[str, Any], result: Any) -> None:
        inputs = [tensor for tensor in _tensors(arguments) if tensor in self.of]
        if inputs:
            sizes, jumps = zip(*(self.of[tensor] for tensor in inputs), strict=True)
            field = _Field(*(tuple(map(max, zip(*values, strict=True))) for values in (sizes, jumps)))
            for tensor in _tensors(result):
                self.of[tensor] = self._after(operator, arguments, field, inputs[0], tensor)

    def _after(self, func: Any, arguments: dict[str, Any], field: _Field, before: Tensor, after: Tensor) -> _Field:
        operator, rank = func.overloadpacket, before.ndim
        kernel = arguments.get("kernel_size", ())
        if operator is aten.convolution and not arguments["transposed"]:
            kernel = arguments["weight"].shape[2:]
        if len(kernel) > 1 and rank == after.ndim:
            return self._through(field, kernel, arguments.get("stride") or kernel, arguments.get("dilation") or (1, 1))
        if operator in ADAPTIVE_POOLS:
            sizes = list(zip(before.shape[-2:], after.shape[-2:], strict=True))
            if all(n % m == 0 for n, m in sizes):
                steps = [n // m for n, m in sizes]
                return self._through(field, steps, steps)
        if operator is aten.slice:
            axis, step = arguments.get("dim", 0) % rank, arguments.get("step", 1)
            return self._through(field, (1, 1), [step if axis == rank + place else 1 for place in (-2, -1)])
        local = operator in _LOCAL and before.shape[-2:] == after.shape[-2:]
        if local or operator in _PADDING or torch.Tag.pointwise in func.tags:
            return field
        return _Field(self.image, (0, 0))

    def _through(self, field: _Field, kernel: Any, stride: Any, dilation: Any = (1, 1)) -> _Field:
        axes = zip(field.size, field.jump, self.image, kernel[-2:], stride[-2:], dilation[-2:], strict=True)
        sizes, jumps = zip(*((min(r + (f - 1) * d * j, n), j * s) for r, j, n, f, s, d in axes), strict=True)
        return _Field(sizes, jumps)
