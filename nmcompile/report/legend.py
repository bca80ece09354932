"""The legend of a short report: plans as letters, reasons as numbers."""

from collections.abc import Iterable, Iterator, Mapping
from string import ascii_lowercase

from nmcompile.config import Phase
from nmcompile.report.layers import LayerReport
from nmcompile.report.refusals import refusal_reasons

DENSE = "dense"


class Legend:
    """Letters for what is pruned, numbers for reasons, in the order of the layers.

    Args:
        layers: the layers of the report.
    """

    def __init__(self, layers: Iterable[LayerReport]) -> None:
        known = tuple(layers)
        self.errors = _error_ranges(known)
        self.letters: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        for layer in known:
            if (plan := plan_of(layer)) != DENSE:
                self.letters.setdefault(plan, _letter(len(self.letters)))
            for reason in self._reasons(layer):
                self.numbers.setdefault(reason, len(self.numbers) + 1)

    def plan(self, layer: LayerReport) -> str:
        """Return the letter of a layer's plan, or `dense`."""
        return self.letters.get(plan_of(layer), DENSE)

    def why(self, layer: LayerReport) -> list[int]:
        """Return the numbers of the reasons that hold for a layer."""
        return [self.numbers[reason] for reason in self._reasons(layer)]

    def _reasons(self, layer: LayerReport) -> Iterator[str]:
        is_usual = layer.status in ("sparse", DENSE)
        if not is_usual:
            yield layer.status
        rows = [row for row in layer.plan.rows if row.reason and (is_usual or row.is_sparse)]
        yield from _with_phases((row.phase, row.reason) for row in rows)
        if layer.found is not None:
            yield f"mask by {layer.found.method}, output error {self.errors[layer.found.method]}"
        if layer.permutation:
            yield "an order of its channels was looked for; report.full() says what it won"
        pruned = [phase for phase in Phase if layer.plan.is_pruned(phase)]
        refused = [(phase, text) for phase in pruned for text in refusal_reasons(layer.refusals[phase])]
        yield from (f"no faster kernel: {text}" for text in _with_phases(refused))
        dense = [(phase, choice.why_dense) for phase, choice in layer.choices.items() if choice.why_dense]
        yield from (f"dense kernel: {text}" for text in _with_phases(dense))


def plan_of(layer: LayerReport) -> str:
    """Say what is pruned and quantized in a layer: `"forward, backward: W 2:4 transposable; update: dY 2:4 mvue"`."""
    found: dict[str, list[Phase]] = {}
    for phase in Phase:
        found.setdefault(layer.operands(phase), []).append(phase)
    if list(found) == [DENSE]:
        return DENSE
    return "; ".join(f"{', '.join(phase.value for phase in phases)}: {text}" for text, phases in found.items())


def _with_phases(told: Iterable[tuple[Phase, str]]) -> list[str]:
    """Return each text once, after the phases that it is about, unless it is about all."""
    found: dict[str, list[Phase]] = {}
    for phase, text in told:
        found.setdefault(text, []).append(phase)
    return [
        text if set(phases) == set(Phase) else f"{', '.join(dict.fromkeys(one.value for one in phases))}: {text}"
        for text, phases in found.items()
    ]


def _error_ranges(layers: Iterable[LayerReport]) -> Mapping[str, str]:
    """Return by method the least and the largest output error of the masks that were found from data."""
    errors: dict[str, list[float]] = {}
    for layer in layers:
        if layer.found is not None:
            errors.setdefault(layer.found.method, []).append(layer.found.error)
    ends = {method: (f"{min(found):.2%}", f"{max(found):.2%}") for method, found in errors.items()}
    return {method: least if least == most else f"{least} to {most}" for method, (least, most) in ends.items()}


def _letter(number: int) -> str:
    """Return a, b, ..., z, aa, bb, ..."""
    return ascii_lowercase[number % 26] * (number // 26 + 1)
