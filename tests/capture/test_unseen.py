"""A test for identity or type is invisible in a trace: forwards with one stay Python and compute the same as before."""

import copy
import gc
import operator
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile.capture import capture_model

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
X, Y = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[..., Any], Calls, str]] = {}


class Part(nn.Module):
    """A module that calls `F.linear` on its own weight; each case gives it another forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.bias = None
        self.act = torch.relu
        self.table = {1: 2.0}
        self.pair, self.plain = Pair(), nn.Identity()


class Pair(nn.Module):
    """A child that returns a tuple, whose second item is None for a positive sum."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, None if x.sum() > 0 else x


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs), self.head(X)


def model_of(forward: Callable[..., Any]) -> nn.Module:
    return Model(type("Part", (Part,), {"forward": forward})())


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def case(reason: str, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> Callable[..., Callable[..., Any]]:
    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        CASES[forward.__name__] = (forward, list(calls), reason)
        return forward

    return register


def added(x: Tensor, other: Tensor | None = None) -> Tensor:
    return x if other is None else x + other


IDENTITY = "identity or type of a value that a trace does not know"
BOTH = (call({"x": X}), call({"x": X, "r": Y}))


@case(IDENTITY, *BOTH)
def asks_a_lookup_for_none(self: Any, batch: Any) -> Tensor:
    h = F.linear(batch["x"], self.w)
    if batch.get("r") is not None:
        h = h + batch["r"]
    return h


@case(IDENTITY, *BOTH)
def asks_a_local_for_none(self: Any, batch: Any) -> Tensor:
    h, r = F.linear(batch["x"], self.w), batch.get("r")
    return h if r is None else h + r


@case(IDENTITY, *BOTH)
def asks_a_walrus_for_none(self: Any, batch: Any) -> Tensor:
    h = F.linear(batch["x"], self.w)
    return h if (r := batch.get("r")) is None else h + r


@case(IDENTITY, *BOTH)
def asks_in_a_comprehension(self: Any, batch: Any) -> Tensor:
    return F.linear(sum(t for t in (batch["x"], batch.get("r")) if t is not None), self.w)


@case(IDENTITY, *BOTH)
def asks_in_a_helper(self: Any, batch: Any) -> Tensor:
    return added(F.linear(batch["x"], self.w), batch.get("r"))


@case(IDENTITY, call(X), call(X, r=Y))
def asks_a_keyword(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    h, r = F.linear(x, self.w), kwargs.get("r")
    return h if r is None else h + r


@case(IDENTITY, call(X, None), call(X, Y))
def asks_a_positional(self: Any, *args: Any) -> Tensor:
    h, r = F.linear(args[0], self.w), args[1]
    return h if r is None else h + r


@case(IDENTITY, call(X), call(-X))
def asks_a_result_of_a_child(self: Any, x: Tensor) -> Tensor:
    h, r = self.pair(x)
    h = F.linear(h, self.w)
    return h if r is None else h + r


@case(IDENTITY, call(X, {"k": X}), call(X, {"k": Y}))
def compares_derived_values(self: Any, x: Tensor, batch: Any) -> Tensor:
    q, k = F.linear(x, self.w), batch["k"]
    return q if k is x else q + k


@case(IDENTITY, call(X, X), call(X, Y))
def compares_arguments(self: Any, x: Tensor, k: Tensor) -> Tensor:
    q = F.linear(x, self.w)
    return q if k is x else q + k


@case("operator.is_", call(X, X), call(X, Y))
def compares_by_operator(self: Any, x: Tensor, k: Tensor) -> Tensor:
    q = F.linear(x, self.w)
    return q if operator.is_(k, x) else q + k


@case(IDENTITY, call(X, True), call(X, 1))
def asks_for_true(self: Any, x: Tensor, flag: Any) -> Tensor:
    return F.linear(x, self.w) * (2 if flag is True else 1)


@case(IDENTITY, call(X))
def asks_a_derived_type(self: Any, x: Tensor) -> Tensor:
    h = self.pair(x)
    return F.linear(h[0] if type(h) is tuple else h, self.w)


@case(IDENTITY, call(X))
def compares_the_type_of_an_argument(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.w) * (2 if type(x) == Tensor else 1)  # noqa: E721


@case("tests the type", call(X))
def asks_the_type_of_an_attribute(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.w) * (2 if isinstance(x.shape, tuple) else 1)


@case("has the attribute 'r'", call(SimpleNamespace(x=X)), call(SimpleNamespace(x=X, r=Y)))
def asks_for_an_attribute(self: Any, d: Any) -> Tensor:
    return F.linear(d.x, self.w) * (2 if hasattr(d, "r") else 1)


@case("has the attribute 'r'", call(SimpleNamespace(x=X)), call(SimpleNamespace(x=X, r=Y)))
def reads_an_attribute_with_a_default(self: Any, d: Any) -> Tensor:
    return F.linear(d.x, self.w) + getattr(d, "r", 1)


@case(IDENTITY, call(X, Y), call(X, torch.relu))
def asks_whether_it_can_be_called(self: Any, x: Tensor, f: Any) -> Tensor:
    h = F.linear(x, self.w)
    return f(h) if callable(f) else h + f


@case(IDENTITY, call(X))
def asks_for_a_graph(self: Any, x: Tensor) -> Tensor:
    h = F.linear(x, self.w)
    return h * 2 if x.grad_fn is None else h


@case("looks a value up", call(X, None), call(X, True))
def asks_a_set(self: Any, x: Tensor, flag: Any) -> Tensor:
    return F.linear(x, self.w) * (2 if flag in {None, False} else 1)


@case("looks a value up", call(X, 1), call(X, 2))
def asks_a_dict(self: Any, x: Tensor, key: Any) -> Tensor:
    return F.linear(x, self.w) * self.table.get(key, 3.0)


@case("into text", call(X))
def asks_a_text(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.w) * (2 if "cpu" in f"{x.device}" else 1)


@case("catches exceptions", *BOTH)
def catches(self: Any, batch: Any) -> Tensor:
    try:
        r = batch["r"]
    except KeyError:
        r = 1
    return F.linear(batch["x"], self.w) * r


@case("catches exceptions or matches patterns", call(X))
def matches(self: Any, x: Any) -> Tensor:
    match x:
        case [a, b]:
            x = a + b
    return F.linear(x, self.w)


@case("class OrderedDict", call(X))
def makes_an_ordered_dict(self: Any, x: Tensor) -> Any:
    return OrderedDict(y=F.linear(x, self.w))


@case("copies a value", call(X))
def copies(self: Any, x: Tensor) -> Tensor:
    y = copy.deepcopy(x)
    y += 1
    return F.linear(x, self.w)


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        items = list(expected.values()) if isinstance(expected, dict) else expected
        assert len(found) == len(items)
        for one, other in zip(found.values() if isinstance(found, dict) else found, items, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_forwards_with_tests_that_a_trace_cannot_see_compute_what_they_did(name: str) -> None:
    forward, calls, reason = CASES[name]
    model = model_of(forward)
    compiled = nmcompile.compile(model, "dense")
    for args, kwargs in calls:
        assert_equal(compiled(*args, **kwargs), model(*args, **kwargs))
    kept = capture_model(model).python["part"]
    assert reason in kept
    if reason == IDENTITY:
        assert "(test_unseen.py, line " in kept


@pytest.mark.parametrize("name", ["asks_a_lookup_for_none", "asks_a_result_of_a_child", "makes_an_ordered_dict"])
def test_they_compute_what_they_did_with_example_inputs_too(name: str) -> None:
    forward, calls, _ = CASES[name]
    model = model_of(forward)
    compiled = nmcompile.compile(model, "dense", args=calls[0][0])
    for args, kwargs in calls:
        assert_equal(compiled(*args, **kwargs), model(*args, **kwargs))
    captured = capture_model(model, calls[0][0])
    assert "part" not in captured.traces and captured.routes["part"] == {"part.w": "part.w"}


def asks_its_own_attributes(self: Any, x: Tensor) -> Tensor:
    h = F.linear(x, self.w)
    if self.bias is not None:
        h = h + self.bias
    if callable(self.act) and type(self.plain) is nn.Identity and isinstance(self.plain, nn.Module):
        h = self.act(h)
    return h


def asks_a_constant(self: Any, x: Tensor) -> Tensor:
    scale = None
    if self.bias is not None:
        scale = self.bias
    return added(F.linear(x, self.w)) if scale is None else x


def asks_an_argument_to_no_effect(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    h = F.linear(x, self.w)
    if mask is not None:
        pass
    mask = h
    return mask


def names_attributes(self: Any, x: Tensor) -> Tensor:
    rows, columns = x.shape
    return F.linear(x, self.w).view(rows, columns).to(x.dtype)


@pytest.mark.parametrize(
    "forward", [asks_its_own_attributes, asks_a_constant, asks_an_argument_to_no_effect, names_attributes]
)
def test_tests_of_what_is_fixed_leave_a_forward_generated(forward: Callable[..., Any]) -> None:
    model = model_of(forward)
    captured = capture_model(model)
    assert "part" in captured.traces
    assert not captured.python
    assert_equal(nmcompile.compile(model, "dense")(X), model(X))


def test_a_test_for_none_whose_other_branch_cannot_be_traced_stays_python() -> None:
    def forward(self: Any, x: Tensor, state: Tensor) -> Tensor:
        if state is None:
            state = torch.zeros(len(x), 4)
        return F.linear(x, self.w) + state

    model = model_of(forward)
    compiled = nmcompile.compile(model, "dense")
    for state in (None, Y):
        assert_equal(compiled(X, state), model(X, state))
    assert "the argument 'state' for None" in capture_model(model).python["part"]


def test_callbacks_of_the_garbage_collector_are_not_the_code_of_a_forward() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            rows = [[x] for _ in range(100)]
            return F.linear(rows[0][0], self.w)

    def callback(phase: str, info: dict[str, Any]) -> None:
        try:
            seen.append(phase)
        except ValueError:  # a trace does not see this
            raise

    seen: list[str] = []
    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        captured = capture_model(Own(), None, None)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert seen and not captured.python and gc.isenabled()
