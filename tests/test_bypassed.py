"""Layers whose weight other code reads instead of calling them: they are never masked and never zeroed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import CalibrationError

ALL = CompileConfig(ends="sparse")


class Attention(nn.MultiheadAttention):
    """A class with its own forward; torch's forward reads `out_proj.weight`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return result


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)


class BehindAFlag(Base):
    """A read that no trace reaches."""

    def forward(self, x: Tensor, scaled: bool = True) -> Tensor:
        if scaled:
            x = x * 1.0
        return self.c(F.linear(self.a(x).relu(), self.b.weight, self.b.bias))


class InAMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self._twice(x)) if x.dim() == 2 else x

    def _twice(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.b.weight.T


class InAnInnerFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError
        return self.c(torch.stack([F.linear(self.a(y)[None], self.b.weight)[0] for y in x]))


def helper(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight) if x.dim() == 2 else x


class ThroughAHelper(Base):
    """A helper that hides which layer's weight is read: only a run shows that `b` is not called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(helper(self.b, self.a(x)))


class ByAnIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.c = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer.weight, Tensor)
            x = F.linear(x, layer.weight) if x.dim() == 2 else x
        return self.c(x)


class OtherBranch(Base):
    """A branch for quantized models that calls the layer, and one that reads its weight (Jamba's code)."""

    def __init__(self, is_quantized: bool = False) -> None:
        super().__init__()
        self.is_quantized = is_quantized

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError
        return self.c(self.b(x) if self.is_quantized else F.linear(x, self.b.weight, self.b.bias))


class CalledAndRead(Base):
    """A layer that is masked when called and dense when read: no one weight can hold both."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)) + self.b.weight.sum())


class ReadsMetadata(Base):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.b.weight, Tensor) and x.dim() == 2:
            x = x.to(self.b.weight.dtype).type_as(self.a.weight) + self.c.weight.new_zeros(1)
        return self.c(self.b(self.a(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "attention": (lambda: nn.Sequential(Attention(16, 2, batch_first=True), nn.Linear(16, 16)), {"0.out_proj"}),
    "flag": (BehindAFlag, {"b"}),
    "method": (InAMethod, {"b"}),
    "inner function": (InAnInnerFunction, {"b"}),
    "called and read": (CalledAndRead, {"b"}),
}
ROUTED = {"attention", "flag", "method", "inner function", "helper", "index", "other branch"}
"""The models whose code only multiplies by the weights, which a run of an example shows: there they are layers."""
RUN_SHOWS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "helper": (ThroughAHelper, {"b"}),
    "index": (ByAnIndex, {"layers.0", "layers.1"}),
    "other branch": (OtherBranch, {"a", "b"}),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def bypassed(model: nn.Module) -> set[str]:
    report = nmcompile.inspect(model)
    return {layer.name for layer in report.layers if any(reason.startswith("bypassed") for reason in layer.reasons)}


def is_whole(model: nn.Module, layer: str) -> bool:
    """Return whether no element of a layer's weight is zero."""
    return bool(model.get_parameter(f"{layer}.weight").all())


@pytest.mark.parametrize("with_args", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_never_runs_masked_is_dense_everywhere(name: str, with_args: bool, x: Tensor) -> None:
    make, read = MODELS[name]
    with_example = set() if name in ROUTED else read
    expected = with_example if with_args else read
    x = x[None] if name == "attention" else x
    model = nmcompile.compile(make(), "t-weights", args=(x,) if with_args else None, config=ALL).eval()
    assert bypassed(model) == expected
    masked = {key.removesuffix(".weight.mask") for key in nmcompile.sparse_state_dict(model) if key.endswith(".mask")}
    assert masked and not masked & expected
    final = nmcompile.finalize(model)
    assert torch.equal(final(x), model(x)) and nmcompile.verify(final).ok and nmcompile.verify(model).ok
    assert all(is_whole(final, layer) for layer in expected)
    inference = nmcompile.compile(model, "inference", args=(x,), calibration=[x], config=ALL).eval()
    assert bypassed(inference) == with_example and bool(inference(x).isfinite().all())
    torch.testing.assert_close(nmcompile.finalize(inference)(x), inference(x), rtol=0, atol=1.0)


@pytest.mark.parametrize("name", RUN_SHOWS)
def test_a_run_shows_what_no_code_tells(name: str, x: Tensor) -> None:
    make, expected = RUN_SHOWS[name]
    model = nmcompile.compile(make(), "t-weights", config=ALL).eval()
    assert not bypassed(model)
    before = nmcompile.finalize(model)  # nothing else is known: as planned
    assert not all(is_whole(before, layer) for layer in expected)
    nmcompile.verify(model)
    output = model(x)
    read = expected - {"a"}
    with pytest.warns(UserWarning, match="left as they are.*without calling them"):
        final = nmcompile.finalize(model)
    assert torch.equal(final(x), output) and nmcompile.verify(final).ok
    assert all(is_whole(final, layer) for layer in read)
    assert not {check.name for check in nmcompile.verify(model).checks} & {f"{layer}.weight" for layer in read}
    again = nmcompile.compile(model, "t-weights", config=ALL).eval()
    assert bypassed(again) == read and torch.equal(again(x), output)
    with_args = nmcompile.compile(make(), "t-weights", args=(x,), config=ALL)
    assert not bypassed(with_args)
    assert torch.equal(nmcompile.finalize(with_args)(x), with_args(x)) and nmcompile.verify(with_args).ok


def test_a_layer_that_is_only_called_elsewhere_is_finalized_as_planned(x: Tensor) -> None:
    """An expert that no token reached: any later call finds it masked."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

        def forward(self, x: Tensor, chosen: int = 0) -> Tensor:
            result: Tensor = self.experts[chosen](x)
            return result

    model = nmcompile.compile(Experts(), "weights", config=ALL)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        final = nmcompile.finalize(model)
    assert torch.equal(final(x, 1), model(x, 1))
    assert not torch.equal(final(x, 1), nmcompile.decompile(model)(x, 1))


@pytest.mark.parametrize("with_args", [False, True])
def test_metadata_is_no_read(with_args: bool, x: Tensor) -> None:
    model = nmcompile.compile(ReadsMetadata(), "weights", args=(x,) if with_args else None, config=ALL)
    assert not bypassed(model)
    output = model(x)
    assert torch.equal(nmcompile.finalize(model)(x), output)


def test_the_branch_that_calls_is_masked(x: Tensor) -> None:
    model = nmcompile.compile(OtherBranch(is_quantized=True), "weights", args=(x,), config=ALL)
    assert not bypassed(model)
    assert torch.equal(nmcompile.finalize(model)(x), model(x))


class TwoHeads(nn.Module):
    """A model whose second head runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return (self.head(h), self.extra(h)) if self.training else self.head(h)


def test_calibration_leaves_dense_what_its_data_does_not_reach(x: Tensor) -> None:
    model = nmcompile.compile(TwoHeads(), "inference", calibration=[x], config=ALL).eval()
    assert nmcompile.inspect(model).layer("extra").reasons == (
        "bypassed: calibration ran the model without calling it",
    )
    assert bool(model(x).isfinite().all())
    uncalibrated = nmcompile.compile(TwoHeads(), "inference", config=ALL)
    with pytest.raises(CalibrationError, match=r"without calling 'extra'.*CompileConfig\(layers=\{'extra': None\}\)"):
        nmcompile.calibrate(uncalibrated, [x])


def test_a_mask_that_was_trained_stays_where_calibration_does_not_reach(x: Tensor) -> None:
    model = nmcompile.compile(TwoHeads(), "weights", config=ALL)
    trained = model(x)[1]
    deployed = nmcompile.compile(model, "inference", calibration=[x], config=ALL)
    plan = nmcompile.inspect(deployed).layer("extra").plan
    assert {row.operand for row in plan.rows if row.operand} == {"weight"}
    kept = [nmcompile.finalize(one).get_parameter("extra.weight") != 0 for one in (model, deployed)]
    assert torch.equal(*kept) and bool(trained.isfinite().all())


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "use_cache": False,
    "pad_token_id": 0,
}


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=4, bos_token_id=1, eos_token_id=2))


