"""Operands for the tests of pruning kernels: every kind of number, in every layout."""

from collections.abc import Callable

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "inside": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "rows": lambda x: torch.cat([x, x], dim=0)[: x.shape[0]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0]


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw `normal`, `ties`, `wide` (all exponents), `large` (sums overflow), `sparse` or `special` numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = torch.randint(-2, 3, shape, generator=generator).double()
    if kind == "wide":
        x *= torch.exp2(torch.randint(-150, 129, shape, generator=generator).double())
    if kind == "large":
        x = x.sign() * torch.finfo(dtype).max / torch.randint(1, 40, shape, generator=generator)
    if kind == "sparse":
        x *= torch.rand(shape, generator=generator) < 0.4
    if kind == "special":
        numbers = torch.tensor(SPECIAL, dtype=torch.float64)
        chosen = numbers[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, x)
    return x.to(dtype)
