"""Products with a parameter: linear layers among them become layers, the others are listed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmcompile
from nmcompile import CompileConfig, NMPattern
from nmcompile.capture import capture_model
from nmcompile.ir.layers import LinearLayer

Code = Callable[["Product", Tensor], Tensor]


class Product(nn.Module):
    """Code between two linear layers, with weights stored both ways, a bias, and one matrix for each sample."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.out_in, self.in_out = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8, 12))
        self.bias, self.stack = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def network(code: Code) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), Product(code), nn.Linear(12, 4))


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


LAYERS: dict[str, tuple[Code, bool]] = {
    "x @ W.T + b": (lambda m, x: x @ m.out_in.T + m.bias, False),
    "x @ W.mT": (lambda m, x: x @ m.out_in.mT, False),
    "matmul(x, W.t())": (lambda m, x: torch.matmul(x, m.out_in.t()), False),
    "x.matmul(W.transpose)": (lambda m, x: x.matmul(other=m.out_in.transpose(-2, -1)), False),
    "mm(x, W.permute)": (lambda m, x: torch.mm(flat(x), mat2=m.out_in.permute(1, 0)), False),
    "addmm(b, x, W.t())": (lambda m, x: torch.addmm(m.bias, flat(x), m.out_in.t()), False),
    "inner(x, W)": (lambda m, x: torch.inner(x, m.out_in), False),
    "einsum out, in": (lambda m, x: torch.einsum("...i,oi->...o", x, m.out_in), False),
    "x @ W": (lambda m, x: x @ m.in_out, True),
    "linalg.matmul": (lambda m, x: torch.linalg.matmul(x, m.in_out), True),
    "x.mm(W)": (lambda m, x: flat(x).mm(m.in_out), True),
    "b.addmm(x, W)": (lambda m, x: m.bias.addmm(flat(x), m.in_out), True),
    "einsum in, out": (lambda m, x: torch.einsum("io,bti->bto", m.in_out, x), True),
}  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 4)


@pytest.mark.parametrize("form", LAYERS)
def test_a_product_that_is_a_linear_layer_is_a_layer(form: str, x: Tensor) -> None:
    code, is_in_out = LAYERS[form]
    model = network(code)
    name = "1.in_out" if is_in_out else "1.out_in"
    for args in (None, (x,)):
        captured = capture_model(model, args)
        assert [site.weight for site in captured.sites] == ["0.weight", name, "2.weight"]
        layer = captured.sites[1].layer
        assert layer == LinearLayer(name, (8, 12) if is_in_out else (12, 8), "addmm" in form, transposed=is_in_out)
        assert not captured.python
        assert captured.whole is not None
        assert sorted(captured.whole.layers.values()) == [("0",), (name,), ("2",)]
        assert [captured.facts[one].first for one in ("0", name, "2")] == [True, False, False]
    assert captured.facts[name].positions == 15


@pytest.mark.parametrize("form", LAYERS)
def test_a_dense_product_equals_eager_bit_for_bit(form: str, x: Tensor) -> None:
    """All run the GEMM of `F.linear`; gradients of `einsum` are batched GEMMs, which sum in another order."""
    model = network(LAYERS[form][0])
    compiled = nmcompile.compile(model, "dense", backend="reference")
    gradients = []
    for one in (model, compiled):
        one.zero_grad()
        one(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert torch.equal(compiled(x), model(x))
    assert "1" in {name for name, module in compiled.named_modules() if hasattr(module, "three_gemms")}
    tolerance = None if "einsum" in form else 0.0
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", ["x @ W.T + b", "x @ W", "einsum in, out"])
def test_a_product_is_masked_along_its_in_features(form: str, x: Tensor) -> None:
    code, is_in_out = LAYERS[form]
    model = network(code)
    compiled = nmcompile.compile(model, "weights")
    weight = model[1].get_parameter("in_out" if is_in_out else "out_in")
    before = weight.detach().clone()
    with torch.no_grad():
        blocks = weight.movedim(0 if is_in_out else 1, -1).unflatten(-1, (-1, 4))
        ranks = blocks.abs().argsort(-1, descending=True).argsort(-1)
        weight.copy_(torch.where(ranks < 2, blocks, 0).flatten(-2).movedim(-1, 0 if is_in_out else 1))
    expected = model(x)
    with torch.no_grad():
        weight.copy_(before)
    torch.testing.assert_close(compiled(x), expected)
    plain = nmcompile.finalize(compiled)
    assert torch.equal(plain(x), compiled(x))
    assert nmcompile.verify(plain).ok


LISTED: dict[str, tuple[Code, str, str]] = {
    "expanded bmm": (lambda m, x: torch.bmm(x, m.in_out.expand(x.size(0), -1, -1)), "in_out", "bmm"),
    "bmm": (lambda m, x: torch.bmm(x, m.stack), "stack", "bmm"),
    "matmul": (lambda m, x: x @ m.stack, "stack", "3 dims"),
    "baddbmm": (lambda m, x: torch.baddbmm(m.bias, x, m.stack), "stack", "baddbmm"),
    "indexed": (lambda m, x: x @ m.stack[x.argmax(-1)[:, 0] % 3], "stack", "one matrix for all inputs"),
    "left": (lambda m, x: (m.out_in @ x.mT).mT, "out_in", "left operand"),
    "einsum": (lambda m, x: torch.einsum("bti,bio->bto", x, m.stack), "stack", "einsum 'bti,bio->bto'"),
    "gated": (lambda m, x: F.linear(x, m.out_in * x.mean()), "out_in", "depends on the input"),
    "no bias": (lambda m, x: torch.addmm(flat(x)[:, :1], flat(x), m.in_out), "in_out", "not a bias"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.in_out, 1), "in_out", "tensordot"),
    "groups": (lambda m, x: F.conv_transpose1d(x.mT, m.stack.permute(1, 2, 0), groups=2).mT, "stack", "several groups"),
}  # fmt: skip


