"""Compressed weights that the cuSPARSELt backend caches, with a library that PyTorch computes."""

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt import CusparseltBackend, kept_weights
from nmcompile.backends.cusparselt.kept_weights import kept_for
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.ir.operations import apply_mask
from tests.backends.fake_cusparselt import FakeLibrary

SEARCH = 1  # compressions while an algorithm is searched, at the first product


def at_rest(layer: nn.Module, library: FakeLibrary) -> nn.Module:
    config = CompileConfig(ends="sparse")
    return nmcompile.compile(layer, "weights", config=config, backend=CusparseltBackend(library))


def compressed(library: FakeLibrary) -> list[Tensor]:
    """Return the matrices that the library compressed."""
    return library.functions.compressions


def kept(library: FakeLibrary) -> tuple[int, int]:
    """Return how many compressed and how many masked weights are kept."""
    forms = kept_for(library).forms
    return len(forms["sparse"]), len(forms["dense"])


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(64, 64), torch.randn(8, 64)), (nn.Conv2d(64, 64, 1, bias=False), torch.randn(2, 64, 2, 2))],
)
def test_a_weight_at_rest_is_compressed_once(layer: nn.Module, x: Tensor, library: FakeLibrary) -> None:
    compiled, weight = at_rest(layer, library), layer.get_parameter("weight")
    with torch.no_grad():
        first, *_, last = (compiled(x) for _ in range(3))
        assert len(compressed(library)) == SEARCH + 1 and torch.equal(first, last)
        weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(compressed(library)) == SEARCH + 2


def test_a_call_with_gradients_forgets_what_is_kept(library: FakeLibrary) -> None:
    """Fused optimizers do not count versions; only the call with gradients shows that a weight is trained."""
    compiled, x = at_rest(nn.Linear(64, 64), library), torch.randn(8, 64)
    with torch.no_grad():
        compiled(x)
    assert kept(library)[0] == 1
    compiled(x), compiled(x)
    assert kept(library)[0] == 0 and len(compressed(library)) == SEARCH + 3


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_training_under_autocast_keeps_nothing_stale(
    form: str, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators see autocast's copy of the weight; a frozen model compares nothing."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(form, "the test asks for it"))
    compiled, x = at_rest(nn.Linear(64, 64), library), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(compiled.parameters(), 0.1, fused=True)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("dense", "the test asks for it"))
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).square().mean().backward()
    optimizer.step()
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(form, "the test asks for it"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))


def test_only_parameters_are_kept(library: FakeLibrary) -> None:
    """Autocast makes another tensor for each call, which is never seen again."""
    compiled, x = at_rest(nn.Linear(64, 64), library), torch.randn(8, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(x), compiled(x)
    assert len(compressed(library)) == SEARCH + 2 and kept(library)[0] == 0


def test_two_sizes_keep_both_forms(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse kernel runs for the larger size; a graph may have captured its operand."""

    def choose(problem: Callable[[], tuple[str, Sizes]], *_: object) -> Choice:
        return Choice("sparse" if problem()[1].lanes > 8 else "dense", "the test asks for it")

    monkeypatch.setattr(choices, "_choice", choose)
    compiled, sizes = at_rest(nn.Linear(64, 64), library), [torch.randn(n, 64) for n in (16, 8)]
    with torch.no_grad():
        for x in 3 * sizes:
            torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(compressed(library)) == SEARCH + 1


def test_a_graph_that_is_captured_makes_what_is_not_there(library: FakeLibrary) -> None:
    compiled, x, captured = at_rest(nn.Linear(64, 64), library), torch.randn(8, 64), kept_for(library).captured
    compiled(x)  # with gradients, which keeps nothing but the plan
    with torch.no_grad():
        library.capturing = True
        compiled(x), compiled(x)
        assert len(compressed(library)) == SEARCH + 3 and not captured, "a capture makes nothing before a replay"
        library.capturing = False
        compiled(x)
        library.capturing = True
        compiled(x), compiled(x)
        assert len(compressed(library)) == SEARCH + 4 and len(captured) == 1
        compiled.weight.mul_(2)  # type: ignore[operator]
        compiled(x)
    assert len(compressed(library)) == SEARCH + 5 and len(captured) == 1, "what was there is of another weight"


def test_the_form_that_a_graph_reads_goes_with_its_weight(library: FakeLibrary) -> None:
    forms, first, second, form = kept_for(library), torch.ones(2), torch.ones(2), torch.ones(1)
    forms.pin(torch.zeros(1), first)
    forms.pin(form, second)
    assert len(forms.captured) == 2
    del first
    forms.pin(form, second)
    assert [pinned for _, pinned in forms.captured] == [form]


def test_a_dense_weight_at_rest_is_masked_once(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("dense", "the test asks for it"))
    calls = count()

    def counted(weight: Tensor, mask: Tensor) -> Tensor:
        next(calls)
        return apply_mask(weight, mask)

    monkeypatch.setattr(f"{kept_weights.__name__}.apply_mask", counted)
    layer, x = nn.Linear(64, 64), torch.randn(8, 64)
    compiled = at_rest(layer, library)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), nmcompile.finalize(compiled)(x))
    assert next(calls) == 1
    assert kept(library) == (0, 1)
