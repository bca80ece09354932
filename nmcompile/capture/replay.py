"""Comparison of every generated forward with its original, on the example that the model is compiled with."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.clones import shadow_tree
from nmcompile.capture.names import summary
from nmcompile.capture.state import contents_unchanged, unchanged
from nmcompile.ir.calls import LABEL
from nmcompile.three_gemm.rewritten import generated_forward

Forward = Callable[..., object]
T = TypeVar("T")


def differing_forwards(model: nn.Module, traces: Mapping[str, fx.Graph], args: Args, kwargs: Kwargs) -> dict[str, str]:
    """Run the model once in eval mode and compare the forwards that its traces would generate with its own.

    The forwards call plain layers, so they must return exactly the same bits; only a product that became a linear layer
    may round differently. Modules that the run does not reach are not compared.

    Returns:
        By module name, how a generated forward differs.
    """
    comparison = _Comparison()
    shadow = shadow_tree(model)
    for name, graph in traces.items():
        module = shadow.get_submodule(name)
        if not isinstance(module, fx.GraphModule):
            is_exact = not any(LABEL in node.meta for node in graph.nodes)
            # The shadow is a copy of plain modules, which no observer looks at.
            module.__dict__["forward"] = comparison.of(name, module, generated_forward(graph), is_exact)
    with suppress(Exception), unchanged(shadow) as memory, contents_unchanged(memory), torch.no_grad():
        given, named = _copied((args, kwargs))
        shadow(*given, **named)
    return comparison.reasons


class _Comparison:
    """The modules whose generated forward was found to differ. Modules inside one that is being compared just run."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.is_comparing = False

    def of(self, name: str, module: nn.Module, generated: Forward, is_exact: bool) -> Forward:
        """Return a forward that runs the generated forward, then the module's own."""
        original = module.forward

        def forward(*args: object, **kwargs: object) -> object:
            if not self.is_comparing and name not in self.reasons:
                self.is_comparing = True
                try:
                    run = functools.partial(_run_aside, module, given=(args, kwargs))
                    reason = _reason(run, original, functools.partial(generated, module), is_exact)
                    self.reasons.update({name: f"on the example its generated forward {reason}"} if reason else {})
                finally:
                    self.is_comparing = False
            return original(*args, **kwargs)

        return forward


class _Outcome(NamedTuple):
    """A forward's result, and its inputs afterwards."""

    result: object
    inputs: tuple[Args, dict[str, object]]


def _reason(run: Callable[[Forward], _Outcome], original: Forward, generated: Forward, is_exact: bool) -> str:
    expected = run(original)
    try:
        found = run(generated)
    except Exception as error:
        return f"fails: {summary(error)}"
    reason = next(_differences(expected, found, is_exact), "")
    # Code whose runs differ (atomic additions on a GPU) cannot be compared with.
    is_known = reason and not any(_differences(expected, run(original), is_exact))
    return f"differs: {reason}" if is_known else ""


def _run_aside(module: nn.Module, forward: Forward, given: tuple[Args, dict[str, object]]) -> _Outcome:
    """Return a forward's result and its inputs afterwards, with module and random states left as they were."""
    args, kwargs = _copied(given)
    with unchanged(module) as memory, contents_unchanged(memory):
        return _Outcome(forward(*args, **kwargs), (args, kwargs))


def _differences(expected: _Outcome, found: _Outcome, is_exact: bool) -> Iterator[str]:
    yield from differences(expected.result, found.result, "its output", is_exact)
    yield from differences(expected.inputs, found.inputs, "the content of its inputs after the call", is_exact)


def _copied(value: T) -> T:
    """Copy all tensors and containers; a tensor that is given twice stays one."""
    leaves = pytree.tree_leaves(value)
    memo: dict[int, object] = {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)}
    return copy.deepcopy(value, memo | {id(leaf): leaf for leaf in leaves if isinstance(leaf, nn.Module)})


def differences(
    expected: object, found: object, name: str, is_exact: bool = True, seen: frozenset[int] = frozenset()
) -> Iterator[str]:
    """Yield how two results differ: in structure, in any bit (`is_exact`), or by more than rounding."""
    if type(expected) is not type(found):
        yield f"{name} is of class {type(found).__name__}, not {type(expected).__name__}"
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        yield from _tensor_differences(expected, found, name, is_exact)
    elif isinstance(expected, Mapping) and isinstance(found, Mapping) and list(expected) != list(found):
        yield f"{name} has other keys"
    elif isinstance(expected, tuple | list) and isinstance(found, tuple | list) and len(expected) != len(found):
        yield f"{name} has {len(found)} items, not {len(expected)}"
    elif isinstance(expected, bool | int | float | str | bytes | None) and expected != found:
        yield f"{name} is {found!r}, not {expected!r}"
    elif id(expected) not in seen:
        others = dict(_parts(found))
        for key, part in _parts(expected):
            yield from differences(part, others.get(key), f"{name}[{key!r}]", is_exact, seen | {id(expected)})


def _parts(value: object) -> Iterator[tuple[object, object]]:
    """Yield the items of a container or the attributes of a plain object."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif not isinstance(value, nn.Module | type) and not callable(value):
        yield from getattr(value, "__dict__", {}).items()


def _tensor_differences(expected: Tensor, found: Tensor, name: str, is_exact: bool) -> Iterator[str]:
    if (expected.dtype, expected.shape, expected.device) != (found.dtype, found.shape, found.device):
        yield f"{name} is {_kind(found)}, not {_kind(expected)}"
    elif expected.device.type != "meta" and not _is_equal(expected, found, is_exact):
        yield f"{name} has other values"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _is_equal(expected: Tensor, found: Tensor, is_exact: bool) -> bool:
    if expected.layout is not torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    is_same = (expected == found) | ((expected != expected) & (found != found))
    if not is_exact and expected.is_floating_point() and expected.numel():
        largest = expected.abs().nan_to_num(0, 0).max()
        is_same |= (expected - found).abs() <= torch.finfo(expected.dtype).eps ** 0.5 * largest
    return bool(is_same.all())
