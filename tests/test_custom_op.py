"""A custom operator's fake takes the parameters that it names, however the operator is called."""

from pathlib import Path

import torch
from torch import Tensor

import nmcompile
from nmcompile.custom_op import custom_op


@custom_op("nmcompile_tests::widened", fake=lambda size, x: x.new_empty(size, 2))
def widened(x: Tensor, factor: float, size: int = 3, offset: Tensor | None = None) -> Tensor:
    return (x.sum() * factor + (0.0 if offset is None else offset)).expand(size, 2).clone()


@custom_op("nmcompile_tests::double_into", mutates_args=("out",))
def double_into(x: Tensor, out: Tensor) -> None:
    out.copy_(2 * x)


def test_the_rules_of_custom_operators_are_kept() -> None:
    x = torch.randn(4)
    torch.library.opcheck(widened, (x, 2.0))
    torch.library.opcheck(widened, (x, 2.0, 5), {"offset": torch.ones(())})
    torch.library.opcheck(double_into, (x, torch.empty(4)))


def test_every_operator_states_its_signature_once() -> None:
    package = Path(nmcompile.__file__).parent
    folders = package, package / "backends", package / "passes"  # links are not followed
    found = {path.name for folder in folders for path in folder.rglob("*.py") if "register_fake" in path.read_text()}
    assert found == {"custom_op.py"}


def test_graphs_name_the_overload() -> None:
    assert widened is torch.ops.nmcompile_tests.widened.default


def test_compiled_graphs_call_it() -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        double_into(x, out)
        return widened(out, 0.5, offset=x[0])

    x = torch.randn(4)
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(x).equal(run(x))
