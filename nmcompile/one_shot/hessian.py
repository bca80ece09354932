"""The Hessian of a layer's output error: the second moments of its inputs.

The error that a change D of a weight matrix makes over all tokens is ||X Dᵀ||² = tr(D XᵀX Dᵀ), so the sum of x xᵀ over
the rows x of the input is all that the methods need to know of the data.

Where the input is pruned or rounded too, to x, the layer should still give what the dense weights give for the dense
input d. The weights that come closest, in least squares, are W + W D H⁻¹ with D the sum of (d - x) xᵀ: what is taken
from an input is partly made up for by what is kept. The methods start from these.
"""

import torch
from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.one_shot.matrices import columns_of, input_slabs

DAMPING = 0.01  # of the mean diagonal, as published (Frantar and Alistarh 2023)
STRIPES = 4  # of the columns: the lower triangle of a symmetric matrix is mostly left out


class Hessian:
    """The mean of x xᵀ over the rows x that a layer multiplies, `(groups, columns, columns)`, summed batch by batch.

    Sums are in float32, or in float64 from a first float64 input on.
    """

    def __init__(self, layer: Layer, device: torch.device | str) -> None:
        self.layer = layer
        self.tokens = 0
        self._factor: Tensor | None = None
        self._lost: Tensor | None = None
        width = columns_of(layer)
        self._upper = torch.zeros(layer.groups, width, width, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add an input of the layer.

        Args:
            x: as the layer multiplies it.
            dense: the same input before it was pruned and rounded; None if it is neither.
        """
        self._factor = None
        dtype = torch.promote_types(x.dtype, self._upper.dtype)
        self._upper = self._upper.to(dtype)
        for rows in input_slabs(self.layer, x.detach()):
            self._add_rows(rows.to(self._upper))
            self.tokens += rows.shape[1]
        if dense is not None:
            for rows, lost in zip(*(input_slabs(self.layer, one) for one in (x, dense - x)), strict=True):
                product = lost.to(self._upper).mT @ rows.to(self._upper)
                self._lost = product if self._lost is None else self._lost + product

    def _add_rows(self, rows: Tensor) -> None:
        stripe = -(-rows.shape[2] // STRIPES)
        for start in range(0, rows.shape[2], stripe):
            these = rows[:, :, start : start + stripe]
            self._upper[:, start : start + stripe, start:].baddbmm_(these.mT, rows[:, :, start:])

    @property
    def is_finite(self) -> bool:
        """Return whether no input held a NaN or an infinity, and no sum overflowed."""
        return bool(torch.isfinite(self._upper).all())

    def mean(self) -> Tensor:
        """Return the mean of x xᵀ, `(groups, columns, columns)`."""
        return (self._upper.triu() + self._upper.triu(1).mT) / self.tokens

    @property
    def used(self) -> Tensor:
        """Return which columns ever had an input other than zero, bool `(groups, columns)`."""
        return self._upper.diagonal(dim1=1, dim2=2) > 0

    def damped(self) -> Tensor:
        """Return the mean with 1 % of its mean diagonal added to the diagonal; unused columns have the diagonal 1."""
        mean = self.mean()
        diagonal = mean.diagonal(dim1=1, dim2=2)
        diagonal += DAMPING * diagonal.mean(1, keepdim=True)
        diagonal.masked_fill_(~self.used, 1.0)
        return mean

    def retargeted(self, weights: Tensor) -> Tensor:
        """Return the weights that give with the inputs as they are what `weights` give with the dense ones, about.

        Args:
            weights: `(groups, rows, columns)`; returned as they are if no input was changed.
        """
        if self._lost is None:
            return weights
        missing = weights.double() @ self._lost.double() / self.tokens
        change: Tensor = torch.linalg.solve(self.damped().double(), missing.mT).mT
        return weights + change.to(weights)

    def inverse_factor(self) -> Tensor:
        """Return the upper U of H⁻¹ = UᵀU of the damped Hessian, float64 `(groups, columns, columns)`."""
        if self._factor is None:
            lower = torch.linalg.cholesky(self.damped().double())
            self._factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return self._factor
