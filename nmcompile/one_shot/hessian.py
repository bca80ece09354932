"""The Hessian of a layer's output error: the second moments of its inputs.

The error that a change D of a weight matrix makes over all tokens is ||X Dᵀ||² = tr(D XᵀX Dᵀ), so the sum of x xᵀ over
the rows x of the input is all that the methods need to know of the data.

Where a layer has a bias that may change, the best bias takes up the mean error of every output, whatever the weights
are. What they are left with is the deviation from the mean: moments are then taken about it (a covariance).

The layer should give what the dense weights give for another input d, whatever x it sees in its place: x comes from
layers that are pruned before it, and may be pruned and rounded too. The weights that come closest, in least squares,
are W + W D H⁻¹ with D the sum of (d - x) xᵀ. The methods start from these.
"""

import torch
from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.one_shot.matrices import columns_of, input_slabs

DAMPING = 0.01  # of the mean diagonal, as published (Frantar and Alistarh 2023)
SMALL = 256  # columns of a triangular matrix that is inverted at once
STRIPES = 4  # of the columns: the lower triangle of a symmetric matrix is mostly left out


class Hessian:
    """The mean of x xᵀ over the rows x that a layer multiplies, `(groups, columns, columns)`, summed batch by batch.

    Sums are in float32, or in float64 from a first float64 input on.

    Args:
        layer: the layer.
        device: where the sums are.
        is_centred: whether a bias takes up the mean error of the outputs.
    """

    def __init__(self, layer: Layer, device: torch.device | str, is_centred: bool = False) -> None:
        self.layer = layer
        self.is_centred = is_centred
        self.tokens = 0
        self._factor: Tensor | None = None
        self._lost: Tensor | None = None
        width = columns_of(layer)
        self._upper = torch.zeros(layer.groups, width, width, device=device)
        self._sum = torch.zeros(layer.groups, width, dtype=torch.float64, device=device)
        self._lost_sum = torch.zeros_like(self._sum)

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add an input of the layer.

        Args:
            x: as the layer multiplies it.
            dense: the input that it stands for; None if it is the same.
        """
        self._factor = None
        dtype = torch.promote_types(x.dtype, self._upper.dtype)
        self._upper = self._upper.to(dtype)
        lost = None if dense is None else input_slabs(self.layer, dense.detach() - x.detach())
        for rows in input_slabs(self.layer, x.detach()):
            rows = rows.to(self._upper)
            self._add_rows(rows)
            if lost is not None:
                self._add_lost(rows, next(lost).to(rows))
            self.tokens += rows.shape[1]

    def _add_rows(self, rows: Tensor) -> None:
        self._sum += rows.sum(1)
        stripe = -(-rows.shape[2] // STRIPES)
        for start in range(0, rows.shape[2], stripe):
            these = rows[:, :, start : start + stripe]
            self._upper[:, start : start + stripe, start:].baddbmm_(these.mT, rows[:, :, start:])

    def _add_lost(self, rows: Tensor, lost: Tensor) -> None:
        self._lost_sum += lost.sum(1)
        if self._lost is None:
            self._lost = torch.zeros_like(self._upper)
        self._lost = self._lost.to(rows).baddbmm_(lost.mT, rows)

    @property
    def is_finite(self) -> bool:
        """Return whether no input held a NaN or an infinity, and no sum overflowed."""
        return bool(torch.isfinite(self._upper).all())

    def second_moments(self) -> Tensor:
        """Return the mean of x xᵀ, `(groups, columns, columns)`."""
        return (self._upper.triu() + self._upper.triu(1).mT) / self.tokens

    def mean(self) -> Tensor:
        """Return the mean of x xᵀ about the mean of x if that is a bias's, `(groups, columns, columns)`."""
        moments = self.second_moments()
        return moments.sub_(self._outer(self._sum).to(moments)) if self.is_centred else moments

    def _outer(self, sums: Tensor) -> Tensor:
        """Return the product of the means of a vector and of x."""
        return (sums.unsqueeze(2) / self.tokens) * (self._sum.unsqueeze(1) / self.tokens)

    @property
    def used(self) -> Tensor:
        """Return which columns ever had an input other than zero, bool `(groups, columns)`."""
        return self._upper.diagonal(dim1=1, dim2=2) > 0

    def damped(self) -> Tensor:
        """Return the mean with 1 % of the mean of x² added to the diagonal; unused columns have the diagonal 1."""
        mean = self.mean()
        diagonal = mean.diagonal(dim1=1, dim2=2)
        squares = self._upper.diagonal(dim1=1, dim2=2) / self.tokens
        diagonal += DAMPING * squares.mean(1, keepdim=True)
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
        if self.is_centred:
            missing -= weights.double() @ self._outer(self._lost_sum)
        factor = self.inverse_factor()
        return weights + (missing @ factor.mT @ factor).to(weights)

    def mean_error(self, weights: Tensor, pruned: Tensor) -> Tensor:
        """Return the mean by which outputs fall short with pruned weights: what a bias adds, `(groups, rows)`."""
        dense = (self._sum + self._lost_sum).unsqueeze(2)
        short: Tensor = weights.double() @ dense - pruned.double() @ self._sum.unsqueeze(2)
        return short.squeeze(2) / self.tokens

    def inverse_factor(self) -> Tensor:
        """Return the upper U of H⁻¹ = UᵀU of the damped Hessian, float64 `(groups, columns, columns)`.

        Turned about both its axes, a lower Cholesky factor is upper: H = RRᵀ, and U is the inverse of R.
        """
        if self._factor is None:
            upper = torch.linalg.cholesky(self.damped().double().flip(1, 2)).flip(1, 2)
            self._factor = _inverted(upper)
        return self._factor


def _inverted(upper: Tensor) -> Tensor:
    """Invert upper triangular matrices by halves, which leaves out the zeros."""
    width = upper.shape[1]
    if width <= SMALL:
        identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
        inverse: Tensor = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
        return inverse
    half = width // 2
    result = torch.zeros_like(upper)
    result[:, :half, :half] = _inverted(upper[:, :half, :half])
    result[:, half:, half:] = _inverted(upper[:, half:, half:])
    result[:, :half, half:] = -result[:, :half, :half] @ upper[:, :half, half:] @ result[:, half:, half:]
    return result
