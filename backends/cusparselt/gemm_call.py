"""One call of a GEMM: its product by the library, and the dense kernel on the same operands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.random_operands import random_like, thin_out
from nmcompile.backends.shared.choose_kernel import Trial, run_best
from nmcompile.ir.choice import Choice

Result = TypeVar("Result")


@dataclass(frozen=True)  # a NamedTuple cannot be generic in Python 3.10
class GemmCall(Generic[Result]):
    """The two ways to compute a result.

    Args:
        product: the product with a sparse operand.
        restore: turns the product's matrix into the result.
        dense: returns the same result by the dense kernel.
    """

    product: Product
    restore: Callable[[Tensor], Result]
    dense: Callable[[], Result]

    def sparse(self) -> Result | None:
        """Return the result by the library; None if `Product.multiply` has none."""
        matrix = self.product.multiply()
        return None if matrix is None else self.restore(matrix)


def run_call(
    make: Callable[[Tensor, Tensor, Tensor | None], GemmCall[Result]],
    sparse: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
) -> tuple[Result, Choice]:
    """Return the result by the kernel that pays, and the choice of that kernel.

    Args:
        make: makes the call from its operands, or from random ones that are timed in their place.
        sparse, dense, bias: the operands; only the first one is pruned.
    """
    call = make(sparse, dense, bias)
    product = call.product
    refusal = product.refusal()
    if refusal:
        return call.dense(), Choice("dense", refusal)

    def kernels() -> tuple[Callable[[], object], Callable[[], object]]:
        random_sparse = random_like(sparse)
        twin = make(random_sparse, random_like(dense), None if bias is None else random_like(bias))
        thin_out(random_sparse, twin.product.sparse)
        return twin.sparse, twin.dense

    work, trial = product.sizes.multiplications, Trial(product.dense.device, kernels)
    with torch.cuda.device_of(product.dense):
        return run_best(lambda: product.problem, work, product.predicted_speedup, call.sparse, call.dense, trial)
