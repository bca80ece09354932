import pytest
import torch

from nmcompile.pruning.blocks import join, split
from nmcompile.pruning.tiles import join_tiles, split_tiles


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("block", [2, 3, 4, 8])
def test_blocks_go_there_and_back(dim: int, block: int) -> None:
    x = torch.arange(1, 5 * 6 * 7 + 1).view(5, 6, 7)
    blocks = split(x, dim, block)
    assert join(blocks, x, dim).equal(x)
    lines = x.movedim(dim, -1)
    first = [int(value) for value in lines[0, 0, :block]]
    assert blocks[: len(first), 0].tolist() == first
    assert blocks.count_nonzero() == x.numel()


def test_blocks_count_in_c_order_of_the_original_dims() -> None:
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert split(x, 1, 2)[0].view(2, 2, 3).equal(x[:, ::2])
    assert split(x, 1, 2)[1].view(2, 2, 3).equal(x[:, 1::2])


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("block", [2, 4])
def test_tiles_go_there_and_back(dims: tuple[int, int], block: int) -> None:
    x = torch.arange(1, 5 * 6 * 7 + 1).view(5, 6, 7)
    tiles = split_tiles(x, dims, block)
    assert join_tiles(tiles, x, dims, block).equal(x)
    corner = x.movedim(dims, (-2, -1))[0, :block, :block]
    assert tiles[:, 0].view(block, block)[: corner.shape[0], : corner.shape[1]].equal(corner)
