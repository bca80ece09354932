"""The update GEMM of linear layers, dW = dYᵀ X, as torch operators, with the sum that is the bias gradient or without.

dY is pruned along the tokens by `operator` on the way; for `KEEP` it comes with its zeros. `library` and `slot` are as
in `operators`.
"""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.backends.cusparselt.gemm_call import GemmCall, run_call
from nmcompile.backends.cusparselt.library import Library, library_named
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.product import Product, by_rows
from nmcompile.backends.reference import linear
from nmcompile.backends.triton import prune
from nmcompile.backends.triton.layout import empty_sums
from nmcompile.backends.triton.support import KEEP
from nmcompile.custom_op import custom_op
from nmcompile.ir.choice_slot import keep
from nmcompile.pruning.pattern import NMPattern


def _empty_weight_gradient(grad_output: Tensor, input: Tensor, transposed: bool) -> Tensor:
    sizes = grad_output.shape[-1], input.shape[-1]
    return input.new_empty(sizes[::-1] if transposed else sizes)


def _empty_parameter_gradients(grad_output: Tensor, input: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    weight = _empty_weight_gradient(grad_output, input, transposed)
    return weight, grad_output.new_empty(grad_output.shape[-1])


@custom_op("nmcompile::cusparselt_linear_weight_gradient", fake=_empty_weight_gradient)
def linear_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    axis: str,
    key: Tensor | None,
    transposed: bool,
    library: str,
    slot: str,
) -> Tensor:
    """Compute dW, of the weight's shape."""
    update = _Update(operator, NMPattern(n_keep, block), axis, key, transposed)
    if not update.is_flat(grad_output):
        return update.dense(grad_output, input)
    by = library_named(library)

    def call(grad_output: Tensor, input: Tensor, _: Tensor | None) -> GemmCall[Tensor]:
        product = update.product(by, grad_output, input)
        return GemmCall(product, lambda gradient: gradient, lambda: update.dense(grad_output, input))

    return keep(slot, run_call(call, grad_output, input))


@custom_op("nmcompile::cusparselt_linear_parameter_gradients", fake=_empty_parameter_gradients)
def linear_parameter_gradients(
    grad_output: Tensor,
    input: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    axis: str,
    key: Tensor | None,
    transposed: bool,
    library: str,
    slot: str,
) -> tuple[Tensor, Tensor]:
    """Compute dW, and db as the sum of dY before it is pruned, which the pruning kernel adds up as it reads dY.

    The kernel sums tiles of tokens in float32, and the sums of tiles are added in float32. Eager adds in another order,
    so db differs from eager's by float32 rounding, before both are rounded to the dtype of dY. The order is the same in
    every run. If the dense kernel runs, db is eager's.
    """
    update = _Update(operator, NMPattern(n_keep, block), axis, key, transposed)
    if not update.is_flat(grad_output):
        return update.dense(grad_output, input), linear.linear_bias_gradient(grad_output, input)
    by = library_named(library)

    def call(grad_output: Tensor, input: Tensor, _: Tensor | None) -> GemmCall[tuple[Tensor, Tensor]]:
        sums = empty_sums(by_rows(grad_output, -1))
        return GemmCall(
            update.product(by, grad_output, input, sums),
            lambda gradient: (gradient, sums.sum(0).to(grad_output.dtype)),
            lambda: (update.dense(grad_output, input), linear.linear_bias_gradient(grad_output, input)),
        )

    return keep(slot, run_call(call, grad_output, input))


@dataclass(frozen=True)
class _Update:
    """An update GEMM, and how its gradient still has to be pruned."""

    operator: str
    pattern: NMPattern
    axis: str
    key: Tensor | None
    transposed: bool

    def is_flat(self, grad_output: Tensor) -> bool:
        """Return whether the tokens of a block are neighbours. Only such blocks are 2:4 along the sum of the GEMM."""
        return self.axis != "batch" or grad_output.dim() == 2

    def dense(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """Return dW by the dense kernel."""
        rule = self.operator, self.pattern.n_keep, self.pattern.block, self.axis
        pruned = grad_output if self.operator == KEEP else prune(grad_output, *rule, -1, self.key)
        return linear.linear_weight_gradient(pruned, input, self.transposed)

    def product(self, library: Library, grad_output: Tensor, input: Tensor, sums: Tensor | None = None) -> Product:
        """Return the product that computes dW, and puts partial sums of dY over the tokens into `sums`."""
        sparse = Operand(by_rows(grad_output, -1), 0, None, self.operator, self.pattern, self.key, sums)
        return Product(library, sparse, by_rows(input, -1), by_depth=True, by_rows=not self.transposed)
