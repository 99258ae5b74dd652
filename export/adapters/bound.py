"""The tensors of one adapter, bound to a session once instead of fed at every call.

onnxruntime's Python turns each fed array into a tensor of its own; for 72 factors that costs a
call of one token more than their arithmetic does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.export.adapters.table import Arrays

_NOTHING = np.empty(0, np.uint8)


class BoundAdapter:
    """An adapter's tensors, or none, ready to run in a session.

    Threads may call :meth:`run` at the same time: each takes a binding that no other has.

    Args:
        session: An ``onnxruntime.InferenceSession``.
        arrays: Input -> array, C-contiguous; kept, not copied.

    Attributes:
        arrays: The same.
    """

    def __init__(self, session: Any, arrays: Arrays) -> None:
        self.arrays = arrays
        self._session = session
        self._free: list[Any] = []
        # The others, such as texts and sequences, onnxruntime feeds and does not bind.
        types = {value.type for value in (*session.get_inputs(), *session.get_outputs())}
        self._binds = all(t.startswith("tensor(") and t != "tensor(string)" for t in types)

    def run(
        self, wanted: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> Sequence[NDArray[Any]]:
        """The outputs, in the order of ``wanted``.

        Args:
            wanted: Names of outputs.
            feeds: The inputs that are not the adapter's -> C-contiguous array; all of them.

        Raises:
            Exception: onnxruntime's, which have no other common base.
        """
        if not self._binds:
            fed = {**self.arrays, **feeds}
            found: Sequence[NDArray[Any]] = self._session.run(list(wanted), fed)
            return found
        try:
            binding = self._free.pop()
        except IndexError:
            binding = self._bind()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in wanted:
            binding.bind_output(name)
        # One that fails is not put back: nobody knows what is bound to it then.
        self._session.run_with_iobinding(binding)
        outputs: Sequence[NDArray[Any]] = binding.copy_outputs_to_cpu()
        # What was fed and what came out are the caller's, and may be as large as a cache of keys.
        binding.clear_binding_outputs()
        for name in feeds:
            binding.bind_cpu_input(name, _NOTHING)
        self._free.append(binding)
        return outputs

    def _bind(self) -> Any:
        import onnxruntime

        binding = self._session.io_binding()
        for name, array in self.arrays.items():
            # bind_cpu_input knows no inputs that have a default. The value has the array's memory.
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
        return binding
