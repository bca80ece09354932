"""Functional conv and linear calls: which are sites, their names, and which layers are bypassed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nmcompile.capture import capture_model
from nmcompile.ir.layers import ConvLayer, LinearLayer


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 4)


class Functional(nn.Module):
    """Two functional linears, positionally and by keyword, and one conv."""

    def __init__(self) -> None:
        super().__init__()
        self.w0, self.w1, self.b1, self.k = parameter(8, 4), parameter(12, 8), parameter(12), parameter(6, 2, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = F.linear(x, self.w0).relu() * scale
        y = F.linear(input=hidden, bias=self.b1, weight=self.w1)
        return F.conv1d(y.unflatten(-1, (4, 3)), self.k, None, 1, "same", groups=2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Functional(), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = parameter(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w).relu(), self.w)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean(dim=(1, 2, 3), keepdim=True)) / w.std(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.conv = StandardizedConv(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(4, 6), parameter(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Expressions(nn.Module):
    """A permuted weight, a scaled one of two parameters, a filter that is a buffer, and attention's matmul."""

    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.s = parameter(4, 8), parameter(4, 8), parameter(4, 1)
        self.register_buffer("blur", torch.ones(4, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.p.permute(1, 0)), self.q * self.s)
        y = F.conv1d(y.unsqueeze(-1), self.blur, padding=1, groups=4).squeeze(-1)
        return F.linear(y, y)


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


class MultipliesChild(ReadsChild):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t()


class ReadsDtype(ReadsChild):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


def with_layer(module: nn.Module) -> nn.Module:
    """Return a model in which `module` is not the only thing to compile."""
    model = nn.Module()
    model.part, model.head = module, nn.Linear(4, 2)
    return model


def run_trace(module: nn.Module, graph: fx.Graph, *args: Tensor) -> Tensor:
    return fx.GraphModule(module, graph)(*args)


def test_functional_calls_are_sites_named_by_their_weight() -> None:
    model = Block()
    captured = capture_model(model)
    sites = {site.layer.name: site for site in captured.sites}
    assert list(sites) == ["inner.w0", "inner.w1", "inner.k", "fc"]
    assert sites["inner.w0"].layer == LinearLayer("inner.w0", (8, 4), False)
    assert sites["inner.w1"].layer == LinearLayer("inner.w1", (12, 8), True)
    conv = sites["inner.k"].layer
    assert isinstance(conv, ConvLayer)
    assert (conv.padding, conv.groups, conv.weight_shape) == ((1,), 2, (6, 2, 3))
    assert [site.module for site in captured.sites] == ["inner", "inner", "inner", "fc"]
    assert sites["inner.w1"].weight == "inner.w1"
    assert list(captured.traces) == ["inner"]
    assert not captured.python


def test_trace_runs_as_forward_does_defaults_included() -> None:
    model = Functional()
    captured = capture_model(model)
    x = torch.randn(5, 4)
    assert torch.equal(run_trace(model, captured.traces[""], x), model(x))
    named = {node.name for node in captured.traces[""].nodes}
    assert {site.role for site in captured.sites} <= named


def test_weight_used_twice_gives_two_sites_that_share_it() -> None:
    captured = capture_model(Reused())
    assert [(s.layer.name, s.weight) for s in captured.sites] == [("w", "w"), ("w.1", "w")]
    assert captured.whole is not None
    assert sorted(captured.whole.layers.values()) == [("w",), ("w.1",)]
    assert captured.facts["w.1"].nonnegative
    assert not captured.facts["w"].nonnegative
    assert captured.facts["w"].first
    assert captured.facts["w.1"].last


def test_conv_subclass_with_a_computed_weight_keeps_its_name() -> None:
    captured = capture_model(Stem(), (torch.randn(1, 3, 8, 8),))
    (site,) = captured.sites
    assert (site.layer.name, site.weight, site.is_expression) == ("stem.conv", "stem.conv.weight", True)
    assert site.layer.weight_shape == (8, 3, 3, 3)
    assert captured.facts["stem.conv"].first
    assert captured.facts["stem.conv"].positions == 64


def test_addmm_weight_is_stored_in_out() -> None:
    (site,) = capture_model(Addmm(), (torch.randn(2, 4),)).sites
    assert site.layer == LinearLayer("weight", (4, 6), True, transposed=True)


def test_scaled_addmm_stays_python() -> None:
    class Scaled(Addmm):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, alpha=2)

    captured = capture_model(with_layer(Scaled()))
    assert "scales its product" in captured.python["part"]
    assert "torch.addmm" in captured.python["part"]


@pytest.mark.parametrize("args", [None, (torch.randn(2, 4),)], ids=["fx", "export"])
def test_expressions_of_parameters_are_weights_and_activations_are_not(args: tuple[Tensor] | None) -> None:
    captured = capture_model(Expressions(), args)
    first, second = captured.sites
    assert (first.layer.name, first.weight, first.layer.weight_shape) == ("linear", "linear", (8, 4))
    assert (second.layer.name, second.weight, second.layer.weight_shape) == ("linear_1", "linear_1", (4, 8))
    assert first.is_expression
    assert second.is_expression
    assert captured.whole is not None
    assert sorted(captured.whole.layers.values()) == [("linear",), ("linear_1",)]
    assert captured.python == {"": "F.conv1d (conv1d): its weight is neither a parameter nor computed from one"}


def test_linear_on_a_childs_weight_is_a_site_and_the_child_is_bypassed() -> None:
    captured = capture_model(ReadsChild())
    assert [site.layer.name for site in captured.sites] == ["fc.weight", "fc"]
    assert captured.bypassed == {"fc": "its weight is read by ReadsChild.forward, where it is the layer 'fc.weight'"}


def test_reading_a_childs_weight_bypasses_it_and_reading_its_dtype_does_not() -> None:
    assert list(capture_model(nn.Sequential(MultipliesChild())).bypassed) == ["0.fc"]
    instead = "where it is the layer 'fc.weight'"
    assert capture_model(MultipliesChild()).bypassed == {
        "fc": f"its weight is read by MultipliesChild.forward, {instead}"
    }
    assert not capture_model(ReadsDtype()).bypassed


def test_graph_module_is_its_own_trace() -> None:
    model = fx.symbolic_trace(Block())
    captured = capture_model(model)
    assert [site.layer.name for site in captured.sites] == ["inner.w0", "inner.w1", "inner.k", "fc"]
    x = torch.randn(5, 4)
    assert torch.equal(run_trace(model, captured.traces[""], x), model(x))


def test_nested_graph_module_and_exported_program() -> None:
    x = torch.randn(5, 4)
    nested = nn.Sequential(fx.symbolic_trace(Functional()), nn.Linear(3, 3))
    assert [s.layer.name for s in capture_model(nested, (x,)).sites] == ["0.w0", "0.w1", "0.k", "1"]
    model = torch.export.export(Block(), (x,)).module()
    captured = capture_model(model)
    assert [s.layer.name for s in captured.sites] == ["inner.w0", "inner.w1", "inner.k", "fc.weight"]
    assert captured.whole is not None
    assert captured.facts["fc.weight"].last
    assert torch.equal(run_trace(model, captured.traces[""], x), model(x))


def test_conv_subclass_as_the_whole_model() -> None:
    (site,) = capture_model(StandardizedConv(4, 8, 3), (torch.randn(1, 4, 8, 8),)).sites
    assert site.weight == "weight"
