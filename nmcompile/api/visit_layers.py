"""The engine that finds masks from data: it visits the layers of a model, with the inputs of all batches at each.

All batches run together, each on a thread of its own, up to the next layer that is not solved. When all wait there, the
layer is solved from their inputs, and they go on with its new weight. So each layer sees the inputs that the pruned
model gives it, after one forward pass, whatever code the model is made of. Where weights change, every batch runs
through the dense model too, and waits at the same layers: its inputs there say which outputs the layer should give.

They say so half. The nearest weights in least squares give weaker outputs the less the inputs tell about the dense
ones, and layer by layer the signal fades. So a layer aims at the middle between what the dense weights give for the
inputs of both models (benchmarks/masks.py: SmolLM2, transposable, is 7.9 × dense with the whole way, 2.7 with half).
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nmcompile.api.movable_biases import MovableBiases
from nmcompile.api.solved_parts import Part, Solved, SolvedParts
from nmcompile.api.stops import Stop, Waiting, dense_layers
from nmcompile.errors import CalibrationError
from nmcompile.one_shot.hessian import Hessian
from nmcompile.pausable import pausing
from nmcompile.quantization import Histogram
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import observing
from nmcompile.three_gemm.run_model import evaluating, run_batch
from nmcompile.training.find_masks import masks_of

TO_DENSE = 0.5  # of the way from an input in the pruned model to that in the dense one

Run = Generator[Stop, None, None]
Solver = Callable[[Stop, Hessian], Solved]
"""(a call, Hessian of the inputs of all calls that read the same weight) -> what the weight becomes."""


@torch.no_grad()
def visit_layers(
    trial: nn.Module, batches: Sequence[object], solved: SolvedParts, solve: Solver, title: str, changes: bool
) -> None:
    """Solve the weight of each masked layer, in call order and in eval mode, and let the batches go on with it.

    A weight that a batch reads several times (a tied one, or one of a recurrent layer) is solved first, from the inputs
    of all its calls in the dense model.

    Args:
        trial: a compiled model; neither its weights nor its masks are changed.
        batches: as `calibrate` takes them. All are in memory at a time, each with the activations that are alive where
            it waits, and with a thread of its own. Forwards must not keep tensors on modules for later: another batch
            would read them.
        solved: takes the results; the parts that it holds already are not solved again.
        solve: solves one part of a weight.
        title: of the progress bar.
        changes: whether weights and biases are changed to give the outputs of the dense model.

    Raises:
        CalibrationError: a batch that forward does not run on, or that gives NaN or infinity.
    """
    masks = {triple.mask for triple in triples_of(trial) if triple.mask is not None}
    with tqdm(total=len(masks), desc=title, unit="weight", leave=False, disable=None) as bar:

        def add(stop: Stop, hessian: Hessian, clip: float | None = None) -> None:
            solved.add(stop.part, replace(solve(stop, hessian), clip=clip))
            bar.update()

        with evaluating(trial), _without_autocast(trial), _without_a_clock(), _told_of_threads(len(batches)):
            visit = _Visit(trial, batches, solved, changes)
            for stop, hessian in visit.repeated():
                add(stop, hessian)
            visit.others(add)


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Compute in the dtypes of the operands inside this context."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _without_a_clock() -> Iterator[None]:
    """Choose no kernel by its time inside this context: sums that round otherwise can end in other masks."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=before != (True, False))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _told_of_threads(count: int) -> Iterator[None]:
    """Say what to do if the system makes no more threads."""
    try:
        yield
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise CalibrationError(
            f"the calibration data are {count} batches, each of which waits on a thread of its own, and the system "
            "makes no more threads; give fewer and larger batches"
        ) from error


