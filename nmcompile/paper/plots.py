"""Plots of findings, drawn by matplotlib where it is installed."""

import io
import textwrap
from pathlib import Path

from nmcompile.files.write_atomically import write_atomically
from nmcompile.paper.experiment import Findings

WIDTH = 100  # characters of a line of the caption


def draw_plot(findings: Findings, title: str, path: Path) -> str:
    """Write the plot to `path`, with its title and caption; return a line that says so, or why there is no plot."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: it needs matplotlib; pip install 'nmcompile[report]'"
    file = io.BytesIO()
    # Ids in the file come from the salt, so the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "nmcompile", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        findings.draw(figure)
        figure.suptitle(title)
        figure.supxlabel(textwrap.fill(findings.caption, WIDTH), fontsize="small")
        figure.savefig(file, format="svg", metadata={"Date": None})
    write_atomically(path, file.getvalue())
    return f"written: {path}"
