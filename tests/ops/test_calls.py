"""``lora_linear`` called without ``torch.ops``: who listens to ops hears of it all the same."""

from __future__ import annotations

import sys
import threading
from typing import Any, ClassVar

import pytest
import torch
from closeness import assert_close
from linear_problems import by_hand, make
from marks import needs_compiled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gauge_ext import _load
from gauge_ext.ops import lora_linear, reference

pytestmark = needs_compiled

SIZES = (7, 12, 10, 3)
OP = "gauge_ext.lora_linear.default"


def arguments(**changes: Any) -> dict[str, Any]:
    """The arguments of a plain call without gradients, in the op's order."""
    p = make(SIZES)
    plain = {
        "x": p.x.detach(),
        "weight": nn.Parameter(p.weight, requires_grad=False),
        "bias": p.bias,
        "lora_A": p.lora_A.detach(),
        "lora_B": p.lora_B.detach(),
        "scaling": p.scaling,
        "dropout_p": 0.0,
        "seed": None,
    }
    assert plain.keys() >= changes.keys()
    return plain | changes


def call(given: dict[str, Any]) -> Any:
    """Call the compiled function itself."""
    calls = _load.status().calls
    assert calls is not None
    return calls.lora_linear(*given.values())


class Overriding(Tensor):
    """A tensor that notes the functions called with it."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.called.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Notes the functions called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes the operators dispatched meanwhile; raises instead where it is given an error."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.called: list[str] = []
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        if self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_call_is_computed_without_torch_ops(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["gauge_ext.ops.lora_linear"], "_op")
    p = make(SIZES)
    given = (p.x, p.weight, p.bias if bias else None, p.lora_A, p.lora_B, p.scaling)
    y = lora_linear(*given)
    expected = by_hand(p)
    assert_close(y, expected[0] if bias else expected[0] - p.bias, 1e-13)
    for actual, exact in zip(
        torch.autograd.grad(y, p.differentiable, p.grad), expected[1:], strict=True
    ):
        assert_close(actual, exact, 1e-13)
    seed = torch.tensor(5)
    mask = reference.dropout_mask(SIZES[0], SIZES[1], 0.5, seed)
    y = lora_linear(*given, 0.5, seed)
    expected_y = by_hand(p, mask)[0]
    assert_close(y, expected_y if bias else expected_y - p.bias, 1e-13)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": 2},
        {"dropout_p": 0},
        {"x": Overriding(torch.ones(2, SIZES[1], dtype=torch.float64))},
        {"weight": Overriding(torch.ones(4, SIZES[1], dtype=torch.float64)), "bias": None,
         "lora_B": torch.ones(4, SIZES[3], dtype=torch.float64)},
        {"seed": Overriding(torch.tensor(1))},
    ],
)  # fmt: skip
def test_what_is_out_of_the_ordinary_takes_the_way_of_torch_ops(changes: dict[str, Any]) -> None:
    given = arguments(**changes)
    assert call(given) is NotImplemented
    w, a, b = (given[name].as_subclass(Tensor) for name in ("weight", "lora_A", "lora_B"))
    y = given["x"] @ (w + given["scaling"] * b @ a).T
    assert_close(lora_linear(**given), y if given["bias"] is None else y + given["bias"], 1e-13)


def test_what_is_no_tensor_at_all_is_refused_as_by_torch_ops() -> None:
    for name in ("weight", "bias", "lora_A", "lora_B", "seed"):
        given = arguments(**{name: "text"})
        assert call(given) is NotImplemented
        with pytest.raises(
            RuntimeError, match=f"Expected a value of type .* for argument '{name}'"
        ):
            lora_linear(**given)
    with pytest.raises(TypeError, match="takes 8 arguments, got 1"):
        call({"x": torch.ones(2)})


def test_errors_have_the_words_that_torch_ops_gives_them() -> None:
    given = arguments(bias=torch.ones(3))
    said = []
    for function in (call, lambda given: torch.ops.gauge_ext.lora_linear(**given)):
        with pytest.raises(RuntimeError) as error:
            function(given)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert said[0].startswith("bias must have shape [out] = [10], got [3]")


def test_functions_of_a_mode_and_of_a_subclass_see_the_op() -> None:
    given = arguments()
    with Functions() as functions:
        assert call(given) is NotImplemented
        lora_linear(**given)
    assert functions.called.count(OP) == 1
    Overriding.called.clear()
    y = lora_linear(**arguments(x=given["x"].as_subclass(Overriding)))
    assert OP in Overriding.called
    assert isinstance(y, Overriding)
    with Functions() as functions, torch._C.DisableTorchFunction():
        assert isinstance(call(given), Tensor)
    assert functions.called == []


def test_a_dispatch_mode_sees_the_op_and_its_errors_arrive() -> None:
    given = arguments()
    with Operators() as operators:
        call(given)
    assert operators.called == [OP]
    error = KeyError("of the mode")
    with Operators(error), pytest.raises(KeyError, match="of the mode") as raised:
        call(given)
    assert raised.value is error


def test_fake_tensors_come_out_of_fake_tensors_and_of_their_mode() -> None:
    given = arguments()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        for y in (call(given), lora_linear(**fakes)):
            assert isinstance(y, FakeTensor)
            assert (tuple(y.shape), y.dtype) == ((SIZES[0], SIZES[2]), torch.float64)


def test_the_proxies_of_make_fx_write_the_op_down() -> None:
    given = arguments()
    rest = tuple(given.values())[1:]
    graph = make_fx(lambda x: lora_linear(x, *rest))(given["x"])
    assert OP in [str(node.target) for node in graph.graph.nodes]
    assert torch.equal(graph(2 * given["x"]), lora_linear(2 * given["x"], *rest))


def test_the_profiler_names_the_op() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(arguments())
    assert "gauge_ext::lora_linear" in {event.key for event in profile.key_averages()}


def test_torch_jit_trace_is_told_the_formula() -> None:
    given = arguments()
    seen: list[object] = []

    def traced(x: Tensor) -> Tensor:
        seen.append(call(given | {"x": x}))
        return lora_linear(**(given | {"x": x}))

    graph = torch.jit.trace(traced, (given["x"],), check_trace=False)
    assert seen == [NotImplemented]
    assert "gauge_ext::" not in str(graph.graph)
    assert_close(graph(2 * given["x"]), lora_linear(**(given | {"x": 2 * given["x"]})), 1e-13)


def test_vmap_and_grad_of_torch_func() -> None:
    given = arguments()
    w = given["weight"] + given["scaling"] * given["lora_B"] @ given["lora_A"]
    rows = torch.func.vmap(lambda x: call(given | {"x": x}))(given["x"])
    assert_close(rows, given["x"] @ w.T + given["bias"], 1e-13)
    grad = torch.func.grad(lambda x: call(given | {"x": x}).sum())(given["x"])
    assert_close(grad, w.sum(0).expand_as(grad), 1e-13)


def test_autocast_casts_the_base() -> None:
    single = {
        name: value.float() if isinstance(value, Tensor) else value
        for name, value in arguments().items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert call(single).dtype == torch.bfloat16


def test_other_threads_run_python_meanwhile() -> None:
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    a, b = torch.ones(8, 512), torch.ones(512, 8)
    gate, ran, kept = threading.Lock(), [], []

    def other() -> None:
        with gate:
            ran.append(True)

    thread = threading.Thread(target=other)
    before = sys.getswitchinterval()
    # From here on a thread that has Python's lock keeps it until it gives it away.
    sys.setswitchinterval(1000.0)
    try:
        with gate:
            thread.start()  # and runs as far as the gate
        for _ in range(100):
            # Kept, as torch gives the lock away when it frees a tensor.
            kept.append(lora_linear(x, weight, None, a, b, 1.0))
            if ran:
                break
        assert ran
    finally:
        sys.setswitchinterval(before)
        thread.join()