class _Visit:
    """One pass of all batches through a model."""

    def __init__(self, trial: nn.Module, batches: Sequence[object], solved: SolvedParts, changes: bool) -> None:
        self.trial = trial
        self.batches = batches
        self.solved = solved
        self.changes = changes
        self.order = {triple: number for number, triple in enumerate(triples_of(trial))}
        self.elements = sum(mask.tensor.numel() for mask in masks_of(trial).values())
        self.biases = MovableBiases(trial)
        self.last: _Inputs | None = None

    def repeated(self) -> Iterator[tuple[Stop, Hessian]]:
        """Yield the weights that a batch reads more than once, after a pass of its own if there are any."""
        counts: Counter[Part] = Counter()
        for stop in self._dense_stops(0):
            counts[stop.part] += 1
            self.biases.note(stop)
        repeated = {part for part, count in counts.items() if count > 1 and part not in self.solved.parts}
        found: dict[Part, tuple[Stop, Hessian]] = {}
        for number in range(len(self.batches) if repeated else 0):
            for stop in self._dense_stops(number):
                if stop.part in repeated and stop.part not in found:
                    found[stop.part] = stop, Hessian(stop.layer, stop.weight.device)
                if stop.part in repeated:
                    _add(found[stop.part][1], stop, number, None, None)
        yield from found.values()

    def _dense_stops(self, number: int) -> Iterator[Stop]:
        """Yield every call of a layer with a mask while one batch runs through the dense model."""
        unsolved = SolvedParts()
        with observing(self.order, lambda triple: Waiting(triple, unsolved.parts)), self._run(number) as run:
            yield from run

    def others(self, visited: Callable[[Stop, Hessian, float | None], None]) -> None:
        """Hand on the other weights in the order in which they are called."""
        numbers = range(len(self.batches))
        with observing(self.order, lambda triple: Waiting(triple, self.solved.parts)), ExitStack() as stack:
            runs = [stack.enter_context(self._run(number)) for number in numbers]
            dense = [stack.enter_context(self._run(number, is_dense=True)) for number in numbers if self.changes]
            waiting, aims = _advance(runs, numbers), _advance(dense, range(len(dense)))
            while waiting:
                # Where batches took different ways, the first of the modules is solved first.
                part = min(waiting.values(), key=lambda stop: (self.order[stop.triple], stop.part.row)).part
                here, there = _at(part, waiting), _at(part, aims)
                inputs = self._inputs(here, there)
                visited(next(iter(here.values())), inputs.hessian, inputs.clip)
                if self._is_whole():
                    return  # no batch needs to go on: what follows, a language model's head say, has no mask
                waiting = {n: stop for n, stop in waiting.items() if n not in here} | _advance(runs, here)
                aims = {n: stop for n, stop in aims.items() if n not in there} | _advance(dense, there)

    def _is_whole(self) -> bool:
        """Return whether the solved parts are all elements of all masks."""
        return sum(part.mask.numel() for part in self.solved.parts.values()) == self.elements

    def _run(self, number: int, is_dense: bool = False) -> AbstractContextManager[Run]:
        device, stream = torch.get_default_device(), _current_stream(self.trial)

        def run() -> None:
            with torch.no_grad(), device, stream, dense_layers() if is_dense else nullcontext():
                run_batch(self.trial, self.batches[number], f"calibration batch {number}")

        return closing(pausing(run, Stop))

    def _inputs(self, stops: Mapping[int, Stop], aims: Mapping[int, Stop]) -> "_Inputs":
        """Return what is known of the inputs at these stops, by the number of their batch."""
        first = next(iter(stops.values()))
        is_centred = self.changes and self.biases.may_move(first)
        if self.last is not None and self.last.serves(stops, aims, is_centred):
            return self.last
        self.last = None  # frees its memory before the next one is made
        hessian, clip = Hessian(first.layer, first.weight.device, is_centred), _clip(stops.values())
        for number, stop in stops.items():
            _add(hessian, stop, number, clip, aims.get(number))
        self.last = _Inputs(stops, aims, hessian, clip)
        return self.last


@dataclass(frozen=True)
class _Inputs:
    """The inputs of the calls that read one weight, by the number of the batch, and what was computed from them."""

    stops: Mapping[int, Stop]
    aims: Mapping[int, Stop]
    hessian: Hessian
    clip: float | None

    def serves(self, stops: Mapping[int, Stop], aims: Mapping[int, Stop], is_centred: bool) -> bool:
        """Return whether other calls have the same inputs."""
        is_alike = self.hessian.is_centred == is_centred
        return is_alike and _read_same(stops, self.stops) and _read_same(aims, self.aims)


def _at(part: Part, stops: Mapping[int, Stop]) -> dict[int, Stop]:
    """Return the stops at a part of a weight, in the order of the batches."""
    return {number: stop for number, stop in sorted(stops.items()) if stop.part == part}


def _current_stream(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context that makes the caller's CUDA stream, and its device, those of another thread."""
    is_on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return torch.cuda.stream(torch.cuda.current_stream()) if is_on_gpu else nullcontext()


def _advance(runs: Sequence[Run], numbers: Iterable[int]) -> dict[int, Stop]:
    """Let batches run on, one after another, and return where they wait now, except those that have ended."""
    stops = {number: next(runs[number], None) for number in numbers}
    return {number: stop for number, stop in stops.items() if stop is not None}


def _read_same(stops: Mapping[int, Stop], others: Mapping[int, Stop]) -> bool:
    return stops.keys() == others.keys() and all(stop.reads_same(others[number]) for number, stop in stops.items())


def _clip(stops: Iterable[Stop]) -> float | None:
    """Return the clip of the grid of a layer's inputs with the least squared error; None if they are not quantized."""
    seen, (first, *rest) = Histogram(), stops
    if first.grid is None:
        return None
    for stop in (first, *rest):
        seen.observe(stop.pruned_input())
    return seen.best_clip(first.grid) if seen.has_clip else None


def _add(hessian: Hessian, stop: Stop, number: int, clip: float | None, aim: Stop | None) -> None:
    """Add the inputs of one call to a Hessian, rounded if there is a clip, beside those of the dense model."""
    input = stop.input(clip)
    if not bool(input.isfinite().all()):
        raise CalibrationError(
            f"layer {stop.triple.layer.name!r}: calibration batch {number} gives NaN or infinity here; remove such "
            "samples"
        )
    dense = stop.dense_input
    if aim is not None and _are_alike(aim.dense_input, dense):
        dense = dense.lerp(aim.dense_input, TO_DENSE)
    hessian.add(input, None if input is dense else dense)


def _are_alike(aim: Tensor, input: Tensor) -> bool:
    """Return whether an input of the dense model belongs to that of the pruned one: a router may send other tokens."""
    return aim.shape == input.shape and bool((aim - input).norm() <= aim.norm())
