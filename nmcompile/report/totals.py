"""The totals of a report as text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.report.layers import BITS

if TYPE_CHECKING:
    from nmcompile.report.report import Report


PREDICTED = "Predictions are of all GEMMs of a step with their pruning; other operators gain nothing."
UNCOUNTED = "no example showed their shapes (args= of nmcompile, dynamic=False of torch.compile)"


def title(report: "Report") -> str:
    """Return the model, the mode, and how many layers are sparse."""
    totals = report.summary
    return f"{report.model_name}, mode {report.mode!r}: {totals['sparse_layers']} of {totals['layers']} layers sparse"


def total_lines(report: "Report") -> list[str]:
    """Return the totals, a sentence or two each; phases with equal totals share one."""
    totals = report.summary
    share = totals["sparse_parameters"] / max(1, totals["model_parameters"])
    lines = [f"parameters in sparse layers: {share:.1%} of the model's {totals['model_parameters'] / 1e6:.3f} M"]
    if totals["uncaptured_parameters"]:
        lines.append(
            f"parameters in products that are not layers, at most: {totals['uncaptured_parameters'] / 1e6:.3f} M"
        )
    phases: dict[str, list[str]] = {}
    for phase, values in totals["phases"].items():
        if values["macs"]:
            phases.setdefault(_phase(values), []).append(phase)
    lines += [f"{', '.join(names)}: {text}" for text, names in phases.items()]
    if totals["uncounted_layers"]:
        lines.append(f"MACs of {totals['uncounted_layers']} layers are unknown and not counted: {UNCOUNTED}")
    step = [] if report.step_times is None else [f"{str(report.step_times).capitalize()}."]
    return [*lines, _gain(report), *step, *_predicted(report)]


def _predicted(report: "Report") -> list[str]:
    """Return the predicted gains, with where they come from; machines of the same basis share a line."""
    by_basis: dict[str, list[str]] = {}
    for one in report.predictions:
        by_basis.setdefault(one.basis, []).append(f"{one.gain:.2f} × on {one.machine}")
    lines = [f"predicted {', '.join(gains)}: {basis}" for basis, gains in by_basis.items()]
    return [*lines, PREDICTED] if lines else []


def _phase(values: Mapping[str, float]) -> str:
    rest = values["expected_macs"] / values["macs"]
    return (
        f"{values['sparse_share']:.1%} of {values['macs'] / 1e6:.1f} M MACs in sparse GEMMs; "
        f"expected MACs {rest:.1%} of dense, BOPs {values['bops'] / (values['macs'] * BITS**2):.1%}"
    )


def _gain(report: "Report") -> str:
    """Return how much the choice of kernels gained, or that there was none."""
    choices = [choice for layer in report.layers for choice in layer.choices.values()]
    measured = [choice for choice in choices if choice.speedup is not None]
    metas = (meta for layer in report.layers for phase in Phase for meta in layer.graphs.three.metas(phase))
    if not choices and any(meta.choice is not None for meta in metas):
        return "Sparse or dense kernels are chosen when their GEMM first runs; no speed-up is claimed before."
    sparse = [choice for choice in choices if choice.kernel != "dense"]
    if not sparse:
        return "Every GEMM runs a dense kernel on the pruned operands; no speed-up is claimed."
    dense_time = sum(choice.dense_seconds or 0 for choice in measured)
    time = sum(choice.seconds or 0 for choice in measured)
    return (
        f"{len(sparse)} of {len(choices)} GEMMs that ran had a sparse kernel; those measured take "
        f"{time * 1e3:.1f} ms, and {dense_time * 1e3:.1f} ms with dense kernels on the same pruned operands. "
        f"{_share(report)}"
        "Whether a layer is faster than without pruning, CompileConfig(where='pays') measures."
    )


def _share(report: "Report") -> str:
    """Return how much of the model is pruned: without that, a speed-up of 1.00 may be one of nothing."""
    share = report.pruned_share
    return "" if share is None else f"Pruned operands take part in {share:.1%} of the MACs of all three GEMMs. "
