"""The forward GEMM of a linear layer with a weight on a 4-bit grid: from its packed integers, or from its values.

With few tokens, reading the weight takes the time, and packed integers are a tenth of the values' bytes. With many, an
instruction multiplies more integers than values.
"""

from dataclasses import replace

from torch import Tensor

from nmcompile.backends.cpu.gemm_call import ON_GRID, GemmCall
from nmcompile.backends.cpu.linear import GEOMETRY, empty_output, linear_forward
from nmcompile.backends.cpu.packed_integers import GridInput, GridWeight
from nmcompile.backends.shared.choose_kernel import latest, note
from nmcompile.custom_op import custom_op
from nmcompile.ir.choice import Choice
from nmcompile.quantization import Grid
from nmcompile.weight_cache import are_weights_at_rest


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
    call: str,
) -> Tensor:
    """Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W masked along in-features and put on its signed grid.

    X is on the grid of `input_step` already.
    """
    on_grid = GridWeight(weight, mask, step, bits, transposed)
    x = GridInput(input, input_step, Grid(input_bits, input_signed))

    def from_values() -> Tensor:
        return linear_forward(input, on_grid.values(), None, bias, transposed, call)

    # A view lives for one call only (a part of attention's weight), and nothing can be kept of it.
    if not are_weights_at_rest() or weight._is_view():
        return from_values()
    tokens = input.shape[:-1].numel()
    gemm = GemmCall(
        f"{call} integers", ON_GRID, GEOMETRY, (input, weight, mask, step, input_step, bias), *on_grid.shape, tokens
    )
    output = gemm.run(
        lambda: input.new_empty(*input.shape[:-1], on_grid.shape[0]),
        lambda output: on_grid.multiply(x, bias, output),
        from_values,
    )
    _note(call, gemm.name)
    if (choice := latest(call)) and choice.kernel == "integers":
        on_grid.forget_values()
    return output


def _note(call: str, integers: str) -> None:
    """Report the choice between integers and values together with that between the kernels for values."""
    found, other = latest(integers), latest(call)
    assert found is not None
    if found.kernel == "sparse":
        note(call, Choice("integers", found.reason, None, found.dense_seconds, integers_seconds=found.sparse_seconds))
    elif other is not None:
        note(call, replace(other, integers_seconds=found.sparse_seconds))
