"""The native decoder of a frozen Llama: transformers' own model is the oracle."""

import gc
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.native import INSTRUCTION_SETS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

SIZES = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 60, "head_dim": 12}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = SIZES | HEADS | {"tie_word_embeddings": False, "initializer_range": 0.3} | options
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given)).eval()
    return model


def compiled(model: nn.Module, backend: str = "cpu", **config: Any) -> nn.Module:
    batch = {"input_ids": torch.arange(32).view(2, 16), "use_cache": False}
    chosen = CompileConfig(**({"ends": "sparse"} | config))
    return nmcompile.compile(model, "inference", config=chosen, calibration=[batch], backend=backend).eval()


def fresh(**options: Any) -> nn.Module:
    """Return a frozen model that the test may change."""
    made = compiled(llama(**options))
    nmcompile.freeze(made)
    return made


@cache
def frozen() -> nn.Module:
    """Return the frozen model that tests share."""
    return fresh()


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens.view(1, -1), use_cache=False).logits[0, -1]
    return found


ROTARY = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROTARY |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "one group, long waves": {"num_key_value_heads": 1, "rope_parameters": ROTARY},
    "biases, wide heads": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": 20},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(**KINDS[kind])
    for isa in INSTRUCTION_SETS:
        monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
        made, tokens = nmcompile.decoder(model, 24), PROMPT[0]
        found = made(PROMPT)
        for _ in range(8):
            expected = logits_of(model, tokens)
            # An input that lies next to the middle of two steps may round to the other one.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            tokens = torch.cat([tokens, found.argmax()[None]])
            found = made(tokens[-1:])
        assert made.position == 14


def test_they_are_those_of_the_reference_backend() -> None:
    expected = logits_of(compiled(llama(), "reference"), PROMPT)
    torch.testing.assert_close(nmcompile.decoder(frozen(), 8)(PROMPT), expected, rtol=1e-3, atol=1e-3)


def test_a_prompt_in_parts_gives_the_same() -> None:
    model = frozen()
    whole, parts = nmcompile.decoder(model, 8), nmcompile.decoder(model, 8)
    for part in PROMPT[0].split([1, 3, 2]):
        found = parts(part)
    assert torch.equal(found, whole(PROMPT))
    parts.rewind(4)
    assert parts.position == 4 and torch.equal(parts(PROMPT[:, 4:]), found)
    parts.rewind()
    assert torch.equal(parts(PROMPT), found)


def test_greedy_tokens_are_generates() -> None:
    model = frozen()
    with torch.no_grad():
        expected = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert torch.equal(nmcompile.decoder(model, 17).generate(PROMPT, 12), expected[0, 6:])


def test_threads_change_nothing() -> None:
    model, threads, found = frozen(), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(nmcompile.decoder(model, 8)(PROMPT))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_later_changes_of_the_model_are_not_seen() -> None:
    model = fresh()
    made = nmcompile.decoder(model, 8)
    before = made(PROMPT)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.weight.mul_(3)
        nmcompile.freeze(model)
        model(input_ids=PROMPT)
    del model, layer
    made.rewind()
    assert torch.equal(made(PROMPT), before)


def test_a_nan_is_an_error_and_appends_nothing() -> None:
    model = fresh()
    made = nmcompile.decoder(model, 8)
    expected = made(PROMPT[:, :2])
    made.rewind()
    embedding: Any = model.get_submodule("model.embed_tokens")
    with torch.no_grad():
        embedding.weight[PROMPT[0, 3]] = torch.nan
    with pytest.raises(nmcompile.NMCompileError, match="NaN"):
        made(PROMPT)
    assert made.position == 0 and torch.equal(made(PROMPT[:, :2]), expected)


BAD = {
    "floats": (lambda d: d(PROMPT.float()), "give int64"),
    "two sequences": (lambda d: d(PROMPT.view(2, 3)), "one sequence"),
    "none": (lambda d: d(PROMPT[:, :0]), "at least one"),
    "three dims": (lambda d: d(PROMPT[None]), "give int64"),
    "negative": (lambda d: d(torch.tensor([-1])), "the vocabulary has 60"),
    "beyond the vocabulary": (lambda d: d(torch.tensor([60])), "the vocabulary has 60"),
    "no room": (lambda d: d(torch.cat([PROMPT, PROMPT], 1)), "cache of 8 positions"),
    "no room for all": (lambda d: d.generate(PROMPT, 4), "cache of 8 positions"),
    "no count": (lambda d: d.generate(PROMPT, 0), "1 or more"),
    "a list": (lambda d: d([1, 2]), "tokens"),
    "an unfilled position": (lambda d: d.rewind(1), "filled position"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case: str) -> None:
    call, message = BAD[case]
    made = nmcompile.decoder(frozen(), 8)
    with pytest.raises(nmcompile.NMCompileError, match=message):
        call(made)
    assert made.position == 0


def unfrozen() -> nn.Module:
    return compiled(llama())


def tied() -> nn.Module:
    model = compiled(llama(tie_word_embeddings=True))
    nmcompile.freeze(model)
    return model


def eight_bits() -> nn.Module:
    model = compiled(llama(), ends="int8")
    nmcompile.freeze(model)
    return model


def another_family() -> nn.Module:
    return nmcompile.compile(nn.Sequential(nn.Linear(8, 8)), "weights")


def another_gate() -> nn.Module:
    return fresh(hidden_act="gelu")


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not compiled": (llama, "not compiled"),
    "not frozen": (unfrozen, "freeze"),
    "tied": (tied, "lm_head' is dense"),
    "ends of eight bits": (eight_bits, "lm_head' has no packed integers"),
    "another family": (another_family, "has no native decoder"),
    "another gate": (another_gate, "the gate is 'gelu'"),
    "training": (lambda: fresh().train(), "train mode"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_without_a_decoder_are_refused(case: str) -> None:
    make, message = MODELS[case]
    with pytest.raises(nmcompile.NMCompileError, match=message):
        nmcompile.decoder(make(), 8)


def test_decoders_are_freed() -> None:
    made = nmcompile.decoder(frozen(), 8)
    made(PROMPT)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
