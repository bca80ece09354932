"""The exact transposable mask of a tile of any size, as a min-cost flow.

Every row sends N units to the columns, every column takes N, and the edge (r, c) of capacity 1 costs -|w[r, c]|; the
edges that carry flow are the mask. Costs are exact integers, so the flow is the true optimum and no rounding can keep
the solver from ending.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from nmcompile.pruning.pattern import NMPattern


def select_by_flow(a: Tensor, pattern: NMPattern) -> Tensor:
    """Return the mask of the largest sum of finite magnitudes `a`, both `(M * M, tiles)`."""
    tiles = a.t().tolist()
    masks = [_tile_mask(tile, pattern) for tile in tiles]
    return torch.tensor(masks, dtype=torch.bool).t().to(a.device)


def _tile_mask(tile: Sequence[float], pattern: NMPattern) -> list[bool]:
    import networkx  # imported here, as it would slow down every import of nmcompile

    block = pattern.block
    graph: networkx.DiGraph[tuple[str, int]] = networkx.DiGraph()
    for index in range(block):
        graph.add_node(("row", index), demand=-pattern.n_keep)
        graph.add_node(("column", index), demand=pattern.n_keep)
    for index, cost in enumerate(_integers(tile)):
        graph.add_edge(("row", index // block), ("column", index % block), capacity=1, weight=-cost)
    _, flow = networkx.network_simplex(graph)
    return [flow["row", index // block]["column", index % block] == 1 for index in range(block * block)]


def _integers(values: Sequence[float]) -> list[int]:
    """Multiply the values by a power of two that makes all of them integers."""
    exact = [Fraction(value) for value in values]
    scale = max(value.denominator for value in exact)
    return [int(value * scale) for value in exact]
