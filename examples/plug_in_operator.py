"""A pruning operator of your own, held against what theory says about it.

It keeps a of a pair [a, b] with probability a² / (a² + b²) and divides by that: unbiased, but of variance a² + b²,
where the minimum is 2|ab|.

python examples/plug_in_operator.py
"""

import torch
from torch import Tensor

from nmcompile.pruning import NMPattern, mvue
from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.selection import Selection

DRAWS = 20_000


def select_by_square(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep one of two by the squares of their magnitudes; `blocks` is `(2, blocks)`, `u` is `(1, blocks)`."""
    squares = blocks.square()
    probability = squares / squares.sum(0).clamp_min(torch.finfo(blocks.dtype).tiny)
    first = (u[0] < probability[0]) | (blocks[1] == 0)
    return Selection(torch.stack([first, ~first]), blocks / probability.clamp_min(torch.finfo(blocks.dtype).tiny))


by_square = BlockOperator("by_square", select_by_square, draws=1, unbiased=True, patterns="1:2")


def moments(operator: BlockOperator, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each element over many draws."""
    draws = operator(x.expand(DRAWS, -1), "1:2", generator=torch.Generator().manual_seed(0))
    return draws.mean(0), draws.var(0)


if __name__ == "__main__":
    x = torch.tensor([0.9, -0.6, 0.5, 0.1], dtype=torch.float64)
    pairs = x.view(-1, 2)
    expected = {"by_square": pairs.square().sum(1), "mvue": 2 * pairs.prod(1).abs()}
    for name, operator in (("by_square", by_square), ("mvue", mvue)):
        mean, variance = moments(operator, x)
        error = (mean - x).abs() / (variance / DRAWS).sqrt()
        found = variance.view(-1, 2).sum(1)
        print(f"{name:9} mean off by {error.max():.1f} sigma, variance of a pair {found.tolist()}")
        assert error.max() < 5
        torch.testing.assert_close(found, expected[name], rtol=0.1, atol=0)
    print("both are unbiased, and mvue adds less noise")