@pytest.mark.parametrize("form", LISTED)
def test_other_products_are_listed_with_their_parameters(form: str, x: Tensor) -> None:
    code, parameter, words = LISTED[form]
    captured = capture_model(network(code))
    assert [site.weight for site in captured.sites] == ["0.weight", "2.weight"]
    assert words in captured.python["1"]
    assert captured.uncaptured == {"1": (f"1.{parameter}",)}


def test_a_product_that_is_not_a_layer_stands_before_what_reads_it() -> None:
    model = nn.Sequential(Product(lambda m, x: torch.bmm(x, m.stack)), nn.Linear(12, 12), nn.Linear(12, 4))
    for args in (None, (torch.randn(3, 5, 8),)):
        assert not capture_model(model, args).facts["1"].first


def test_products_of_activations_and_of_constants_are_no_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.a, self.b = nn.Linear(4, 4), nn.Parameter(torch.eye(4)), nn.Parameter(torch.eye(4))
            self.register_buffer("basis", torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            scores = (self.fc(x) @ x.transpose(-1, -2)) @ x
            return F.linear(scores @ self.basis, self.a @ self.b)

    captured = capture_model(Attention())
    assert [(site.layer.name, site.is_expression) for site in captured.sites] == [("linear", True), ("fc", False)]
    assert not captured.python


def test_what_a_product_adds_is_not_multiplied() -> None:
    def code(m: Product, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, m.in_out[:5, :5])
        return F.pad(torch.baddbmm(m.in_out[:5, :5], x, y.mT), (0, 7))

    captured = capture_model(network(code))
    assert len(captured.sites) == 2
    assert not captured.uncaptured


@pytest.mark.parametrize("kind", [fx.symbolic_trace, lambda model: torch.export.export(model, (torch.ones(3, 5, 4),))])
@pytest.mark.parametrize("form", ["x @ W.T + b", "addmm(b, x, W.t())", "einsum in, out"])
def test_graphs_with_products_are_rewritten_node_by_node(kind: Callable[..., Any], form: str, x: Tensor) -> None:
    code, is_in_out = LAYERS[form]
    model = network(code)
    before = str(graph.code) if isinstance(graph := kind(model), fx.GraphModule) else ""
    compiled = nmcompile.compile(graph, "weights", config=CompileConfig(ends="sparse"))
    name = "1.in_out" if is_in_out else "1.out_in"
    report = nmcompile.inspect(compiled)
    assert report.layer(name).layer.parameters == 96
    expected = nmcompile.compile(model, "weights", config=CompileConfig(ends="sparse"))
    torch.testing.assert_close(compiled(x), expected(x))
    assert not before or graph.code == before


class Falcon(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_a_product_with_a_parametrized_weight_is_finalized(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.utils.parametrizations.weight_norm(Falcon(8, 8)), nn.Linear(8, 2)).eval()
    compiled = nmcompile.compile(model, "weights")
    assert nmcompile.inspect(compiled).program.site("1").weight == "1.weight"
    y, plain = compiled(x), nmcompile.finalize(compiled)
    torch.testing.assert_close(plain(x), y, rtol=0, atol=0)
    assert nmcompile.verify(plain).ok


def test_a_weight_that_the_trace_does_not_show_is_listed() -> None:
    """`self.weight.T` of a weight that a hook has set is computed while tracing."""
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(Falcon(8, 8))
    captured = capture_model(nn.Sequential(nn.Linear(4, 8), hooked, nn.Linear(8, 2)))
    assert captured.python == {"1": "it computes a tensor constant while tracing"}
    assert captured.uncaptured == {"1": ("1.weight_v",)}


def test_a_functional_call_with_a_hooked_weight_is_a_computed_layer(x: Tensor) -> None:
    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(Functional(8, 8))
    compiled = nmcompile.compile(nn.Sequential(nn.Linear(4, 8), hooked, nn.Linear(8, 2)), "weights")
    site = nmcompile.inspect(compiled).program.site("1")
    assert (site.weight, site.is_expression) == ("1.weight", True)
    y = compiled(x)
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), y)


