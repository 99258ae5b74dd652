"""Whether a parameter may be written to without anybody noticing."""

from __future__ import annotations

import sys

import torch
from torch import nn


def is_held_alone(owner: nn.Module, name: str) -> bool:
    """Say whether nothing but ``owner`` can see the elements of its parameter ``name``.

    That is so where there is no other reference to the Parameter (a tied layer, another model, an
    optimizer), none to its tensor from autograd, no view of its storage, and the storage is memory
    that torch allocated for this process: not a file's, another library's, or shared. As numpy's
    ``resize`` does it, by counts of references; what they are for a Parameter that is new is
    counted on one.
    """
    parameter = owner._parameters.get(name)
    if type(parameter) is not nn.Parameter:
        return False
    storage = parameter.untyped_storage()
    if not storage.resizable() or (storage.device.type == "cpu" and storage.is_shared()):
        return False
    del parameter, storage
    return _holders(owner, name) == _holders(nn.Linear(1, 1), "weight")


def _holders(owner: nn.Module, name: str) -> tuple[int, ...]:
    """Counts of references to a parameter and to its storage, as objects and in C++."""
    parameter = owner._parameters[name]
    assert parameter is not None
    storage = parameter.untyped_storage()
    of_storage = torch._C._storage_Use_Count(storage._cdata)
    of_tensor: int = parameter._use_count()  # type: ignore[attr-defined]
    return sys.getrefcount(parameter), sys.getrefcount(storage), of_tensor, of_storage
