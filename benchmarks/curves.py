"""A chart of speed-ups over the number of tokens, with a line at break-even."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """A line of the chart; `style` holds matplotlib's keywords."""

    tokens: Sequence[float]
    speedups: Sequence[float]
    style: dict[str, Any]


def draw_curves(curves: Sequence[Curve], label: str, legend: str, path: Path) -> None:
    """Write the chart to `path`; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="black", linewidth=1)
    axes.text(curves[0].tokens[0], 1, "break-even", va="bottom")
    for curve in curves:
        axes.plot(curve.tokens, curve.speedups, **curve.style)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.legend(title=legend, fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
