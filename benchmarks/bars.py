"""A bar chart of ratios with a reference line."""

from collections.abc import Mapping
from pathlib import Path


def draw_bars(bars: Mapping[str, float], label: str, line: tuple[str, float], path: Path) -> None:
    """Write the chart to `path`; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 1 + 0.24 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(line[1], color="black", linestyle="--")
    drawn = axes.barh(list(bars), list(bars.values()), zorder=3)
    axes.bar_label(drawn, fmt="%.2f", label_type="center", color="white", zorder=4)
    axes.text(line[1], -0.9, line[0], ha="center", va="bottom")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(label)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
