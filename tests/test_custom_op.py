"""A custom operator's fake takes the parameters that it names, however the operator is called."""

import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import nmcompile
from nmcompile.custom_op import custom_op, operator_of


@custom_op("nmcompile_tests::widened", fake=lambda size, x: x.new_empty(size, 2))
def widened(x: Tensor, factor: float, size: int = 3, offset: Tensor | None = None) -> Tensor:
    return (x.sum() * factor + (0.0 if offset is None else offset)).expand(size, 2).clone()


@custom_op("nmcompile_tests::double_into", mutates_args=("out",))
def double_into(x: Tensor, out: Tensor) -> None:
    out.copy_(2 * x)


def test_the_rules_of_custom_operators_are_kept() -> None:
    x = torch.randn(4)
    torch.library.opcheck(operator_of(widened), (x, 2.0))
    torch.library.opcheck(operator_of(widened), (x, 2.0, 5), {"offset": torch.ones(())})
    torch.library.opcheck(operator_of(double_into), (x, torch.empty(4)))


def test_every_operator_states_its_signature_once() -> None:
    package = Path(nmcompile.__file__).parent
    folders = package, package / "backends", package / "passes"  # links are not followed
    found = {path.name for folder in folders for path in folder.rglob("*.py") if "register_fake" in path.read_text()}
    assert found == {"custom_op.py"}


def test_the_operator_is_the_overload_of_that_name() -> None:
    assert operator_of(widened) is torch.ops.nmcompile_tests.widened.default


class Seen(TorchDispatchMode):
    """A mode that notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_modes_profilers_tracers_and_subclasses_see_the_operator() -> None:
    x, operator = torch.randn(4), torch.ops.nmcompile_tests.widened.default
    with Seen() as seen:
        widened(x, 2.0)
    assert seen.operators[0] is operator
    with torch.profiler.profile() as profile:
        widened(x, 2.0)
    assert "nmcompile_tests::widened" in {event.key for event in profile.key_averages()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(lambda x: widened(x, 2.0), (x,))
    assert "nmcompile_tests::widened" in str(traced.graph)
    assert operator in {node.target for node in make_fx(lambda x: widened(x, 2.0))(x).graph.nodes}
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert isinstance(widened(fake, 2.0), FakeTensor)
    assert isinstance(widened(x=fake, factor=2.0), FakeTensor)


@custom_op("nmcompile_tests::through_dispatcher", fake=lambda x: x.new_empty(()))
def through_dispatcher(x: Tensor) -> Tensor:
    """Return 1 if torch's wrapper of custom operators called this function, 0 if the caller did."""
    return torch.tensor(float(any("custom_ops.py" in frame.filename for frame in traceback.extract_stack())))


def test_other_calls_run_the_function() -> None:
    x = torch.ones(3)
    with torch.no_grad():
        assert float(through_dispatcher(x)) == 0
    with torch.inference_mode():
        assert float(through_dispatcher(x)) == 0
    assert float(through_dispatcher(x)) == 1  # autograd has to see it


def test_compiled_graphs_call_it() -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        double_into(x, out)
        return widened(out, 0.5, offset=x[0])

    x = torch.randn(4)
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(x).equal(run(x))
