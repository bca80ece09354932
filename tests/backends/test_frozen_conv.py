"""Frozen convolutions take a shortcut: the same results, and none once anything that they depend on is written."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.cpu import frozen_layer
from nmcompile.backends.cpu.convolved_integers import FrozenConv
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.three_gemm.shortcut import slot_of
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training import clips
from nmcompile.training.find_masks import masks_of
from tests.backends.grid_convolutions import Convolutions, Images, Signals, kernels_of, model

pytestmark = [
    pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason),
    pytest.mark.usefixtures("integers"),
]


def frozen(kind: type[Convolutions] = Images, clip: str = "mse") -> tuple[Convolutions, Tensor]:
    """Return a frozen model whose layers have their shortcuts."""
    compiled, x = model(kind, clip=clip)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
    return compiled, x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_computes_what_the_graph_computes(mode: type, taken: list[str]) -> None:
    compiled, x = frozen()
    unfrozen = copy.deepcopy(compiled)
    with mode():
        for scale in (0.1, 1, 10, 1e9):
            y = scale * torch.randn_like(x)
            assert torch.equal(compiled(y), unfrozen(y))
    assert taken == ["first", "grouped", "last"] * 4 and kernels_of(compiled) == ["integers"] * 3


@torch.no_grad()
@pytest.mark.parametrize("kind", [Images, Signals])
def test_it_prunes_inputs_as_the_graph_does(kind: type[Convolutions], taken: list[str]) -> None:
    compiled, x = model(kind, prunes_inputs=True)
    nmcompile.freeze(compiled)
    unfrozen = copy.deepcopy(compiled)
    for layout in (torch.contiguous_format, torch.channels_last)[: x.dim() - 2]:
        for scale in (1, 1, 10, 0.3):
            y = (scale * torch.randn_like(x)).to(memory_format=layout)
            assert torch.equal(compiled(y), unfrozen(y))
    layers = ["first", "grouped", "last"] if kind is Images else ["last"]
    assert taken == layers * 3 * (x.dim() - 2)


@torch.no_grad()
def test_each_size_and_layout_takes_it_from_its_second_call_on(taken: list[str]) -> None:
    (compiled, x), (expected, _) = frozen(), model(backend="reference")
    last = torch.channels_last
    dense = [x, x[:1], x[..., 1:].contiguous(), x.to(memory_format=last), x]
    for y in (*dense, x[..., 1:], x.transpose(0, 1).contiguous().transpose(0, 1)):
        compiled(y)
        taken.clear()
        found, wanted = compiled(y), expected(y)
        torch.testing.assert_close(found, wanted)
        assert found.stride() == wanted.stride()
        assert taken == ["first", "grouped", "last"] or not any(y is one for one in dense)


@torch.no_grad()
def test_the_choices_of_few_sizes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_layer, "SHAPES", 2)
    compiled, x = frozen()
    for width in range(3, 8):
        for _ in range(2):
            compiled(x[..., :width].contiguous())
    layer: Any = compiled.first
    slot = slot_of(layer.three_gemms[""])
    assert slot is not None and isinstance(slot.ready, FrozenConv) and len(slot.ready.choices) == 2


@torch.no_grad()
def test_an_input_that_is_padded_before_does_not_take_it(taken: list[str]) -> None:
    """The first layer would read 4 values more than its module is given, which is the size of another input."""
    (compiled, x), (reference, _) = frozen(Signals), model(Signals, "reference")
    for y in (x, torch.cat([x, x[..., :4]], -1), x[0], x):
        torch.testing.assert_close(compiled(y), reference(y))
    assert "first" not in taken and "last" in taken


def step(compiled: Convolutions) -> None:
    for parameter in compiled.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(compiled.parameters(), 0.1).step()


def step_clips(compiled: Convolutions) -> None:
    found = clips(compiled)
    for clip in found:
        clip.grad = torch.ones_like(clip)
    torch.optim.SGD(found, 0.1).step()


def load(compiled: Convolutions) -> None:
    compiled.load_state_dict({name: 2 * value for name, value in compiled.state_dict().items()})


def calibrate(compiled: Convolutions) -> None:
    nmcompile.calibrate(compiled, [0.3 * torch.randn(2, 8, 7, 9, generator=torch.Generator().manual_seed(7))])


def write_bias(compiled: Convolutions) -> None:
    assert compiled.first.bias is not None
    compiled.first.bias.add_(1)


def write_mask(compiled: Convolutions) -> None:
    (mask,) = masks_of(compiled.first).values()
    mask.tensor.copy_(mask.tensor.roll(4, 1))


def put_another_in_place(compiled: Convolutions) -> None:
    compiled.first.weight = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(3)))


@torch.no_grad()
@pytest.mark.parametrize(
    "write", [step, step_clips, load, calibrate, write_bias, write_mask, put_another_in_place], ids=lambda f: f.__name__
)
def test_nothing_stale_is_read(write: Callable[[Convolutions], None]) -> None:
    clip = "pact" if write is step_clips else "mse"
    (compiled, x), (reference, _) = frozen(clip=clip), model(backend="reference", clip=clip)
    before = compiled(x)
    for net in (compiled, reference):
        write(net)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x))
    assert not torch.allclose(before, compiled(x))
    nmcompile.freeze(compiled)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x))


@torch.no_grad()
def test_what_it_does_not_take_runs_on_the_graph(taken: list[str]) -> None:
    (compiled, x), (reference, _) = frozen(), model(backend="reference")
    taken.clear()
    with torch.enable_grad():
        torch.testing.assert_close(compiled(x.requires_grad_()), reference(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x.detach()).dtype == torch.bfloat16
    assert not taken
    x = x.detach().clone()
    x[1, 2, 3, 4] = torch.nan
    torch.testing.assert_close(compiled(x), reference(x), equal_nan=True)
    assert "first" not in taken
    with pytest.raises((RuntimeError, ValueError), match=r"channels|fit"):
        compiled(torch.randn(2, 12, 7, 9))


@torch.no_grad()
def test_copies_have_none_of_it(taken: list[str]) -> None:
    compiled, x = frozen()
    expected = compiled(x)
    taken.clear()
    for replica in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(replica(x), expected)
    assert not taken


@pytest.mark.parametrize(
    ("backend", "layout"), [("eager", torch.contiguous_format), ("aot_eager", torch.channels_last)]
)
def test_in_a_graph_of_torch_compile_a_layer_is_one_operator(
    backend: str, layout: torch.memory_format, taken: list[str]
) -> None:
    torch._dynamo.reset()
    (compiled, x), (reference, _) = frozen(), model(backend="reference")
    x = x.to(memory_format=layout)
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    with torch.inference_mode() if backend == "aot_eager" else torch.no_grad():
        compiled(x)
        taken.clear()
        found, wanted = run(x), reference(x)
        torch.testing.assert_close(found, wanted)
        assert taken == ["first", "grouped", "last"] and found.stride() == wanted.stride()


@torch.no_grad()
@pytest.mark.parametrize("kind", [Images, Signals])
def test_the_operator_is_well_formed(kind: type[Convolutions]) -> None:
    compiled, x = frozen(kind)
    layer = compiled.first if kind is Images else compiled.last
    triple: GemmTriple = layer.__dict__["three_gemms"][""]
    assert layer.bias is not None
    x = x if kind is Images else torch.randn(2, 16, 19)
    inputs = [x, x.to(memory_format=torch.channels_last)] if kind is Images else [x]
    for y in inputs:
        arguments = y, layer.weight.detach(), layer.bias.detach(), triple.serial
        torch.library.opcheck(
            torch.ops.nmcompile.frozen_layer.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@torch.no_grad()
def test_a_padded_layer_is_no_such_operator(taken: list[str]) -> None:
    torch._dynamo.reset()
    (compiled, x), (reference, _) = frozen(Signals), model(Signals, "reference")
    taken.clear()
    torch.testing.assert_close(torch.compile(compiled, backend="eager", fullgraph=True)(x), reference(x))
    assert taken == ["last"]
