"""A module of which each adapter may have a copy of its own: PEFT's ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gauge_ext.adapters.many import NamedAdapters, Slots
from gauge_ext.adapters.mergeable import move_along
from gauge_ext.adapters.row_groups import by_groups
from gauge_ext.adapters.rows import Rows, apart, only_name, read_apart
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.errors import AdapterStateError


class WholeModule(NamedAdapters):
    """A module whose parameters are trained whole, by each adapter that asks for it.

    It becomes one by the exchange of its class. As in any layer with adapters the parameters of the
    first lie in the module itself, under the names that they had, and those of the others in
    ``slots.NAME``. Who reads a parameter by its name (``head.weight``) gets that of the adapter
    that works, or the base's own where none of the active ones has the module; so a state dict does
    not depend on which works. A copy has no weight: it stands in the base's place or does not.

    Where each row of a batch has an adapter of its own, the module is called once for each of the
    copies that they ask for, with the rows that do.
    """

    whole_of: ClassVar[type[nn.Module]]
    working_name: str | None
    # The base's own, which are frozen and in no state dict.
    _own: dict[str, nn.Parameter]

    @property
    def own_parameters(self) -> Mapping[str, nn.Parameter]:
        """The base's own Parameters, by name."""
        return self._own

    def __getattr__(self, name: str) -> Any:
        """Return a parameter of the adapter that works, and everything else as ever."""
        if name not in vars(self).get("_own", ()):
            return super().__getattr__(name)
        if self.apart is not None:
            raise read_apart(self.apart.rows, name)
        working = self.working_name
        if working is not None:
            # Not self.slots: what is not there would be asked for here, again.
            further = cast("Slots", self._modules.get("slots"))
            of_slot = self if working == self.own_name else cast("AdapterSlot", further[working])
            if name in of_slot._factor_names:
                return of_slot._parameters[name]
        return self._own[name]

    def add(self, name: str, copies: Mapping[str, nn.Parameter]) -> None:
        """Take copies of the parameters as a further adapter's, which is not active yet."""
        slot = AdapterSlot()
        for key, value in copies.items():
            self._own.setdefault(key, cast("nn.Parameter", self._parameters[key]))
            slot.register_parameter(key, value)
        slot._factor_names, slot._start_names = tuple(copies), ()
        slot.scaling, slot.dropout_p = 1.0, 0.0
        self.put_beside(name, slot)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the first adapter's copies, whichever works."""
        return {name: cast("nn.Parameter", self._parameters[name]) for name in self._factor_names}

    def take(self, other: AdapterSlot) -> Self:
        """Make the copies of ``other`` the first adapter's."""
        self._parameters.update(self._own)
        self._parameters.update(other._parameters)
        self._factor_names = other._factor_names
        return self

    def settle(self) -> None:
        """Say anew whose parameters are read."""
        self.working_name = self._working(self.rows)
        self.apart = None if self.rows is None or self.disabled else apart(self.rows)

    def _working(self, rows: Rows | None) -> str | None:
        if self.disabled:
            return None
        if rows is not None:
            return only_name(rows)
        return next((name for name, _ in self.active if name in self.names), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns with the parameters of the adapter that works.

        Raises:
            AdapterStateError: Rows have adapters of their own, and the module is none that works on
                rows: see :func:`~gauge_ext.adapters.row_groups.by_groups`.
            ConfigError: They have, and its input has another number of rows.
        """
        split = self.apart
        if split is None:
            return super().forward(*args, **kwargs)
        if isinstance(self, _BatchNorm) and (self.training or self.running_mean is None):
            raise AdapterStateError(
                f"the samples of a batch cannot have parameters of their own at "
                f"{split.rows.path!r}: its batch normalization is over all of them.",
                hint="Call model.eval(), or the model once for each adapter, with use_adapters().",
            )
        return by_groups(self, self, split, self._with_copies, args, kwargs)

    def _with_copies(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns with one adapter's parameters, or the base's own."""
        before, split = self.working_name, self.apart
        self.working_name, self.apart = name, None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.working_name, self.apart = before, split

    def put_back(self) -> None:
        """Be the base again, with its own Parameters."""
        self._leave(self._own)

    def keep_working(self) -> None:
        """Be a plain module, with the Parameters that are read at the moment."""
        self._leave({name: getattr(self, name) for name in self._own})

    def _leave(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name in ("working_name", "_own", "_factor_names", "_start_names"):
            vars(self).pop(name)
        self.forget_names()
        base = cast("nn.Module", self)
        base.__class__ = type(self).whole_of
        for name, parameter in parameters.items():
            setattr(base, name, parameter)

    def _replicate_for_data_parallel(self) -> Any:
        # The copies hold what is registered under the old name, which is read before __getattr__.
        if self.working_name != self.own_name or self._own.keys() - self._factor_names:
            raise AdapterStateError(
                f"nn.DataParallel copies the modules of {self.own_name!r} alone (modules_to_save), "
                "and it is not the adapter that works.",
                hint="Use torch.nn.parallel.DistributedDataParallel.",
            )
        # torch has no types for it, nor for the two below.
        # torch has no types for it.
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        move_along(self._own, fn)
        # torch has no types for it.
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> Any:
        # What the class of the module leaves out; rows are of one batch, not of the module.
        # torch has no types for it.
        state = dict(super(NamedAdapters, self).__getstate__())  # type: ignore[no-untyped-call]
        state.pop("apart", None)
        if state.pop("rows", None) is not None:
            state["working_name"] = self._working(None)
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a module whose class was made at run time by what it was made of."""
        return _rebuild, (type(self).whole_of,), self.__getstate__()


_made: dict[type[nn.Module], type[WholeModule]] = {}


def _class_for(held: type[nn.Module]) -> type[WholeModule]:
    if held not in _made:
        members = {"whole_of": held, "__module__": __name__}
        _made[held] = type(f"Whole{held.__name__}", (WholeModule, held), members)
    return _made[held]


def _rebuild(held: type[nn.Module]) -> WholeModule:
    kind = _class_for(held)
    return kind.__new__(kind)


def become_whole(module: nn.Module, name: str, copies: Mapping[str, nn.Parameter]) -> WholeModule:
    """Turn a module into one whose parameters an adapter has copies of; it is not active yet.

    Args:
        module: The module that holds the parameters itself.
        name: What the adapter is called.
        copies: The adapter's parameters, by the names in ``module``.
    """
    own = {key: cast("nn.Parameter", module._parameters[key]) for key in copies}
    module.__class__ = _class_for(type(module))
    whole = cast("WholeModule", module)
    whole._parameters.update(copies)
    whole._own, whole._factor_names, whole._start_names = own, tuple(copies), ()
    whole.own_name = name
    whole.set_active(())
    return whole


def whole_modules(model: nn.Module) -> dict[str, WholeModule]:
    """Return the modules of which adapters have copies, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, WholeModule)}
