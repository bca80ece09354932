"""The decision of which phases of a layer stay dense, from times that were measured or predicted."""

import itertools
from collections.abc import Iterator, Mapping

from nmcompile.config import Phase
from nmcompile.ir.captured import Captured
from nmcompile.ir.plan import LayerPlan

Parts = tuple[tuple[Phase, ...], ...]
"""Phases that are pruned, grouped if they can only be pruned together; `()` is the plain layer."""
Times = Mapping[Parts, float]
"""Seconds of a step of one layer by the parts that it prunes."""


def choices_of(plan: LayerPlan) -> Iterator[Parts]:
    """Yield every choice among the parts that a layer can prune."""
    parts = plan.parts()
    return itertools.chain.from_iterable(itertools.combinations(parts, count) for count in range(len(parts) + 1))


def decide(times: Times, margin: float, verdict: str) -> dict[Phase, str]:
    """Return the phases to leave dense, with the reason.

    Args:
        times: of all choices among the parts of a layer.
        margin: × the dense time, which pruning must stay below.
        verdict: the beginning of the reason.
    """
    best = min((parts for parts in times if parts), key=lambda parts: times[parts])
    kept = set(itertools.chain(*best)) if times[best] < margin * times[()] else set()
    everything = max(times, key=len)
    reason = (
        f"{verdict}: {times[everything] * 1e3:.2f} ms with everything pruned, "
        f"{times[best] * 1e3:.2f} at best, {times[()] * 1e3:.2f} dense"
    )
    return {phase: reason for part in everything for phase in part if phase not in kept}


def optional_phases(plan: LayerPlan, captured: Captured) -> tuple[Phase, ...]:
    """Return the pruned phases of a layer that may be left dense.

    A weight that was trained with a mask computes other results without it.
    """
    weight = next(site.weight for site in captured.sites if site.layer.name == plan.layer.name)
    carries = weight in captured.carried and plan.find(Phase.FORWARD, "weight")
    return tuple(itertools.chain(*plan.parts()[1 if carries else 0 :]))
