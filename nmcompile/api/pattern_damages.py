"""The damage that each pattern does to the outputs of a model, layer by layer."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nmcompile.api.calibrate import EXAMPLES, floats_of, squared_error, squared_norm
from nmcompile.api.pattern_costs import Measured, Pattern
from nmcompile.api.solve_layers import check_whole, solve_part
from nmcompile.api.solved_parts import Part, Solved, SolvedParts
from nmcompile.api.stops import Replacing, Stop
from nmcompile.api.visit_layers import visit_layers
from nmcompile.config import CompileConfig
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.solve import keeps_weights
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import observing
from nmcompile.three_gemm.run_model import evaluating, run_batch


def measure_patterns(
    trial: nn.Module, batches: Sequence[object], config: CompileConfig, patterns: Sequence[NMPattern]
) -> dict[str, Measured]:
    """Measure the damage of each pattern to each pruned weight, by the full name of the weight.

    Args:
        trial: a compiled model; it is not changed.
        batches: as `calibrate` takes them.
        config: the method and refit of the masks.
        patterns: those that do not divide the channels of a layer are left out for it.
    """
    check_whole(trial, batches)
    probe = _Probe(trial, config, patterns)
    changes = not keeps_weights(config.masks, config.refit)
    visit_layers(trial, batches, SolvedParts(), probe.solve, "measuring patterns", changes)
    found = _changes(trial, batches[:EXAMPLES], probe.worst)
    return {weight: probe.measured(weight, change) for weight, change in found.items()}


class _Probe:
    """The errors that patterns leave in the outputs of single layers; the model stays dense."""

    def __init__(self, trial: nn.Module, config: CompileConfig, patterns: Sequence[NMPattern]) -> None:
        self.trial = trial
        self.config = config
        self.patterns = patterns
        self.errors: dict[str, dict[NMPattern, float]] = defaultdict(lambda: defaultdict(float))
        self.macs: Counter[str] = Counter()
        self.worst: dict[Part, Solved] = {}
        self.bits: dict[str, int] = {}

    def solve(self, stop: Stop, hessian: Hessian) -> Solved:
        """Prune a weight by each pattern, and note the errors."""
        fitting = [pattern for pattern in self.patterns if stop.fits(pattern)]
        found = {pattern: solve_part(self.trial, stop, hessian, self.config, pattern) for pattern in fitting}
        name, grid = stop.part.weight, stop.triple.graphs.plan.grid_row("weight")
        for pattern, solved in found.items():
            self.errors[name][pattern] = max(self.errors[name][pattern], solved.error)
        if found:
            self.worst[stop.part] = max(found.values(), key=lambda solved: solved.error)
        self.macs[name] += hessian.tokens * stop.weight.numel()
        self.bits[name] = grid.grid.bits if grid and grid.grid else 8 * stop.weight.itemsize
        return Solved(torch.ones_like(stop.weight, dtype=torch.bool), None, None, self.config.masks, 0.0, None)

    def measured(self, weight: str, change: float) -> Measured:
        """Return the measurements of a weight, with the change of the outputs that its worst pattern makes."""
        parts = [solved for part, solved in self.worst.items() if part.weight == weight]
        return Measured(
            _damages(self.errors[weight], change),
            self.macs[weight],
            sum(one.mask.numel() for one in parts),
            self.bits[weight],
        )


def _damages(errors: Mapping[NMPattern, float], change: float) -> dict[Pattern, float]:
    """Return the damage of each pattern, which grows with the square of the error that it leaves; dense does none."""
    most = max(errors.values()) or 1.0
    return {None: 0.0} | {pattern: change * (error / most) ** 2 for pattern, error in errors.items()}


@torch.no_grad()
def _changes(trial: nn.Module, batches: Sequence[object], parts: Mapping[Part, Solved]) -> dict[str, float]:
    """Return the squared relative change of the outputs if one weight alone is pruned, by weight."""
    weights = list(dict.fromkeys(part.weight for part in parts))
    with evaluating(trial):
        dense = _outputs(trial, batches, {})
        whole = sum(map(squared_norm, dense)) or 1.0
        changes = {}
        for weight in tqdm(weights, desc="measuring layers", unit="weight", leave=False, disable=None):
            alone = _outputs(trial, batches, {part: one for part, one in parts.items() if part.weight == weight})
            changes[weight] = sum(map(squared_error, alone, dense)) / whole
    return changes


def _outputs(trial: nn.Module, batches: Sequence[object], parts: Mapping[Part, Solved]) -> list[Tensor]:
    with observing(triples_of(trial), lambda triple: Replacing(triple, parts)):
        return [output for batch in batches for output in floats_of(run_batch(trial, batch))]