def jamba() -> nn.Module:
    shape: dict[str, Any] = {
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 2,
    }
    periods: dict[str, Any] = {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    return JambaForCausalLM(JambaConfig(**SMALL, **shape, **periods, mamba_d_state=4, mamba_dt_rank=4))


@pytest.mark.parametrize("with_args", [False, True])
@pytest.mark.parametrize("make", [mamba, jamba])
def test_state_space_models_read_the_weight_of_a_projection(make: Callable[[], nn.Module], with_args: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, 30, (2, 5))
    model = nmcompile.compile(make().eval(), "weights", args=(tokens,) if with_args else None, config=ALL).eval()
    with torch.no_grad():
        output = model(tokens).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if make is jamba and not with_args else "error")
            final = nmcompile.finalize(model)
        # matmul folds its operands by whether they require gradients, and a pruned weight does not.
        torch.testing.assert_close(final(tokens).logits, output, rtol=1e-6, atol=1e-7)
    (name,) = (name for name, _ in model.named_modules() if name.endswith("dt_proj"))
    is_pruned = with_args and make is jamba  # Mamba's has one in-feature
    assert is_whole(final, name) != is_pruned
    again = nmcompile.compile(model, "weights", config=ALL)
    assert (name in bypassed(again)) != with_args
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, output)  # what the example had shown is still known
