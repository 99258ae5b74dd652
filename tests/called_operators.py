"""Which operators a computation calls, as the dispatcher sees them below autograd."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Writes down each operator that reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
