"""A look at the layers of a compiled model during one step: gradients' noise, zeros of inputs, masks and times."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmcompile.api.pipeline import lowered
from nmcompile.api.whole_step import whole_step
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.captured import Captured
from nmcompile.ir.layer_sample import LayerSample
from nmcompile.ir.plan import LayerPlan, Plan
from nmcompile.three_gemm.copy_model import own_copy
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.record import record_of
from nmcompile.three_gemm.triple import GemmTriple


@dataclass
class LayerFigures:
    """Sums over the calls of one layer in a step; norms are squared."""

    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    gradient: float = 0.0
    noise: float = 0.0
    inputs: int = 0
    natural: int = 0
    forced: int = 0
    weight: float = 0.0
    kept: float = 0.0

    def sample(self) -> LayerSample:
        """Return the figures as shares."""
        return LayerSample(
            noise=_ratio(self.noise, self.gradient),
            natural_zeros=_ratio(self.natural, self.inputs),
            forced_zeros=_ratio(self.forced, self.inputs),
            kept_magnitude=_ratio(self.kept, self.weight),
        )


class Sampler(Observer):
    """An observer that adds the figures of its layer's calls; results are those of the layer, bit for bit.

    It draws no random number of its own.
    """

    def __init__(self, triple: GemmTriple, figures: LayerFigures, captured: Captured) -> None:
        super().__init__(triple)
        self.figures = figures
        self.dense_update = _dense_update(triple.graphs.plan, captured)

    def run(self, phase: Phase, values: Values) -> Results:
        device = next(value.device for value in values.values() if value is not None)
        start = _now(device)
        results = super().run(phase, values)
        self.figures.seconds[phase] += _now(device) - start
        with torch.no_grad():
            if phase is Phase.FORWARD:
                self._look_at_input(values)
                self._look_at_weight(values)
            elif phase is Phase.UPDATE and self.dense_update is not None:
                self._look_at_gradient(values, results, self.dense_update)
        return results

    def _look_at_input(self, values: Values) -> None:
        row, x = self.triple.graphs.plan.find(Phase.FORWARD, "input"), values["input"]
        if row is None or row.pattern is None or row.operator is None or x is None:
            return
        mask = ops.prune_mask(x, row.operator, row.pattern.n_keep, row.pattern.block, self.triple.layer.channel_dim)
        self.figures.inputs += x.numel()
        self.figures.natural += int((x == 0).sum())
        self.figures.forced += int((~mask | (x == 0)).sum())

    def _look_at_weight(self, values: Values) -> None:
        weight, mask = values["weight"], values.get("weight_mask")
        if weight is not None and mask is not None:
            size = weight.detach().abs()
            self.figures.weight += float(size.sum(dtype=torch.float64))
            self.figures.kept += float(ops.apply_mask(size, mask).sum(dtype=torch.float64))

    def _look_at_gradient(self, values: Values, results: Results, dense: Callable[[Values], Tensor]) -> None:
        pruned, exact = results[0], dense(values)
        if pruned is not None:
            self.figures.gradient += _squared_norm(exact)
            self.figures.noise += _squared_norm(pruned - exact)


def run_copy(root: nn.Module, args: Args, kwargs: Kwargs) -> tuple[nn.Module, dict[str, LayerSample]]:
    """Return a copy of a model that made a step, and the figures of its layers; nothing of the model is changed."""
    copied = own_copy(root)
    captured, triples = record_of(copied)[1].program.captured, list(triples_of(copied))
    figures = {triple.layer.name: LayerFigures() for triple in triples}
    devices = {parameter.device for parameter in copied.parameters() if parameter.is_cuda}
    step = whole_step(copied, args, kwargs)
    with torch.random.fork_rng(list(devices)):
        step()  # makes masks and chooses kernels
        with observing(triples, lambda triple: Sampler(triple, figures[triple.layer.name], captured)):
            step()
    return copied, {name: found.sample() for name, found in figures.items()}


def _dense_update(plan: LayerPlan, captured: Captured) -> Callable[[Values], Tensor] | None:
    """Return the update GEMM on the unpruned dY; None if the layer does not prune it, or prunes X too."""
    if not plan.find(Phase.UPDATE, "grad_output") or plan.find(Phase.UPDATE, "input"):
        return None
    dense = plan.without({Phase.UPDATE: ""})
    graph = lowered(captured, Plan((dense,)), (ReferenceBackend(),)).layers[plan.layer.name][Phase.UPDATE]
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]

    def run(values: Values) -> Tensor:
        gradient: Tensor = graph(*(values[name] for name in names))[0]
        return gradient

    return run


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _squared_norm(x: Tensor) -> float:
    """Return the sum of squares; those of float16 gradients are no numbers of float16."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def totals(figures: Mapping[str, LayerFigures]) -> LayerFigures:
    """Return the sums over layers."""
    whole = LayerFigures()
    for one in figures.values():
        for phase in Phase:
            whole.seconds[phase] += one.seconds[phase]
        for name in ("gradient", "noise", "inputs", "natural", "forced", "weight", "kept"):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
    return whole
