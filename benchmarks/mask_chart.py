"""A chart of the benchmark of masks: a panel for each model, a line for each method, a mark for each pattern."""

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

MARKS = "os^D"


def draw_scores(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the chart of results to `path`; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    models = list(dict.fromkeys(result["model"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    patterns = list(dict.fromkeys(result["pattern"] for result in results))
    figure = Figure(figsize=(4 * len(models), 1.7 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        _draw_model(panel, _most_data(result for result in results if result["model"] == model), methods, patterns)
        panel.set_title(model)
    panels[0].invert_yaxis()
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _most_data(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each pattern and method the result with the most calibration data."""
    ordered = sorted(results, key=lambda result: prod(result["calibration"]))
    return list({(result["pattern"], result["method"]): result for result in ordered}.values())


def _draw_model(panel: Any, results: Sequence[dict[str, Any]], methods: Sequence[str], patterns: Sequence[str]) -> None:
    for number, (pattern, mark) in enumerate(zip(patterns, MARKS, strict=False)):
        chosen = [result for result in results if result["pattern"] == pattern]
        scores = [result["score"] for result in chosen]
        heights = [methods.index(result["method"]) for result in chosen]
        if chosen:
            panel.plot(scores, heights, mark, label=pattern, color=f"C{number}")
    panel.set_yticks(range(len(methods)), methods)
    panel.set_xlabel(results[0]["metric"])
    if "perplexity" in results[0]["metric"]:
        panel.set_xscale("log")
    panel.grid(axis="y", linewidth=0.5)
