"""A frozen Llama -> a decoder: one native call for all layers of a token, with a cache of keys and values.

Eager PyTorch takes some seven hundred operators for a token. For a small model that is several times the product of
its packed weights.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nmcompile.backends.cpu.frozen_linear import FrozenLinear
from nmcompile.checks import check_compiled, check_kind, check_number, check_tensor
from nmcompile.errors import ConfigError, OperandError, StateError
from nmcompile.native import MISSING, isa_and_threads, kernels
from nmcompile.three_gemm.record import record_of
from nmcompile.three_gemm.shortcut import slot_of
from nmcompile.three_gemm.triple import GemmTriple

FAMILY = "LlamaForCausalLM"
ATTENTION = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
MLP = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
MOST = 2**20  # positions


def decoder(compiled: nn.Module, length: int) -> "Decoder":
    """Return a decoder of a frozen Llama, which computes its tokens natively, batch 1.

    All linear layers are to be 2:4 with weights and inputs of at most 4 bits, the output layer too. That takes a weight
    of its own (not the embedding's) and `CompileConfig(ends="sparse")`. The integers are the model's; norms, attention
    and the gate compute in fp32, and sum in another order than PyTorch. Linear layers stay as they are now, whatever
    becomes of the model; the embedding and the gains of norms are read where they lie. Hooks do not run.

    Args:
        compiled: a `transformers.LlamaForCausalLM` that `compile(mode="inference")` made, calibrated, float32 on the
            CPU, in eval mode and frozen (`nmcompile.freeze`).
        length: how many positions the cache holds.

    Raises:
        ConfigError: another model, a length below 1, or a layer without packed integers; its name and the reason.
        StateError: the model is not compiled or not frozen.
    """
    check_compiled("compiled", compiled)
    check_number("length", length, Integral, 1, MOST, f"the number of positions, 1 to {MOST}")
    record_of(compiled)
    if MISSING:
        raise ConfigError(f"a decoder needs the native kernels: {MISSING}")
    _check_family(compiled)
    return Decoder(compiled, int(length))


class Decoder:
    """A decoder with a cache of keys and values; see `nmcompile.decoder`."""

    def __init__(self, model: nn.Module, length: int) -> None:
        config: Any = model.config
        body: Any = model.model
        self.length, self.vocabulary = length, len(body.embed_tokens.weight)
        hidden, heads, keys = config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
        sizes = [config.hidden_size, hidden, heads, keys, config.head_dim, length]
        cosines, sines = body.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        attention = body.layers[0].self_attn
        embedding, gain = _table(body.embed_tokens.weight), _table(body.norm.weight)
        cosines, sines = _table(cosines[0]), _table(sines[0])
        output = _frozen("lm_head", model.get_submodule("lm_head"))
        self._outputs = output.out_features
        factors = body.norm.variance_epsilon, attention.scaling
        self._native = kernels.Decoder(sizes, *factors, embedding, cosines, sines, gain, output.native)
        self._alive: list[object] = [output, embedding, cosines, sines, gain]  # the native decoder points to them
        for i, block in enumerate(body.layers):
            self._add(f"model.layers.{i}", block)

    def _add(self, name: str, block: nn.Module) -> None:
        layers = [_frozen(f"{name}.{one}", block.get_submodule(one)) for one in (*ATTENTION, *MLP)]
        norms: list[Any] = [block.input_layernorm, block.post_attention_layernorm]
        gains = [_table(norm.weight) for norm in norms]
        self._native.add([layer.native for layer in layers], *gains)
        self._alive += [layers, gains]

    @property
    def position(self) -> int:
        """Return how many positions of the cache are filled."""
        return self._native.position

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens, and return the logits after the last one, `(vocabulary,)` float32.

        Args:
            tokens: int64 `(n,)` or `(1, n)`, at least one, on the CPU.

        Raises:
            OperandError: no such tokens, no room for them, or a layer reads a NaN. Nothing is appended then.
        """
        check_tensor("tokens", tokens)
        if tokens.dtype != torch.int64 or not tokens.is_cpu or tokens.dim() not in (1, 2) or tokens.numel() == 0:
            kind = f"{tokens.dtype} {tuple(tokens.shape)} on {tokens.device}"
            raise OperandError(f"tokens are {kind}; give int64 (n,) or (1, n) on the CPU, at least one")
        if tokens.dim() == 2 and len(tokens) != 1:
            raise OperandError(f"tokens have the shape {tuple(tokens.shape)}; a decoder has one sequence, (1, n)")
        flat = tokens.reshape(-1).contiguous()
        if self.position + len(flat) > self.length:
            raise OperandError(
                f"{len(flat)} tokens after {self.position} do not fit into the cache of {self.length} positions; make "
                "a decoder with a larger length, or rewind this one"
            )
        least, most = int(flat.min()), int(flat.max())
        if least < 0 or most >= self.vocabulary:
            raise OperandError(f"tokens from {least} to {most}; the vocabulary has {self.vocabulary}, from 0 on")
        logits = torch.empty(self._outputs)
        if not self._native.run(flat, logits, *isa_and_threads()):
            raise OperandError("a layer reads a NaN, which has no integer; look for it with the model itself")
        return logits

    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Append tokens and the most likely ones that follow, and return those, int64 `(count,)`.

        Args:
            tokens: as in a call.
            count: at least 1. The last token that is found is not appended.

        Raises:
            ConfigError: a count below 1.
            OperandError: as in a call; nothing is appended if the cache cannot hold all.
        """
        check_tensor("tokens", tokens)
        check_number("count", count, Integral, 1, MOST, "the number of tokens to find, 1 or more")
        if self.position + tokens.numel() + count - 1 > self.length:
            raise OperandError(
                f"{tokens.numel()} tokens and {count} more after {self.position} do not fit into the cache of "
                f"{self.length} positions"
            )
        found = torch.empty(count, dtype=torch.int64)
        for i in range(count):
            found[i] = self(tokens).argmax()
            tokens = found[i : i + 1]
        return found

    def rewind(self, position: int = 0) -> None:
        """Forget all positions from this one on.

        Raises:
            ConfigError: a position that is not filled.
        """
        filled = f"a filled position, 0 to {self.position}"
        check_number("position", position, Integral, 0, self.position, filled)
        self._native.rewind(int(position))


def _check_family(model: nn.Module) -> None:
    """Raise unless the model computes what the native decoder does."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__]
    if f"transformers.models.llama.modeling_llama.{FAMILY}" not in names:
        raise ConfigError(f"{type(model).__name__} has no native decoder, only transformers' {FAMILY} has")
    if model.training:
        raise StateError(f"{type(model).__name__} is in train mode; call .eval() first")
    config: Any = model.config
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"the gate is {config.hidden_act!r}; a native decoder has silu")
    check_kind("the model's rope_parameters", config.rope_parameters, Mapping, "one kind of rotary positions")
    if config.rope_parameters.get("rope_type", "default") in ("dynamic", "longrope"):
        kind = config.rope_parameters["rope_type"]
        raise ConfigError(f"rotary positions of type {kind!r} change with the length; a native decoder has a table")


def _frozen(name: str, layer: Any) -> FrozenLinear:
    """Return the frozen form of a layer, which it leaves in its slot when it runs."""
    triples: dict[str, GemmTriple] = layer.__dict__.get("three_gemms", {})
    triple = triples.get("")
    if triple is None:
        raise ConfigError(
            f"layer {name!r} is dense ({type(layer).__name__}); a native decoder needs 2:4 weights of 4 bits in all "
            "linear layers: give the output layer a weight of its own and compile with CompileConfig(ends='sparse')"
        )
    if triple.frozen is None or not triple.frozen.holds:
        raise StateError(f"layer {name!r} is not frozen; call nmcompile.freeze(model) first")
    with torch.no_grad():
        layer(torch.zeros(1, layer.in_features))
    slot = slot_of(triple)
    if slot is None or not isinstance(slot.ready, FrozenLinear):
        raise ConfigError(
            f"layer {name!r} has no packed integers; compile it for backend 'cpu' in mode 'inference', float32, with "
            "2:4 weights and inputs of at most 4 bits"
        )
    return slot.ready


def _table(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ConfigError(f"the model is {x.dtype} on {x.device}; a native decoder takes float32 on the CPU")
    return x.detach().contiguous()
