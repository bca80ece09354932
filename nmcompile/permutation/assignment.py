"""The assignment problem: which of n columns goes to which of n blocks for the largest total gain."""

import numpy as np

from nmcompile.permutation.constraints import Ids

Gains = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def assign(gains: Gains) -> Ids:
    """Return for each column of a square matrix the row that is assigned to it, so that the sum is largest.

    Each column first takes its cheapest row if no other column has it. The rest of the rows are added one at a time
    along shortest augmenting paths (Jonker & Volgenant 1987), in vector operations for each step of a path.
    """
    size = len(gains)
    costs = -gains
    row_price, column_price = np.zeros(size), np.append(costs.min(0), 0.0)
    row_of = np.full(size + 1, -1)  # the last column is where each path begins
    rows, columns = np.unique(costs.argmin(0), return_index=True)
    row_of[columns] = rows
    for row in np.setdiff1d(np.arange(size), rows):
        row_of[size], column = row, size
        distance, before = np.full(size, np.inf), np.full(size, size)
        is_open = np.ones(size, dtype=bool)
        visited = [size]
        while row_of[column] >= 0:
            current = row_of[column]
            reduced = costs[current] - row_price[current] - column_price[:size]
            shorter = is_open & (reduced < distance)
            distance[shorter], before[shorter] = reduced[shorter], column
            column = int(np.where(is_open, distance, np.inf).argmin())
            step = distance[column]
            row_price[row_of[visited]] += step
            column_price[visited] -= step
            distance[is_open] -= step
            is_open[column] = False
            visited.append(column)
        while column != size:
            row_of[column], column = row_of[before[column]], int(before[column])
    return row_of[:size]
