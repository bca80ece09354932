"""Weights that code multiplies by outside of their layer, or of forward: one weight for all, or a warning."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nmcompile
from nmcompile import CompileConfig

Code = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three layers and a projection; `forward` is one of them, `encode` is beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.proj = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.b(self.a(x)))
        return result

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.b.weight)


class Clip(Net):
    """Forward calls the method, and runs from a graph."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.encode(x))
        return result

    def encode(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) @ self.proj
        return result


class PythonClip(Clip):
    """Forward stays Python."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError
        return super().forward(x)


class Cast(Net):
    """A cast to the type that the weight has; forward reads the projection by a graph."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.a(x) @ self.proj)
        return result

    def encode(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) @ self.proj.to(x.dtype)
        return result


def hidden(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight) if x.dim() == 2 else x


class Helper(Net):
    def encode(self, x: Tensor) -> Tensor:
        return hidden(self.b, self.a(x))


class OfAParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Net(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result

    def encode(self, x: Tensor) -> Tensor:
        result: Tensor = self.body.a(x) @ self.body.b.weight.T
        return result


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.c = nn.Parameter(torch.randn(3, 16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.stack([F.linear(x, w) for w in self.w]).sum(0))
        return result

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[1])


class CalledAndRead(Net):
    """The layer is called, and a helper reads its weight."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.b(x) + hidden(self.b, self.a(x)))
        return result


ALIKE = (Net, Clip, PythonClip, Cast, Helper, OfAParent, Stack)


def compiled(
    model: nn.Module,
    mode: str = "t-weights",
    args: tuple[Tensor, ...] | None = None,
    layers: dict[str, None] | None = None,
) -> Any:
    return nmcompile.compile(model, mode, args=args, config=CompileConfig(ends="sparse", layers=layers or {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, method: str, x: Tensor) -> list[Tensor]:
    """Return the output of a method, and the gradients of all parameters and of the input."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = getattr(model, method)(x)
    output.sin().sum().backward()
    return [output.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("with_args", [False, True])
@pytest.mark.parametrize("make", ALIKE)
def test_methods_multiply_by_the_weights_that_forward_does(
    make: Callable[[], nn.Module], with_args: bool, x: Tensor
) -> None:
    plain = make()
    model = compiled(make(), args=(x,) if with_args else None)
    final = nmcompile.finalize(model)
    assert type(final) is make and nmcompile.verify(final).ok
    for method in ("encode", "forward"):
        for found, expected in zip(results(model, method, x), results(final, method, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), plain(x)) and torch.equal(nmcompile.decompile(model)(x), plain(x))


def test_products_of_methods_have_pruned_gradients(x: Tensor) -> None:
    model = compiled(Clip(), "gradients")
    report = nmcompile.verify(model, step=lambda: results(model, "encode", x))
    assert report.ok and {check.name for check in report.checks} == {"a (update)", "proj (update)"}


def test_a_model_with_such_methods_is_copied_pickled_and_compiled_by_torch(x: Tensor) -> None:
    model = compiled(Clip())
    expected = model.encode(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.encode(x), expected) and type(copied).encode.__doc__ == Clip.encode.__doc__
    torch.testing.assert_close(torch.compile(model.encode, backend="eager", fullgraph=True)(x), expected)
    again = compiled(model)
    assert torch.equal(again.encode(x), expected)


def gram(net: Net, x: Tensor) -> Tensor:
    return x @ (net.b.weight @ net.b.weight.T)


def other_axis(net: Net, x: Tensor) -> Tensor:
    return x @ net.b.weight


def derived(net: Net, x: Tensor) -> Tensor:
    return x @ (net.b.weight * 2).T


def half(net: Net, x: Tensor) -> Tensor:
    return F.linear(x.half(), net.b.weight.half())


def recomputed(net: Net, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(lambda y: F.linear(y, net.b.weight), x, use_reentrant=False)
    return result


@pytest.mark.parametrize("code", [gram, other_axis, derived, half, recomputed])
def test_a_method_that_sees_the_dense_weight_warns(code: Code, x: Tensor) -> None:
    class Reads(Net):
        def encode(self, x: Tensor) -> Tensor:
            return code(self, x)

    model = compiled(Reads())
    model(x)
    with pytest.warns(UserWarning, match=r"Reads.encode reads the weight of layer 'b' .*layers=\{'b': None\}"):
        found = model.encode(x)
    assert torch.equal(found, Reads().encode(x))
    left = compiled(Reads(), layers={"b": None})
    assert torch.equal(left.encode(x), found)  # and warns of nothing


def test_optimizers_copies_and_writes_in_a_method_are_no_reads(x: Tensor) -> None:
    class Fits(Net):
        def fit(self, x: Tensor) -> Tensor:
            sgd = torch.optim.SGD(self.parameters(), lr=1e-3, weight_decay=0.1)
            adam = torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=True)
            for optimizer in (sgd, adam):
                (self(x) + F.linear(x, self.b.weight)).sum().backward()
                optimizer.step()
            copy.deepcopy(self)
            self.b.weight.data.mul_(0.5)
            assert self.b.weight.shape == x.to(self.b.weight).new_zeros(16, 16).shape
            return F.linear(x, self.b.weight)

    model = compiled(Fits())
    found = model.fit(x)
    torch.testing.assert_close(F.linear(x, nmcompile.finalize(model).get_parameter("b.weight")), found)


def test_a_layer_that_is_called_and_read_needs_an_example(x: Tensor, tmp_path: Path) -> None:
    shown = compiled(CalledAndRead(), args=(x,)).eval()
    torch.testing.assert_close(nmcompile.finalize(shown)(x), shown(x))
    nmcompile.export(shown, tmp_path / "model.onnx", (x,))  # verified against ONNX Runtime
    model = compiled(CalledAndRead()).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    assert {str(one.message).partition(" (")[0] for one in caught} == {
        "CalledAndRead.forward reads the weight of layer 'b'"
    }


def test_files_hold_a_layer_that_is_called_and_whose_weight_is_another_layer(x: Tensor, tmp_path: Path) -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.c(self.b(x) + F.linear(self.a(x), self.b.weight))
            return result

    config = CompileConfig(ends="sparse")
    model = nmcompile.compile(Both(), "inference", args=(x,), calibration=[x], config=config).eval()
    report = nmcompile.export(model, tmp_path / "model.onnx", (x,))  # verified against ONNX Runtime
    assert {node.layer for node in report.onnx.nodes} == {"a", "b", "b.weight", "c"}


def test_a_layer_whose_weight_is_cast_is_dense_beside_its_calls(x: Tensor) -> None:
    class Casts(Net):
        def forward(self, x: Tensor) -> Tensor:
            if bool(x.isnan().any()):
                raise ValueError
            result: Tensor = self.c(self.b(x) + F.linear(self.a(x), self.b.weight.to(x.dtype)))
            return result

    model = compiled(Casts(), args=(x,))
    (reason,) = nmcompile.inspect(model).layer("b").reasons
    assert reason == "bypassed: code outside of it reads its weight (to)"
    torch.testing.assert_close(nmcompile.finalize(model)(x), model(x))


def test_a_branch_that_reads_a_routed_weight_along_its_other_axis_is_dense(x: Tensor) -> None:
    class Branches(Net):
        def forward(self, x: Tensor, turned: bool = False) -> Tensor:
            if bool(x.isnan().any()):
                raise ValueError
            result: Tensor = self.c(x @ self.proj if turned else F.linear(x, self.proj))
            return result

    model = compiled(Branches(), args=(x,))
    torch.testing.assert_close(nmcompile.finalize(model)(x), model(x))
    with pytest.warns(UserWarning, match="reads the weight of layer 'proj'"):
        found = model(x, turned=True)
    torch.testing.assert_close(found, model.c(x @ model.proj))


def test_methods_without_products_change_no_class(x: Tensor) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x))
            return result

        def width(self) -> int:
            return self.a.weight.shape[0]

        def penalty(self) -> Tensor:
            return self.a.weight.square().sum()

    model = compiled(Plain())
    assert type(model) is Plain
