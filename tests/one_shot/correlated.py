"""Weights and inputs of a layer whose inputs are correlated, as those of trained models are."""

import torch
from torch import Tensor

from nmcompile.ir.layers import LinearLayer
from nmcompile.one_shot.hessian import Hessian


def correlated(tokens: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw inputs with a spectrum that falls as a power, and columns of unlike scale."""
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64).pow(-0.7)
    mixing = torch.randn(columns, columns, dtype=torch.float64)
    scale = torch.randn(columns, dtype=torch.float64).mul(0.5).exp()
    return (torch.randn(tokens, columns, dtype=torch.float64) * spectrum @ mixing * scale).to(dtype)


def linear(rows: int, columns: int) -> LinearLayer:
    return LinearLayer("layer", (rows, columns), has_bias=False)


def hessian_of(x: Tensor) -> Hessian:
    """Return the Hessian of a linear layer with the inputs `x`."""
    hessian = Hessian(linear(1, x.shape[-1]), x.device)
    hessian.add(x)
    return hessian
