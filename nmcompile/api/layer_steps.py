"""A step of one layer alone, for each choice of the parts that it prunes: to time them against each other."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.api.choose_phases import Parts, choices_of
from nmcompile.api.pipeline import lowered
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.config import Phase
from nmcompile.ir.plan import LayerPlan, Plan
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.record import Compilation, record_of
from nmcompile.three_gemm.run_model import evaluating
from nmcompile.three_gemm.stored_weights import stored_weight
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.earlier import earlier_layers

Steps = Mapping[Parts, Callable[[], object]]


class _Inputs(Observer):
    """An observer that notes the layout of the input."""

    def __init__(self, triple: GemmTriple, inputs: dict[str, Tensor]) -> None:
        super().__init__(triple)
        self.inputs = inputs

    def run(self, phase: Phase, values: Values) -> Results:
        input = values["input"]
        assert input is not None
        self.inputs[self.triple.layer.name] = torch.empty_like(input, device="meta")
        return super().run(phase, values)


@torch.no_grad()
def inputs_of(trial: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Return for each layer a meta tensor like its input in size and layout, requiring a gradient if the input does.

    If the layer pads apart from its GEMM, the input is already padded, and is padded again when timed, in all variants.
    """
    inputs: dict[str, Tensor] = {}
    with evaluating(trial), observing(triples_of(trial), lambda triple: _Inputs(triple, inputs)):
        trial(*args, **kwargs)
    facts, asked = record_of(trial)[1].program.captured.facts, asks_gradient(args, kwargs)
    return {name: x.requires_grad_(trial.training and (asked or not facts[name].first)) for name, x in inputs.items()}


def asks_gradient(args: Args, kwargs: Kwargs) -> bool:
    """Return whether an input of the model requires a gradient, and so those of its first layers do."""
    leaves = pytree.tree_leaves((args, kwargs))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def steps_of(trial: nn.Module, record: Compilation, triple: GemmTriple, layout: Tensor) -> Steps:
    """Return a step of one layer for each choice of pruned parts: in `train()` with backward, else the forward alone.

    Args:
        trial: compiled, everything pruned.
        record: its record.
        triple: the layer.
        layout: its input, as `inputs_of` found it; the step takes random values.
    """
    weight, device = stored_weight(trial, triple.site), device_of(trial, triple)
    dtype = layout.dtype if weight is None else weight.dtype
    values = torch.randn(triple.layer.weight_shape, device=device, dtype=dtype) if weight is None else weight.detach()
    bias = torch.zeros(triple.layer.out_features, device=device, dtype=dtype) if triple.layer.has_bias else None
    input = torch.empty_like(layout, device=device).normal_()
    operands = [input, values, bias]
    if trial.training:
        needed = layout.requires_grad, True, True
        operands = [x if x is None else x.requires_grad_(n) for x, n in zip(operands, needed, strict=True)]
    layers = dict(_variants(trial, record, triple))
    return {parts: _step(layer, operands, trial.training) for parts, layer in layers.items()}


def device_of(trial: nn.Module, triple: GemmTriple) -> torch.device:
    """Return the device that a layer runs on."""
    weight = stored_weight(trial, triple.site)
    return next(trial.parameters()).device if weight is None else weight.device


def _step(run: Callable[..., Tensor], operands: Sequence[Tensor | None], training: bool) -> Callable[[], object]:
    wanted = [x for x in operands if x is not None and x.requires_grad]

    def step() -> object:
        with torch.set_grad_enabled(training):
            output = run(*operands)
            return torch.autograd.grad(output, wanted, torch.ones_like(output)) if training else output

    return step


def _variants(
    trial: nn.Module, record: Compilation, triple: GemmTriple
) -> Iterator[tuple[Parts, Callable[..., Tensor]]]:
    plan = triple.graphs.plan
    for kept in choices_of(plan):
        dropped = {phase: "" for part in plan.parts() if part not in kept for phase in part}
        yield kept, _layer(trial, record, triple, plan.without(dropped) if dropped else plan)


def _layer(trial: nn.Module, record: Compilation, triple: GemmTriple, plan: LayerPlan) -> Callable[..., Tensor]:
    """Return a layer by another plan, as it would run in the layer's place."""
    name, captured = plan.layer.name, record.program.captured
    if not plan.rewritten:
        graph = lowered(captured, Plan((plan,)), (ReferenceBackend(),)).layers[name][Phase.FORWARD]
        return lambda input, *rest: graph(plan.layer.prepare(input)[0], *(x for x in rest if x is not None))[0]
    program = lowered(captured, Plan((plan,)), record.backends)
    factory = TripleFactory(trial, program, record.config, 0, earlier_layers([triple]))
    return factory.make(triple.site)
