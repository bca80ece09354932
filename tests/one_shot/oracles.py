"""Independent implementations of the methods: one weight matrix, dense float64, plain loops."""

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def row_masks(n_keep: int, block: int, columns: int) -> list[Mask]:
    """Return all masks of a row."""
    kept = [np.isin(np.arange(block), chosen) for chosen in combinations(range(block), n_keep)]
    return [np.concatenate(parts) for parts in product(kept, repeat=columns // block)]


def tile_masks(n_keep: int, block: int) -> list[Mask]:
    """Return all transposable masks of a tile."""
    rows = row_masks(n_keep, block, block)
    tiles = (np.stack(tile) for tile in product(rows, repeat=block))
    return [tile for tile in tiles if (tile.sum(0) == n_keep).all()]


def best_mask(scores: Array, n_keep: int, block: int, is_transposable: bool) -> Mask:
    """Return the mask of the largest sum of scores, by sorting every block, or by trying every mask of a tile."""
    mask = np.zeros(scores.shape, dtype=bool)
    rows, columns = scores.shape
    if not is_transposable:
        for row, start in product(range(rows), range(0, columns, block)):
            order = np.argsort(-scores[row, start : start + block], kind="stable")[:n_keep]
            mask[row, start + order] = True
        return mask
    candidates = tile_masks(n_keep, block)
    for top, left in product(range(0, rows, block), range(0, columns, block)):
        tile = (slice(top, top + block), slice(left, left + block))
        mask[tile] = max(candidates, key=lambda candidate: float(scores[tile][candidate].sum()))
    return mask


def damped(mean: Array) -> Array:
    """Add 1 % of the mean diagonal; a column that is never used gets the diagonal 1."""
    result = mean + 0.01 * np.trace(mean) / len(mean) * np.eye(len(mean))
    unused = np.diagonal(mean) == 0
    result[unused, unused] = 1.0
    return result


def prune_by_surgeon(
    weights: Array,
    mean: Array,
    n_keep: int,
    block: int,
    is_transposable: bool,
    round: Callable[[Array], Array] = lambda column: column,
) -> tuple[Array, Mask]:
    """Prune and round by the optimal brain surgeon's formula, a column after another, each time with the full inverse.

    The inverse of the Hessian of the columns that are left comes from Gaussian elimination of the column that is done.
    """
    w, mask = weights.copy(), np.zeros(weights.shape, dtype=bool)
    w[:, np.diagonal(mean) == 0] = 0
    inverses = [np.linalg.inv(damped(mean))]
    for p in range(len(mean) - 1):
        last = inverses[-1]
        inverses.append(last - np.outer(last[:, p], last[p]) / last[p, p])
    for p, inverse in enumerate(inverses):
        if p % block == 0:
            run = slice(p, p + block)
            pivots = np.array([inverses[j][j, j] for j in range(p, p + block)])
            mask[:, run] = best_mask(w[:, run] ** 2 / pivots, n_keep, block, is_transposable)
        stored = np.where(mask[:, p], round(w[:, p]), 0.0)
        for row in range(len(w)):
            w[row, p:] -= (w[row, p] - stored[row]) / inverse[p, p] * inverse[p, p:]
        w[:, p] = stored
    return w * mask, mask


def least_squares(dense: Array, mask: Mask, hessian: Array) -> Array:
    """Return the kept values that minimise (w - w⁰) H (w - w⁰)ᵀ, row by row, by lstsq on a square root of H."""
    root = np.linalg.cholesky(hessian).T
    result = np.zeros_like(dense)
    for row, kept in enumerate(mask):
        result[row, kept] = np.linalg.lstsq(root[:, kept], root @ dense[row], rcond=None)[0]
    return result


def on_grid(values: Array, step: float | Array, high: int) -> Array:
    """Return the nearest multiples of a step, at most `high` of them from zero; ties go to even ones."""
    return np.clip(np.rint(values / step), -high, high) * step


def least_loss_on_grid(dense: Array, hessian: Array, masks: list[Mask], step: float, high: int) -> Array:
    """Return the least loss of every row over all of these masks of it, and all values on the grid that each keeps."""
    levels = np.arange(-high, high + 1) * step
    least = np.full(len(dense), np.inf)
    for mask in masks:
        kept = np.array(list(product(levels, repeat=int(mask.sum()))))
        candidates = np.zeros((len(kept), len(mask)))
        candidates[:, mask] = kept
        for row, weights in enumerate(dense):
            change = candidates - weights
            least[row] = min(least[row], ((change @ hessian) * change).sum(1).min())
    return least


def loss(dense: Array, pruned: Array, hessian: Array) -> Array:
    """Return (w - w⁰) H (w - w⁰)ᵀ of every row."""
    change = pruned - dense
    return np.einsum("ri,ij,rj->r", change, hessian, change)
