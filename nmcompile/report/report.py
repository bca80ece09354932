"""The report on a model: what is pruned in each layer, why, and which kernels ran; as text, markdown, HTML and JSON."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from nmcompile.checks import check_kind, check_path
from nmcompile.config import Phase
from nmcompile.errors import ConfigError, nearest
from nmcompile.files.write_atomically import write_atomically
from nmcompile.ir.plan import Reverted
from nmcompile.ir.prediction import Prediction
from nmcompile.ir.program import Program
from nmcompile.ir.step_times import StepTimes
from nmcompile.report.coverage import all_parameters, covered_parameters, uncaptured_parameters
from nmcompile.report.diff import ReportDiff, diff_reports
from nmcompile.report.graphs import inline_forward
from nmcompile.report.layers import LayerReport, Observation, layer_report
from nmcompile.report.saved_report import read_report
from nmcompile.report.to_html import to_html
from nmcompile.report.to_json import to_json
from nmcompile.report.to_notebook import to_notebook
from nmcompile.report.to_screen import to_screen
from nmcompile.report.to_text import to_full_text, to_markdown
from nmcompile.report.weight_bytes import weight_bytes

Masks = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]
"""Yields by layer the name, the weight and its mask, of a model that may have gone by then."""


def no_masks() -> Iterable[tuple[str, Tensor, Tensor]]:
    """Yield the masks of a model that is not compiled: none."""
    return ()


@dataclass(frozen=True)
class Report:
    """The plan and its results, layer by layer.

    `masks` looks at a live model, `step_times` were measured, `predictions` come from cost models.
    """

    model_name: str
    mode: str
    layers: tuple[LayerReport, ...]
    program: Program
    reverted: Reverted | None = None
    masks: Masks = field(default=no_masks, repr=False, compare=False)
    step_times: StepTimes | None = None
    predictions: tuple[Prediction, ...] = ()

    def layer(self, name: str) -> LayerReport:
        """Return one layer by name; raise for an unknown name, with the nearest one."""
        check_kind("name", name, str, "the name of a layer")
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ConfigError(f"the model has no layer {name!r}; {nearest(name, (layer.name for layer in self.layers))}")

    @property
    def graph(self) -> fx.Graph | None:
        """Return the whole model with every rewritten layer as its forward nodes, or None (see `graph_reason`)."""
        return inline_forward(self.program)

    @property
    def graph_reason(self) -> str:
        """Return why there is no whole graph."""
        return self.program.captured.whole_reason

    @property
    def pruned_share(self) -> float | None:
        """Return the share of the MACs of all three GEMMs that read a pruned operand; None if no shape is known."""
        macs = {layer.name: layer.macs for layer in self.layers if layer.macs is not None}
        pruned = (macs.get(layer.name, 0) for layer in self.layers for phase in Phase if layer.density(phase) < 1)
        total = len(Phase) * sum(macs.values())
        return sum(pruned) / total if total else None

    @property
    def summary(self) -> dict[str, Any]:
        """Return totals: layers, parameters, `pruned_share`, and per phase that share, expected MACs and BOPs.

        `parameters` counts the parameters of GEMMs, each once; `uncaptured_parameters` are read by code that is not a
        layer. The MACs of `uncounted_layers`, whose shapes are unknown, are in none of them. `bytes` are those of all
        parameters in fp32, `dense` and with pruned weights `stored` as kept values and positions.
        """
        captured = self.program.captured
        sparse = [layer for layer in self.layers if layer.status == "sparse"]
        uncaptured = uncaptured_parameters(captured)
        weights = {site.layer.name: site.weight for site in captured.sites}
        return {
            "layers": len(self.layers),
            "sparse_layers": len(sparse),
            "uncounted_layers": sum(layer.macs is None for layer in self.layers),
            "model_parameters": all_parameters(captured),
            "parameters": covered_parameters(captured, (layer.name for layer in self.layers)) + uncaptured,
            "uncaptured_parameters": uncaptured,
            "sparse_parameters": covered_parameters(captured, (layer.name for layer in sparse)),
            "pruned_share": self.pruned_share,
            "bytes": weight_bytes(self.layers, weights, all_parameters(captured)),
            "phases": {phase.value: self._totals(phase) for phase in Phase},
        }

    def _totals(self, phase: Phase) -> dict[str, float | None]:
        """Sum up one GEMM of the layers whose shapes are known."""
        known = [(layer, layer.macs) for layer in self.layers if layer.macs is not None]
        total = sum(macs for _, macs in known)
        covered = sum(macs for layer, macs in known if layer.density(phase) < 1)
        expected = sum(macs * layer.density(phase) for layer, macs in known)
        bops = sum(macs * layer.density(phase) * layer.bit_products(phase) for layer, macs in known)
        return {
            "sparse_share": covered / total if total else None,
            "macs": total or None,
            "expected_macs": expected if total else None,
            "bops": bops if total else None,
        }

    def __str__(self) -> str:
        return to_screen(self)

    def full(self) -> str:
        """Return all as text: a row for every layer, the kernels with their times, and the modules left out."""
        return to_full_text(self)

    def _repr_html_(self) -> str:
        return to_notebook(self)

    def to_markdown(self) -> str:
        """Return the full text as GitHub-flavoured markdown."""
        return to_markdown(self)

    def to_json(self) -> str:
        """Return versioned JSON: `schema_version` 1."""
        return to_json(self)

    def diff(self, other: "Report | str") -> ReportDiff:
        """Return what changed from this report to another one: of the model after a change, or on another machine.

        Args:
            other: a report, or the JSON text of one.

        Raises:
            ConfigError: neither, or JSON that another version wrote.
        """
        check_kind("other", other, Report | str, "a report, or the JSON text that Report.to_json returned")
        text = other.to_json() if isinstance(other, Report) else other
        return diff_reports(read_report(self.to_json()), read_report(text))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file that needs nothing else: table, reasons, graphs, masks of a live model, times, JSON.

        Raises:
            ConfigError: `path` is not a path.
            FileError: the file cannot be written; nothing was changed there.
        """
        write_atomically(check_path("path", path), to_html(self).encode())


def build_report(
    program: Program,
    observed: Mapping[str, Observation],
    *,
    model_name: str,
    mode: str,
    reverted: Reverted | None = None,
    masks: Masks = no_masks,
    step_times: StepTimes | None = None,
    predictions: tuple[Prediction, ...] = (),
) -> Report:
    """Build the report of a program; `observed` is empty if nothing was compiled."""
    ran = any(seen.called for seen in observed.values())
    unseen = "bypassed: the model ran without calling it" if ran else "not called yet" if observed else ""
    nothing = Observation(called=False, positions=None)
    layers = (layer_report(program, plan, observed.get(plan.layer.name, nothing), unseen) for plan in program.plan)
    return Report(model_name, mode, tuple(layers), program, reverted, masks, step_times, predictions)
