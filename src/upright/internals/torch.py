"""Private names of torch.

`TorchDispatchMode` is documented ("Extending PyTorch") but is in a private module. The names of some operators begin
with an underscore, because a public function of torch chooses among them. Only an operator's schema has names for
its arguments.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training  # noqa: SLF001
ADAPTIVE_POOLS = (aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)  # noqa: SLF001


class OperatorObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Call `observe` after every operator of ATen that runs inside the ``with``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def observe(self, operator: Any, arguments: dict[str, Any], result: Any) -> None:
        """Process an operator, its arguments by name, and its result."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = (argument.name for argument in func._schema.arguments)  # noqa: SLF001
        self.observe(func, dict(zip(names, args, strict=False)) | (kwargs or {}), result)
        return result
