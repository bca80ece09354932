"""Plots of trained rows: differences from the reference beside the paper's, and curves over the epochs."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from nmcompile.paper.statistics import paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"accuracy": "percentage points of test accuracy", "loss": "nats of test loss"}
LABELS = {"accuracy": "test accuracy, %", "loss": "test loss, nats"}


def draw_differences(
    figure: "Figure",
    values: Mapping[str, Sequence[float]],
    references: Mapping[str, str],
    papers: Mapping[str, float | None],
    metric: str,
) -> None:
    """Draw for each row its paired differences from the reference, their interval, and the paper's difference."""
    axes = figure.add_subplot()
    names = [name for name in values if references[name] != name]
    for height, name in enumerate(names):
        own, other = values[name], values[references[name]]
        difference = paired_difference(own, other)
        seeds = [a - b for a, b in zip(own, other, strict=True)]
        label = "ours: mean and 95 % interval" if not height else None
        width = difference.half_width or 0.0
        axes.errorbar(difference.mean, height, xerr=width, fmt="o", color="C0", capsize=3, label=label)
        axes.plot(seeds, [height] * len(seeds), "|", color="C0", markersize=9)
        paper, base = papers[name], papers[references[name]]
        if paper is not None and base is not None:
            axes.plot(paper - base, height + 0.25, "D", color="C1", markerfacecolor="none")
    if any(papers[name] is not None for name in names):
        axes.plot([], [], "D", color="C1", markerfacecolor="none", label="the paper")
    axes.plot([], [], "|", color="C0", markersize=9, linestyle="none", label="a seed")
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"difference from the reference, {UNITS[metric]}")
    axes.legend(fontsize="small")


def draw_curves(figure: "Figure", curves: Mapping[str, Sequence[Sequence[float]]], metric: str) -> None:
    """Draw for each row the mean over the seeds after each epoch, and the range of the seeds."""
    axes = figure.add_subplot()
    for number, (name, seeds) in enumerate(curves.items()):
        epochs = range(1, len(seeds[0]) + 1)
        columns = list(zip(*seeds, strict=True))
        axes.plot(epochs, [fmean(column) for column in columns], "o-", markersize=3, label=name, color=f"C{number}")
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, low, high, alpha=0.2, color=f"C{number}")
    axes.set(xlabel="epochs", ylabel=LABELS[metric])
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small")
