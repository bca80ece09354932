"""Cut a tensor into M x M tiles along two dims, and join a mask of tiles again."""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_tiles(w: Tensor, dims: tuple[int, int], block: int) -> Tensor:
    """Return the tiles of `w`, `(M * M, tiles)`: row M * r + c holds element (r, c) of every tile.

    Tiles count in C order over the other dims, then over rows and columns of tiles. Partial tiles are padded with
    zeros. `w` has at least one element.
    """
    matrices = w.movedim(dims, (-2, -1))
    matrices = F.pad(matrices, [0, -matrices.shape[-1] % block, 0, -matrices.shape[-2] % block])
    rows, columns = matrices.shape[-2] // block, matrices.shape[-1] // block
    tiled = matrices.reshape(*matrices.shape[:-2], rows, block, columns, block)
    return tiled.movedim((-3, -1), (0, 1)).reshape(block * block, -1)


def join_tiles(tiles: Tensor, like: Tensor, dims: tuple[int, int], block: int) -> Tensor:
    """Invert `split_tiles`, in the shape of `like`, without the padding."""
    shape = like.movedim(dims, (-2, -1)).shape
    rows, columns = shape[-2:]
    tiled = tiles.reshape(block, block, *shape[:-2], -(-rows // block), -(-columns // block))
    matrices = tiled.movedim((0, 1), (-3, -1)).flatten(-2, -1).flatten(-3, -2)
    return matrices[..., :rows, :columns].movedim((-2, -1), dims)


def tile_magnitudes(tiles: Tensor, block: int) -> Tensor:
    """Return |w| for sums over a tile, in float32 (float64 for float64), all finite.

    A tile with a NaN, an infinity or sums that overflow is divided by its largest finite |w|. Its non-finite elements
    count 2 M² and so rank before all others.
    """
    a = tiles.to(torch.promote_types(tiles.dtype, torch.float32)).abs()
    finite = torch.isfinite(a)
    bound = torch.finfo(a.dtype).max / block**2
    ordinary = (a <= bound).all(0)
    largest = torch.where(finite, a, 0.0).amax(0)
    scaled = torch.where(finite, a / torch.where(largest > 0, largest, 1.0), 2.0 * block**2)
    return torch.where(ordinary, a, scaled)
