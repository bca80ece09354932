"""State that an earlier compilation left in a model: masks, clips, and which layers carry a mask."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from nmcompile.config import Phase
from nmcompile.ir.plan import LayerPlan
from nmcompile.quantization import Grid
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.grid_steps import ActivationStep, GridSteps
from nmcompile.three_gemm.record import RECORD, never_masked
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.finalized import FINALIZED, Finalized
from nmcompile.training.find_masks import masks_among
from nmcompile.training.masks import WeightMask


@dataclass(frozen=True)
class Earlier:
    """State that the next compilation of a model takes over.

    Args:
        masks: by the full name of the weight.
        steps: steps of quantized activations, by the full name of the layer and the operand.
        weight_steps: grids of weights that were rounded to them, and their steps, by the full name of the layer.
        carried: by the full name of the weight, the fields of `LayerConfig` that a masked layer was given.
        uncalled: full names of the layers that were bypassed, or have never run masked although their model ran.
    """

    masks: Mapping[str, WeightMask] = field(default_factory=dict)
    steps: Mapping[tuple[str, str | None], ActivationStep] = field(default_factory=dict)
    weight_steps: Mapping[str, tuple[Grid, Tensor]] = field(default_factory=dict)
    carried: Mapping[str, frozenset[str]] = field(default_factory=dict)
    uncalled: frozenset[str] = frozenset()

    def __or__(self, other: "Earlier") -> "Earlier":
        return Earlier(
            {**self.masks, **other.masks},
            {**self.steps, **other.steps},
            {**self.weight_steps, **other.weight_steps},
            {**self.carried, **other.carried},
            self.uncalled | other.uncalled,
        )


def earlier_of(model: nn.Module) -> Earlier:
    """Collect the state of every compiled or finalized model that `model` is or holds."""
    result = Earlier()
    for path, root in model.named_modules():
        if RECORD in root.__dict__:
            known = root.__dict__[RECORD].program.captured.bypassed
            result |= earlier_layers(list(triples_of(root)), path)
            result |= Earlier(uncalled=frozenset(full_name(path, name) for name in known))
        elif FINALIZED in root.__dict__:
            record: Finalized = root.__dict__[FINALIZED]
            obeyed = {full_name(path, name): mask for name, mask in _obeyed(root, record)}
            steps = {full_name(path, name): step for name, step in _held(root, record)}
            result |= Earlier(obeyed, weight_steps=steps, carried=dict.fromkeys(obeyed, frozenset({"weight"})))
    return result


def earlier_layers(layers: Sequence[GemmTriple], path: str = "") -> Earlier:
    """Collect the state of the layers of one compiled model, which is at `path`."""
    uncalled = frozenset(never_masked(layers))
    masked = [triple for triple in layers if triple.mask is not None and triple.layer.name not in uncalled]
    return Earlier(
        {full_name(path, name): mask for name, mask in masks_among(layers).items()},
        {(full_name(path, t.layer.name), s.row.operand): s for t in layers for s in t.steps.activations},
        {full_name(path, triple.layer.name): step for triple in layers for step in _weight_step(triple.steps)},
        {full_name(path, triple.site.weight): _fields(triple.graphs.plan) for triple in masked},
        frozenset(full_name(path, name) for name in uncalled),
    )


def _weight_step(steps: GridSteps) -> list[tuple[Grid, Tensor]]:
    """Return the grid that a weight was rounded to, and its step; nothing if SAWB finds it."""
    if steps.weight_grid is not None and steps.weight is not None:
        return [(steps.weight_grid, steps.weight)]
    return [] if steps.unused is None else [steps.unused]


def _fields(plan: LayerPlan) -> frozenset[str]:
    """Return the fields of `LayerConfig` that the plan of a layer follows."""
    found = {
        "weight": plan.find(Phase.FORWARD, "weight"),
        "input": plan.find(Phase.FORWARD, "input"),
        "backward_gradient": plan.find(Phase.BACKWARD, "grad_output"),
        "update_gradient": plan.find(Phase.UPDATE, "grad_output"),
        "weight_bits": plan.grid_row("weight"),
        "input_bits": plan.grid_row("input"),
    }
    return frozenset(name for name, row in found.items() if row is not None)


def _obeyed(root: nn.Module, record: Finalized) -> Iterator[tuple[str, WeightMask]]:
    """Yield the masks of a finalized model whose weights are still zero where the mask is."""
    for name, (mask, place) in record.masks.items():
        weight = None if place else _plain_weight(root, name)
        if weight is None or weight.shape != mask.tensor.shape:
            continue
        if not bool(weight[~mask.tensor.to(weight.device)].any()):
            yield name, mask


def _held(root: nn.Module, record: Finalized) -> Iterator[tuple[str, tuple[Grid, Tensor]]]:
    """Yield the grids of a finalized model, and their steps, that still hold the weight, by layer."""
    for layer, one in record.grids.items():
        weight = _plain_weight(root, one.weight)
        if weight is not None and one.holds(weight):
            yield layer, (one.grid, one.step)


def _plain_weight(root: nn.Module, name: str) -> Tensor | None:
    """Return the values of a parameter; None if there is no such parameter, or it has none."""
    path, _, attribute = name.rpartition(".")
    try:
        weight = getattr(root.get_submodule(path), attribute, None)
    except AttributeError:  # the layer is gone
        return None
    return weight.detach() if type(weight) is nn.Parameter and not weight.is_meta else None


def full_name(path: str, name: str) -> str:
    """Join the path of a module and a name in it; either may be empty."""
    return f"{path}.{name}" if path and name else path or name
