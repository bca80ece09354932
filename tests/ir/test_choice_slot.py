"""A node's slot for the kernel that it ran last: it belongs to one graph, and goes with it."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.shared import choose_kernel
from nmcompile.config import CompileConfig, Phase
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot, _slots, keep
from nmcompile.three_gemm.find_triples import triples_of

native = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
RESULT, FIRST, SECOND = torch.tensor(0), Choice("dense", "first"), Choice("dense", "second")
X = torch.randn(8, 8)


def compiled_layer() -> nn.Module:
    return nmcompile.compile(nn.Linear(8, 8), "weights", config=CompileConfig(ends="sparse"), backend="cpu")


def chosen(model: nn.Module) -> Choice | None:
    return nmcompile.inspect(model).layer("").choices.get(Phase.FORWARD)


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def test_slots_with_one_label_are_two() -> None:
    first, second = ChoiceSlot("fc forward"), ChoiceSlot("fc forward")
    assert keep(second.name, (RESULT, SECOND)) is RESULT
    assert first.latest is None and second.latest == SECOND


def test_an_operator_may_outlive_its_slot() -> None:
    slot = ChoiceSlot("fc forward")
    name = slot.name
    del slot
    assert name not in _slots and keep(name, (RESULT, FIRST)) is RESULT


@native
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_model_has_slots_of_its_own(
    copied: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled_layer()
    assert chosen(model) is None
    monkeypatch.setattr(choose_kernel, "_choice", lambda *_: FIRST)
    model(X)
    other = copied(model)
    assert chosen(other) == FIRST
    monkeypatch.setattr(choose_kernel, "_choice", lambda *_: SECOND)
    other(X)
    assert (chosen(model), chosen(other)) == (FIRST, SECOND)


@native
def test_a_model_that_torch_compiled_reports_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_kernel, "_choice", lambda *_: FIRST)
    model = compiled_layer()
    torch.compile(model, backend="aot_eager")(X)
    assert chosen(model) == FIRST


@native
def test_slots_go_with_their_model() -> None:
    model = compiled_layer()
    metas = [meta for triple in triples_of(model) for phase in Phase for meta in triple.graphs.metas(phase)]
    names = {meta.choice.name for meta in metas if meta.choice is not None}
    assert names <= set(_slots)
    del model, metas
    gc.collect()
    assert names and not names & set(_slots)
