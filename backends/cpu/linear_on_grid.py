"""The forward GEMM of a linear layer with a weight on a 4-bit grid, by its packed integers or by its values.

With few tokens, most of the time goes into reading the weight, and packed integers are a tenth of the values' bytes.
With many tokens, an instruction multiplies more integers than values.
"""

from dataclasses import replace

from torch import Tensor

from nmcompile.backends.cpu.frozen_linear import FrozenLinear, frozen_linear
from nmcompile.backends.cpu.gemm_call import FROZEN_ON_GRID, ON_GRID, GemmCall
from nmcompile.backends.cpu.linear import GEOMETRY, choose_forward, empty_output
from nmcompile.backends.cpu.packed_integers import GridInput, GridWeight
from nmcompile.custom_op import custom_op
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot, find_slot, keep
from nmcompile.quantization import Grid
from nmcompile.weight_cache import FROZEN, are_weights_at_rest, content_at_rest


@custom_op("nmcompile::cpu_linear_forward_on_grid", fake=empty_output)
def linear_forward_on_grid(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    input_step: Tensor,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
    input_signed: bool,
    transposed: bool,
    slot: str,
) -> Tensor:
    """Compute Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W masked along in-features and put on its signed grid.

    X is already on the grid of `input_step`.
    """
    on_grid = GridWeight(weight, mask, step, bits, transposed)
    # A view (a part of attention's weight) lives for one call only, so nothing of it can be cached.
    if not are_weights_at_rest() or weight._is_view():
        return keep(slot, choose_forward(input, on_grid.values(), None, bias, transposed))
    x = GridInput(input, input_step, Grid(input_bits, input_signed))
    return keep(slot, _from_integers_or_values(x, on_grid, bias, _frozen(x, on_grid, bias, find_slot(slot))))


def _frozen(x: GridInput, on_grid: GridWeight, bias: Tensor | None, slot: ChoiceSlot | None) -> FrozenLinear | None:
    """Return the layer as the slot holds it for later calls; None if its weight is not frozen."""
    if slot is None:
        return None
    made = frozen_linear(on_grid, x, bias) if content_at_rest() == FROZEN else None
    if made is not None and isinstance(slot.ready, FrozenLinear) and slot.ready.equals(made):
        return slot.ready
    slot.ready = made
    return made


def _from_integers_or_values(
    x: GridInput, on_grid: GridWeight, bias: Tensor | None, frozen: FrozenLinear | None
) -> tuple[Tensor, Choice]:
    """Choose between integers and values, and between the kernels for values; report both choices as one."""
    input, (out_features, _) = x.values, on_grid.shape
    on_values: Choice | None = None

    def from_integers(output: Tensor) -> bool:
        return on_grid.multiply(x, bias, output) if frozen is None else frozen.fill(input.contiguous(), output)

    def from_values() -> Tensor:
        nonlocal on_values
        result, on_values = choose_forward(input, on_grid.values(), None, bias, on_grid.transposed)
        return result

    operands = input, on_grid.weight, on_grid.mask, on_grid.step, x.step, bias
    phase = ON_GRID if frozen is None else FROZEN_ON_GRID
    output, choice = GemmCall(phase, GEOMETRY, operands, *on_grid.shape, input.shape[:-1].numel()).run(
        lambda: input.new_empty(*input.shape[:-1], out_features), from_integers, from_values
    )
    if choice.kernel == "sparse":
        on_grid.forget_values()
        chosen = Choice("integers", choice.reason, None, choice.dense_seconds, None, choice.sparse_seconds)
        if frozen is not None:
            frozen.note(input, chosen, choice)
        return output, chosen
    assert on_values is not None  # the values' kernel has just run
    return output, replace(on_values, integers_seconds=choice.sparse_seconds)
