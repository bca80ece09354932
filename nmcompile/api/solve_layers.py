"""Masks and kept weights of a model from calibration data, layer by layer.

All batches run together, each on a thread of its own, up to the next layer that is not solved. When all wait there, the
layer is solved from their inputs, and they go on with its new weight. So each layer sees the inputs that the pruned
model gives it, after one forward pass, whatever code the model is made of.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nmcompile.api.solved_parts import Part, Solved, SolvedParts, identify_run
from nmcompile.config import CompileConfig, Phase
from nmcompile.errors import CalibrationError, ConfigError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import Layer, LinearLayer
from nmcompile.ir.plan import PlanRow
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.solve import solve
from nmcompile.pausable import pause, pausing
from nmcompile.sharded import is_sharded
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Results, Values, observing
from nmcompile.three_gemm.run_model import evaluating, run_batch
from nmcompile.three_gemm.stored_weights import find_place
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.three_gemm.unquantized import Unquantized

Run = Generator["Stop", None, None]
ONLY_MASKS = "wanda"  # the method for weights that no parameter holds, so that only their mask can be chosen


@dataclass(frozen=True)
class Stop:
    """A call of a layer that waits until its weight is solved."""

    part: Part
    triple: GemmTriple
    weight: Tensor
    dense_input: Tensor

    def input(self) -> Tensor:
        """Return the input as the GEMM reads it: pruned if the plan prunes it."""
        row, x = self._pruning(), self.dense_input
        if row is None or row.pattern is None or row.operator is None:
            return x
        mask = ops.prune_mask(x, row.operator, row.pattern.n_keep, row.pattern.block, self.triple.layer.channel_dim)
        return ops.apply_mask(x, mask)

    def reads_same(self, other: "Stop") -> bool:
        """Return whether two linear layers read one tensor, as the projections to queries, keys and values do."""
        are_alike = all(isinstance(stop.triple.layer, LinearLayer) and not stop._pruning() for stop in (self, other))
        return are_alike and self.dense_input is other.dense_input

    def _pruning(self) -> PlanRow | None:
        return self.triple.graphs.plan.find(Phase.FORWARD, "input")


@torch.no_grad()
def solve_layers(
    trial: nn.Module, batches: Sequence[object], config: CompileConfig, folder: Path | None = None
) -> dict[Part, Solved]:
    """Find the mask of every pruned weight, and its new values where the method changes them, in eval mode.

    A weight that a batch reads several times (a tied one, or one of a recurrent layer) is solved once, from the inputs
    of all its calls in the dense model.

    Args:
        trial: a compiled model; neither its weights nor its masks are changed.
        batches: as `calibrate` takes them. All are in memory at a time, each with the activations that are alive where
            it waits.
        config: method and refit.
        folder: where each solved part is saved; parts that it holds already are not solved again.

    Returns:
        The parts of weights that the data reaches.

    Raises:
        CalibrationError: no data; a batch that forward does not run on, or that gives NaN or infinity.
        ConfigError: a weight is split among processes; the folder holds parts of another run.
    """
    _check(trial, batches)
    rules = config.masks, config.refit, *(row for triple in triples_of(trial) for row in triple.graphs.plan.rows)
    solved = SolvedParts(folder, identify_run(trial, rules, batches) if folder is not None else "")
    solver = _Solver(trial, config, solved)
    with evaluating(trial), _without_autocast(trial), solver.bar:
        solver.solve_repeated(batches)
        solver.solve_others(batches)
    return solved.parts


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Compute in the dtypes of the operands inside this context."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _check(trial: nn.Module, batches: Sequence[object]) -> None:
    if not batches:
        raise CalibrationError("the calibration data is empty; give at least one batch")
    if split := next((name for name, parameter in trial.named_parameters() if is_sharded(parameter)), None):
        raise ConfigError(
            f"{split!r} is split among processes; compile the model with masks from calibration data before it is "
            "sharded"
        )


class _Solver:
    """The loop over the layers of one model."""

    def __init__(self, trial: nn.Module, config: CompileConfig, solved: SolvedParts) -> None:
        self.trial = trial
        self.config = config
        self.solved = solved
        self.order = {triple: number for number, triple in enumerate(triples_of(trial))}
        weights = {triple.site.weight for triple in self.order if triple.mask is not None}
        self.bar = tqdm(total=len(weights), desc="finding masks", unit="weight", leave=False, disable=None)
        self.last: tuple[Mapping[int, Stop], Hessian] | None = None

    def solve_repeated(self, batches: Sequence[object]) -> None:
        """Solve the weights that a batch reads more than once."""
        counts = Counter(stop.part for stop in self._dense_stops(batches, 0))
        repeated = {part for part, count in counts.items() if count > 1 and part not in self.solved.parts}
        found: dict[Part, tuple[Stop, Hessian]] = {}
        for number in range(len(batches) if repeated else 0):
            for stop in self._dense_stops(batches, number):
                if stop.part in repeated:
                    _, hessian = found.setdefault(stop.part, (stop, _hessian_for(stop)))
                    _add(hessian, stop, number)
        for stop, hessian in found.values():
            self._solve(stop, hessian)

    def _dense_stops(self, batches: Sequence[object], number: int) -> Iterator[Stop]:
        """Yield every call of a layer with a mask while one batch runs through the dense model."""
        unsolved = SolvedParts()
        with observing(self.order, lambda triple: _Waiting(triple, unsolved)), self._run(batches, number) as run:
            yield from run

    def solve_others(self, batches: Sequence[object]) -> None:
        """Solve the other weights in the order in which they are called."""
        with observing(self.order, lambda triple: _Waiting(triple, self.solved)), ExitStack() as stack:
            runs = [stack.enter_context(self._run(batches, number)) for number in range(len(batches))]
            waiting = _advance(runs, range(len(runs)))
            while waiting:
                # Where batches took different ways, the first of the modules is solved first.
                part = min(waiting.values(), key=lambda stop: (self.order[stop.triple], stop.part.row)).part
                here = {number: stop for number, stop in sorted(waiting.items()) if stop.part == part}
                self._solve(next(iter(here.values())), self._hessian(here))
                waiting = {n: stop for n, stop in waiting.items() if n not in here} | _advance(runs, here)

    def _run(self, batches: Sequence[object], number: int) -> AbstractContextManager[Run]:
        device = torch.get_default_device()

        def run() -> None:
            with torch.no_grad(), device:
                run_batch(self.trial, batches[number], f"calibration batch {number}")

        return closing(pausing(run, Stop))

    def _hessian(self, stops: Mapping[int, Stop]) -> Hessian:
        """Return the Hessian of the inputs at these stops, by the number of their batch."""
        if self.last is not None and _read_same(stops, self.last[0]):
            return self.last[1]
        self.last = None  # frees its memory before the next one is made
        hessian = _hessian_for(next(iter(stops.values())))
        for number, stop in stops.items():
            _add(hessian, stop, number)
        self.last = stops, hessian
        return hessian

    def _solve(self, stop: Stop, hessian: Hessian) -> None:
        row = stop.triple.graphs.plan.find(Phase.FORWARD, "weight")
        assert row is not None and row.pattern is not None
        place = find_place(self.trial, stop.triple.site, stop.weight)
        method, refit = (self.config.masks, self.config.refit) if place else (ONLY_MASKS, False)
        found = solve(method, _layer_of(stop), stop.weight, hessian, row.pattern, row.is_transposable, refit)
        is_kept = torch.equal(found.weight, ops.apply_mask(stop.weight, found.mask))
        self.solved.add(stop.part, Solved(found.mask, None if is_kept else found.weight, place, method, found.error))
        self.bar.update()


class _Waiting(Unquantized):
    """An observer that stops at a layer until its weight is solved; a weight that stays unsolved runs dense."""

    def __init__(self, triple: GemmTriple, solved: SolvedParts) -> None:
        super().__init__(triple)
        self.solved = solved

    def run(self, phase: Phase, values: Values) -> Results:
        weight, mask, input = values["weight"], values.get("weight_mask"), values.get("input")
        if mask is None or weight is None or input is None or not self._fits(input):
            return super().run(phase, values)
        part = Part(self.triple.site.weight, int(mask.storage_offset()) // int(mask.stride(0)))
        if part not in self.solved.parts:
            pause(Stop(part, self.triple, weight, input))
        found = self.solved.parts.get(part)
        if found is None:
            return super().run(phase, {**values, "weight_mask": torch.ones_like(mask)})
        new = weight if found.weight is None else found.weight.to(weight.dtype)
        return super().run(phase, {**values, "weight": new, "weight_mask": found.mask})

    def _fits(self, input: Tensor) -> bool:
        """Return whether the GEMM takes this input; if it does not, its own error is to be raised."""
        layer = self.triple.layer
        return input.shape[layer.channel_dim] == layer.in_features * layer.groups


def _advance(runs: Sequence[Run], numbers: Iterable[int]) -> dict[int, Stop]:
    """Let batches run on, one after another, and return where they wait now, except those that have ended."""
    stops = {number: next(runs[number], None) for number in numbers}
    return {number: stop for number, stop in stops.items() if stop is not None}


def _read_same(stops: Mapping[int, Stop], others: Mapping[int, Stop]) -> bool:
    return stops.keys() == others.keys() and all(stop.reads_same(others[number]) for number, stop in stops.items())


def _layer_of(stop: Stop) -> Layer:
    return replace(stop.triple.layer, weight_shape=tuple(stop.weight.shape))


def _hessian_for(stop: Stop) -> Hessian:
    return Hessian(_layer_of(stop), stop.weight.device)


def _add(hessian: Hessian, stop: Stop, number: int) -> None:
    """Add the inputs of one call to a Hessian."""
    input = stop.input()
    if not bool(input.isfinite().all()):
        raise CalibrationError(
            f"layer {stop.triple.layer.name!r}: calibration batch {number} gives NaN or infinity here; remove such "
            "samples"
        )
    hessian.add(input)
