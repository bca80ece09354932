"""Draw each pruning operator at work, from its results: python docs/draw_operators.py

Writes docs/pictures/<operator>.svg. A row is a tensor of two blocks of four; pruned elements are empty cells.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from nmcompile.pruning import OPERATORS, mask, transposable_mask

FOLDER = Path(__file__).parent / "pictures"
X = torch.tensor([0.9, -0.6, 0.5, 0.1, -0.3, 0.4, 0.0, 1.6])
W = torch.tensor(
    [
        [0.9, 0.8, 0.3, 0.1, 0.7, 0.1, 0.6, 0.2],
        [0.8, 0.7, 0.1, 0.2, 0.2, 0.9, 0.3, 0.8],
        [0.9, 0.2, 0.5, 0.4, 0.6, 0.2, 0.9, 0.1],
        [0.1, 0.4, 0.6, 0.3, 0.1, 0.5, 0.2, 0.7],
    ]
)
DRAWS, MEAN_OF = 3, 4096
CELL, HEIGHT, GAP, LABEL = 52, 30, 14, 150
ONE_OF_TWO = "mvue_one_of_two"


def cell(x: float, y: float, value: float, kept: bool = True) -> str:
    """Draw one element: blue if positive, orange if negative, darker if larger, empty if pruned."""
    box = f'<rect x="{x + 1:g}" y="{y:g}" width="{CELL - 2}" height="{HEIGHT}" stroke="#8a94a0"'
    if not kept:
        return f'{box} fill="none" stroke-dasharray="3 3"/>'
    colour = "#2b7bba" if value >= 0 else "#d9772b"
    text = f'<text x="{x + CELL / 2:g}" y="{y + 20:g}" text-anchor="middle">{value:.2f}</text>'
    return f'{box} fill="{colour}" fill-opacity="{0.08 + 0.3 * min(abs(value), 2):.2f}"/>{text}'


def row(y: float, label: str, values: Tensor, kept: Tensor, block: int) -> str:
    """Draw one tensor with a gap between its blocks."""
    places = [LABEL + i * CELL + i // block * GAP for i in range(len(values))]
    cells = [cell(*one) for one in zip(places, [y] * len(places), values.tolist(), kept.tolist(), strict=True)]
    return f'<text x="0" y="{y + 20:g}">{escape(label)}</text>' + "".join(cells)


def picture(rows: list[str], title: str, width: float) -> str:
    """Return the SVG of some rows."""
    height = len(rows) * (HEIGHT + 8)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8:g} {height + 4:g}" role="img"'
    style = 'font-family="sans-serif" font-size="14" fill="#333"'
    return "\n".join([f"{head} {style}>", f"<title>{escape(title)}</title>", *rows, "</svg>", ""])


def operator_picture(name: str) -> str:
    """Draw what an operator returns for X; a random one three times, and its mean."""
    pattern = "1:2" if name == ONE_OF_TWO else "2:4"
    operator, block = OPERATORS[name], int(pattern[-1])
    generator = torch.Generator().manual_seed(0)
    lines = [("x", X, torch.ones_like(X, dtype=torch.bool))]
    if operator.needs_key:
        results = [operator(X, pattern, generator=generator) for _ in range(DRAWS)]
        lines += [(f"draw {i + 1}", result, result != 0) for i, result in enumerate(results)]
        many = operator(X.repeat(MEAN_OF, 1), pattern, generator=generator).mean(0)
        lines.append((f"mean of {MEAN_OF} draws", many, torch.ones_like(X, dtype=torch.bool)))
    else:
        result = operator(X, pattern)
        lines.append((f"{name}, {pattern}", result, result != 0))
    rows = [row(i * (HEIGHT + 8), *line, block) for i, line in enumerate(lines)]
    return picture(rows, f"{name} {pattern}", LABEL + len(X) * CELL + len(X) // block * GAP)


def masks_picture(found: Tensor, title: str) -> str:
    """Draw a 4 x 8 weight under a mask, with the number of kept elements below each column."""
    rows = [row(i * (HEIGHT + 8), f"out {i}", W[i], found[i], 4) for i in range(4)]
    places = [LABEL + i * CELL + i // 4 * GAP + CELL / 2 for i in range(8)]
    y = 4 * (HEIGHT + 8) + 20
    counts = [
        f'<text x="{x:g}" y="{y}" text-anchor="middle">{n}</text>'
        for x, n in zip(places, found.sum(0).tolist(), strict=True)
    ]
    rows.append(f'<text x="0" y="{y}">kept in a column</text>' + "".join(counts))
    return picture(rows, title, LABEL + 8 * CELL + 2 * GAP)


def pictures() -> dict[str, str]:
    """Return every picture by its name."""
    found = {name: operator_picture(name) for name in OPERATORS}
    found["mask"] = masks_picture(mask(W, "2:4"), "row-wise 2:4 mask")
    found["transposable_mask"] = masks_picture(transposable_mask(W, "2:4"), "transposable 2:4 mask")
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / f"{name}.svg").write_text(svg)