class Autoencoder(nn.Module):
    """One weight, multiplied along both of its axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.weight = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.stem(x), self.weight).relu()
        return self.head(hidden @ self.weight)


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training", "inference"])
def test_a_weight_read_along_both_axes_needs_a_transposable_mask(mode: str, x: Tensor) -> None:
    model = Autoencoder()
    compiled = nmcompile.compile(model, mode, calibration=[(x,)] if mode == "inference" else None)
    y, report = compiled(x), nmcompile.inspect(compiled)
    is_transposable = mode in ("t-weights", "training")
    for name, other in (("weight", "weight.1"), ("weight.1", "weight")):
        assert report.layer(name).status == ("sparse" if is_transposable else "dense")
        assert is_transposable or f"along its other axis by the layer {other!r}" in report.layer(name).reasons[0]
    plain = nmcompile.finalize(compiled)
    assert torch.equal(plain(x), y)
    pattern = NMPattern(2, 4)
    for dim in (0, 1):
        kept = plain.get_parameter("weight").movedim(dim, -1).unflatten(-1, (-1, pattern.block)).count_nonzero(-1)
        assert is_transposable == bool((kept <= pattern.n_keep).all())


def test_a_weight_read_along_both_axes_is_refused_where_it_is_named() -> None:
    asked = CompileConfig(layers={"weight": nmcompile.presets["weights"]})
    with pytest.raises(nmcompile.NMCompileError, match="along its other axis"):
        nmcompile.compile(Autoencoder(), "dense", config=asked)


def test_percentages_are_of_the_whole_model(x: Tensor) -> None:
    """70 % of the elements that GEMMs read are in one product that stays Python."""
    report = nmcompile.analyze(network(LISTED["bmm"][0]), config=CompileConfig(ends="sparse"))
    totals, model = report.summary, 4 * 8 + 8 + 12 * 4 + 4 + 2 * 96 + 12 + 3 * 96
    assert (totals["model_parameters"], totals["uncaptured_parameters"]) == (model, 3 * 96)
    assert (totals["parameters"], totals["sparse_parameters"]) == (4 * 8 + 12 * 4 + 3 * 96, 4 * 8 + 12 * 4)
    share = f"{80 / model:.1%} of the model's 0.001 M"
    line = "stays Python: 1: bmm on stack (bmm): it is not a linear layer [1.stack 3×8×12]"
    for text in (report.full(), report.to_markdown()):
        assert share in text
        assert line in text
    assert '"1.stack": [' in report.to_json()


def test_parameters_count_once_however_many_layers_read_them() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.shared = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(F.linear(x, self.up[0]), self.up[1])
            return F.linear(F.linear(x, self.shared), self.shared)

    report = nmcompile.analyze(Experts(), "weights", config=CompileConfig(ends="sparse"))
    assert len(report.layers) == 4
    assert report.summary["sparse_parameters"] == report.summary["parameters"] == 2 * 64 + 64
    assert report.summary["model_parameters"] == 3 * 64 + 64


def test_recurrent_and_transposed_layers_are_in_the_totals() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=2), nn.Conv1d(8, 8, 1), nn.GRU(8, 4), nn.Bilinear(2, 3, 4))
    report = nmcompile.analyze(model, config=CompileConfig(ends="sparse"))
    outside = 4 * 4 * 3 + 4 * 2 * 3
    assert (report.summary["uncaptured_parameters"], report.summary["sparse_parameters"]) == (outside, 64)
    assert report.summary["parameters"] == 64 + 12 * (8 + 4) + outside
    assert "skipped: 0: grouped transposed convolution" in report.full() and "recurrent layer" in report.full()


def test_weights_of_experts_are_in_the_totals() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4,
    )  # fmt: skip
    report = nmcompile.analyze(MixtralForCausalLM(config))
    experts = 4 * 3 * 16 * 24
    assert report.summary["uncaptured_parameters"] == experts
    assert "model.layers.0.mlp.experts" in report.program.captured.python
    assert report.summary["parameters"] == experts + 4 * 16 * 16 + 4 * 16 + 32 * 16


def test_falcons_linear_is_a_layer() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, ids = FalconForCausalLM(config).eval(), torch.randint(0, 32, (2, 6))
    compiled = nmcompile.compile(model, "training", config=CompileConfig(ends="sparse"))
    logits, report = compiled(ids).logits, nmcompile.inspect(compiled)
    names = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    assert {layer.name for layer in report.layers if layer.status == "sparse"} == {
        f"transformer.h.0.{name}" for name in names
    }
    assert torch.equal(nmcompile.finalize(compiled)(ids).logits, logits)
