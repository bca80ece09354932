"""Reasons why faster backends did not take a GEMM or the pruning of its operand; an equal reason is listed once."""

from collections import defaultdict
from collections.abc import Iterable

from nmcompile.config import Phase
from nmcompile.ir.node_meta import Kind, Refusal
from nmcompile.report.layers import LayerReport

ByPhase = dict[Phase, list[str]]


def layers_by_refusal(layers: Iterable[LayerReport]) -> dict[str, ByPhase]:
    """Return the names of the layers for each reason, phase by phase.

    Phases that prune nothing are left out: the plan says why they are dense.
    """
    found: dict[str, ByPhase] = {}
    for layer in layers:
        for phase in filter(layer.plan.is_pruned, Phase):
            for reason in refusal_reasons(layer.refusals[phase]):
                found.setdefault(reason, {phase: [] for phase in Phase})[phase].append(layer.name)
    return found


def refusal_reasons(refusals: Iterable[Refusal]) -> list[str]:
    """Spell out refusals, merging backends that give the same reason: `"gemm: cusparselt, cpu: ..."`."""
    backends = defaultdict[tuple[Kind, str], list[str]](list)
    for one in refusals:
        backends[one.kind, one.reason].append(one.backend)
    return [f"{kind}: {', '.join(names)}: {reason}" for (kind, reason), names in backends.items()]
