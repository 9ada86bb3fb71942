"""Initial weights for any network, by the schemes of the literature.

- ``xavier``: Glorot, Bengio 2010.
- ``he``: He et al. 2015 (arXiv:1502.01852).
- ``lecun``: LeCun et al. 1998, "Efficient BackProp".
- ``orthogonal``: Saxe et al. 2014 (arXiv:1312.6120).
- ``normal``: standard deviation 0.01, as in AlexNet.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import init

Scheme = Literal["xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_normal", "orthogonal", "normal"]

SCHEMES: dict[Scheme, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": init.xavier_uniform_,
    "xavier_normal": init.xavier_normal_,
    "he_uniform": partial(init.kaiming_uniform_, nonlinearity="relu"),
    "he_normal": partial(init.kaiming_normal_, nonlinearity="relu"),
    "lecun_normal": partial(init.kaiming_normal_, nonlinearity="linear"),
    "orthogonal": init.orthogonal_,
    "normal": partial(init.normal_, std=0.01),
}


def initialise(network: nn.Module, scheme: Scheme) -> None:
    """Set the weights of every convolution, linear and recurrent layer by ``scheme``, and their biases to zero.

    Normalisation layers do not change, nor do modules with the attribute ``starts_fixed = True``, such as the last
    layer of a spatial transformer, which starts at the identity.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | nn.RNNBase) and not getattr(
            module, "starts_fixed", False
        ):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 1:
                    init.zeros_(parameter)
                    continue
                # The matrix of a recurrent layer stacks the matrices of its gates.
                gates = len(parameter) // module.hidden_size if isinstance(module, nn.RNNBase) else 1
                for part in parameter.detach().chunk(gates):
                    SCHEMES[scheme](part)
