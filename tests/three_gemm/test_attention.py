"""Attention on three-GEMM projections, compared bit for bit with `nn.MultiheadAttention`."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.three_gemm.attention import ThreeGemmAttention

LENGTH, SOURCE, BATCH, WIDTH, HEADS = 5, 6, 2, 8, 2


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def results(module: nn.Module, tensors: tuple[Tensor, ...], **call: Any) -> list[Tensor | None]:
    """Return output, weights and every gradient, with dropout drawn from the same seed."""
    distinct = {id(tensor): tensor.clone().requires_grad_() for tensor in tensors}
    torch.manual_seed(3)
    output, weights = module(*(distinct[id(tensor)] for tensor in tensors), **call)
    loss = output.square().sum() + (0.0 if weights is None else weights.square().sum())
    return [output, weights, *torch.autograd.grad(loss, [*distinct.values(), *module.parameters()], allow_unused=True)]


def assert_bits(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for mine, eager in zip(got, expected, strict=True):
        assert (mine is None) == (eager is None)
        assert mine is None or eager is None or (mine.shape == eager.shape and torch.equal(mine, eager))


X = randn(LENGTH, BATCH, WIDTH)
MEMORY = randn(SOURCE, BATCH, WIDTH)
VALUES = randn(SOURCE, BATCH, WIDTH) * 2
INPUTS: dict[str, tuple[Tensor, ...]] = {
    "self": (X, X, X),
    "cross": (X, MEMORY, MEMORY),
    "apart": (X, MEMORY, VALUES),
    "query is key": (MEMORY, MEMORY, VALUES),
}
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
HIDDEN = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "bool mask": {"attn_mask": CAUSAL},
    "bool mask, no weights": {"attn_mask": CAUSAL, "need_weights": False},
    "float mask": {"attn_mask": randn(LENGTH, LENGTH)},
    "mask of each head": {"attn_mask": randn(BATCH * HEADS, LENGTH, LENGTH)},
    "mask of each head, no weights": {"attn_mask": randn(BATCH * HEADS, LENGTH, LENGTH), "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": HIDDEN},
    "padding, no weights": {"key_padding_mask": HIDDEN, "need_weights": False},
    "padding and mask": {"key_padding_mask": HIDDEN, "attn_mask": CAUSAL},
    "padding and causal": {"key_padding_mask": HIDDEN, "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "extra key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", ["plain", "both", "dropout"])
def test_self_attention(options: str, call: str) -> None:
    eager = attention(**OPTIONS[options])
    compiled = nmcompile.compile(eager, "dense")
    assert isinstance(compiled, ThreeGemmAttention)
    assert_bits(results(compiled, (X, X, X), **CALLS[call]), results(eager, (X, X, X), **CALLS[call]))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_how_query_key_and_value_are_shared(options: str, inputs: str, need_weights: bool) -> None:
    eager = attention(**OPTIONS[options])
    got = results(nmcompile.compile(eager, "dense"), INPUTS[inputs], need_weights=need_weights)
    assert_bits(got, results(eager, INPUTS[inputs], need_weights=need_weights))


@pytest.mark.parametrize("inputs", INPUTS)
def test_batch_first(inputs: str) -> None:
    eager = attention(batch_first=True)
    swapped = {id(tensor): tensor.transpose(0, 1).contiguous() for tensor in INPUTS[inputs]}
    tensors = tuple(swapped[id(tensor)] for tensor in INPUTS[inputs])
    assert_bits(results(nmcompile.compile(eager, "dense"), tensors), results(eager, tensors))


@pytest.mark.parametrize("call", [{}, {"key_padding_mask": HIDDEN[1]}, {"need_weights": False, "attn_mask": CAUSAL}])
def test_unbatched(call: dict[str, Any]) -> None:
    eager, x = attention(), X[:, 0].contiguous()
    assert_bits(results(nmcompile.compile(eager, "dense"), (x, x, x), **call), results(eager, (x, x, x), **call))


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths(bias: bool) -> None:
    eager = attention(kdim=4, vdim=12, bias=bias)
    tensors = X, randn(SOURCE, BATCH, 4), randn(SOURCE, BATCH, 12)
    assert_bits(results(nmcompile.compile(eager, "dense"), tensors), results(eager, tensors))


def test_eval_takes_no_fast_path() -> None:
    eager = attention().eval()
    compiled = nmcompile.compile(eager, "weights", config=CompileConfig(ends="sparse"))
    with torch.no_grad():
        assert not torch.allclose(compiled(X, X, X)[0], eager(X, X, X)[0])


@pytest.mark.parametrize("inputs", INPUTS)
def test_pruned_attention_is_attention_with_pruned_weights(inputs: str) -> None:
    eager = attention()
    compiled = nmcompile.compile(eager, "weights", config=CompileConfig(ends="sparse"))
    pruned = copy.deepcopy(eager)
    with torch.no_grad():
        for weight in (pruned.in_proj_weight, pruned.out_proj.weight):
            blocks = weight.unflatten(1, (-1, 4))
            kept = torch.zeros_like(blocks).scatter(-1, blocks.abs().topk(2).indices, 1.0)
            weight.mul_(kept.flatten(1))
    assert_bits(results(compiled, INPUTS[inputs])[:2], results(pruned, INPUTS[inputs])[:2])


def test_a_causal_hint_without_a_mask_is_refused() -> None:
    with pytest.raises(RuntimeError, match="attn_mask"):
        nmcompile.compile(attention(), "dense")(X, X, X, is_causal=True)


WRONG_MASKS: dict[str, dict[str, Tensor]] = {
    "padding, batch last": {"key_padding_mask": torch.zeros(SOURCE, BATCH).bool()},
    "padding of one batch": {"key_padding_mask": torch.zeros(1, SOURCE).bool()},
    "padding without a batch": {"key_padding_mask": torch.zeros(SOURCE)},
    "one query": {"attn_mask": torch.zeros(1, SOURCE)},
    "one key": {"attn_mask": torch.zeros(LENGTH, 1)},
    "keys alone": {"attn_mask": torch.zeros(SOURCE)},
    "one head": {"attn_mask": torch.zeros(1, LENGTH, SOURCE)},
    "heads apart": {"attn_mask": torch.zeros(BATCH, HEADS, LENGTH, SOURCE)},
}


@pytest.mark.parametrize("call", WRONG_MASKS)
@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_of_another_shape_is_refused(options: str, call: str, need_weights: bool) -> None:
    eager = attention(**OPTIONS[options])
    with pytest.raises((RuntimeError, AssertionError)):
        eager(*INPUTS["cross"], need_weights=need_weights, **WRONG_MASKS[call])
    with pytest.raises(RuntimeError, match=r"'in_proj'.*mask has the shape \(.*\); give it \("):
        nmcompile.compile(eager, "dense")(*INPUTS["cross"], need_weights=need_weights, **WRONG_MASKS[call])


@pytest.mark.parametrize("call", [{"key_padding_mask": HIDDEN}, {"attn_mask": torch.zeros(1, LENGTH, LENGTH)}])
def test_an_unbatched_mask_of_another_shape_is_refused(call: dict[str, Tensor]) -> None:
    eager, x = attention(), X[:, 0]
    with pytest.raises((RuntimeError, AssertionError)):
        eager(x, x, x, **call)
    with pytest.raises(RuntimeError, match="mask has the shape"):
        nmcompile.compile(eager, "dense")(x, x, x, **call)


def test_masks_of_each_head_without_a_batch() -> None:
    eager, x, mask = attention(), X[:, 0].contiguous(), randn(HEADS, LENGTH, LENGTH)
    got = results(nmcompile.compile(eager, "dense"), (x, x, x), attn_mask=mask)
    assert_bits(got, results(eager, (x, x, x), attn_mask=mask))


def test_a_batch_of_queries_over_unbatched_keys_is_refused() -> None:
    eager, keys = attention(), MEMORY[:, 0]
    with pytest.raises(RuntimeError, match="3, 2 and 2 dims"):
        nmcompile.compile(eager, "dense")(X[:, :1], keys, keys)
