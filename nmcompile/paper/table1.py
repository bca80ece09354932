"""Table 1 as a run: which operands of which phases each configuration prunes, counted in a real step (Section 1).

One step of a small ResNet in each mode. Every GEMM of the layers between the first convolution and the last linear
layer is asked which of its two operands is N:M along the axis that the GEMM sums over: only that can make it faster.
Nothing is read from the plan.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import nmcompile
from nmcompile.config import Phase
from nmcompile.demo.images import load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.ir.layers import ConvLayer
from nmcompile.ir.plan import Operand
from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.paper.operands import GemmCall, gemm_operands
from nmcompile.pruning.pattern import NMPattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 32
PATTERNS = tuple(map(NMPattern.parse, ("1:2", "2:4", "4:8")))
"""From the strictest to the loosest: each contains the one before it."""
SUMMED = {
    (Phase.FORWARD, "weight"): 1,
    (Phase.FORWARD, "input"): 1,
    (Phase.BACKWARD, "weight"): 0,
    (Phase.BACKWARD, "grad_output"): 1,
    (Phase.UPDATE, "grad_output"): 0,
    (Phase.UPDATE, "input"): 0,
}
"""The dim of each operand of a convolution along which its GEMM sums: in-channels, out-channels, the batch."""
ROWS: dict[str, tuple[str, tuple[bool, bool, bool]]] = {
    "weights": ("Weights", (True, False, False)),
    "t-weights": ("T-Weights", (True, True, False)),
    "activations": ("Activations", (True, False, False)),
    "gradients": ("Gradients", (False, False, True)),
    "inference": ("Inference: weights and activations", (True, False, False)),
    "training": ("Training: T-weights and gradients", (True, True, True)),
}
"""The paper's rows by mode, and the phases that it marks."""
CAPTION = (
    f"The operands that are N:M along the axis of the sum, in a step of a small ResNet (batch {BATCH}), and the pruned "
    "GEMMs out of all between the first and the last layer. The paper's Table 1 marks the phases with ✓. Plot: the "
    "share of multiplications (MACs) that the zeros of pruned operands leave in those layers, by phase."
)


def pattern_along(x: Tensor, dim: int) -> NMPattern | None:
    """Return the strictest pattern that every block along `dim` obeys; `None` if there is none."""
    return next((pattern for pattern in PATTERNS if _obeys(x, dim, pattern)), None)


def _obeys(x: Tensor, dim: int, pattern: NMPattern) -> bool:
    if x.shape[dim] % pattern.block:
        return False
    blocks = x.unflatten(dim, (-1, pattern.block))
    return bool(((blocks != 0).sum(dim + 1) <= pattern.n_keep).all())


def pruned_operands(call: GemmCall) -> dict[Operand, NMPattern]:
    """Return the operands of a GEMM that are N:M along the axis of its sum."""
    found = {name: pattern_along(x, SUMMED[call.phase, name]) for name, x in call.operands.items()}
    return {name: pattern for name, pattern in found.items() if pattern is not None}


def step_calls(mode: str) -> list[GemmCall]:
    """Return the GEMMs of a step in a mode, except those of the first and the last layer."""
    images = load_images(None)
    torch.manual_seed(0)
    model = ResNet(images.train_images.shape[-1], 10)
    x, y = images.train_images[:BATCH], images.train_labels[:BATCH]
    sparse = nmcompile.compile(model, mode, args=(x,), backend="reference", calibration=[x])
    calls = gemm_operands(sparse, lambda: F.cross_entropy(sparse(x), y).backward())
    return [call for call in calls if call.layer.name.startswith("layers.")]


def macs_left(calls: Sequence[GemmCall]) -> float:
    """Return the share of the MACs of one phase that pruned operands leave, if their zeros were independent."""
    sizes = [call.layer.parameters * positions(call) for call in calls]
    densities = []
    for call in calls:
        patterns = pruned_operands(call).values()
        densities.append(torch.tensor([pattern.n_keep / pattern.block for pattern in patterns]).prod().item())
    return sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)


def positions(call: GemmCall) -> int:
    """Return the output positions of a convolution; the forward GEMM has the input alone to tell them."""
    if "grad_output" in call.operands:
        return call.operands["grad_output"][:, 0].numel()
    assert isinstance(call.layer, ConvLayer)
    size = call.operands["input"].shape[-1]
    return len(call.operands["input"]) * (-(-size // call.layer.stride[0])) ** 2  # they keep the size but for strides


def compute() -> Findings:
    rows: list[list[object]] = []
    left: dict[str, list[float]] = {}
    for mode, (name, marks) in ROWS.items():
        cells: list[str] = []
        calls = {phase: [call for call in step_calls(mode) if call.phase is phase] for phase in Phase}
        for phase, mark in zip(Phase, marks, strict=True):
            cells += [_cell(calls[phase]), "✓" if mark else "✗"]
        rows.append([name, *cells])
        left[name] = [macs_left(calls[phase]) for phase in Phase]
    heads = [head for phase in Phase for head in (phase.value, "the paper")]
    return Findings(["configuration", *heads], rows, CAPTION, lambda figure: draw(figure, left), {"MACs left": left})


def _cell(calls: Sequence[GemmCall]) -> str:
    pruned = [found for call in calls if (found := pruned_operands(call))]
    names = sorted({f"{name} {pattern}" for found in pruned for name, pattern in found.items()})
    return f"{', '.join(names) or 'dense'}: {len(pruned)} of {len(calls)}"


def draw(figure: "Figure", left: dict[str, list[float]]) -> None:
    axes = figure.add_subplot()
    for number, phase in enumerate(Phase):
        heights = [index + 0.28 * (number - 1) for index in range(len(left))]
        axes.barh(heights, [100 * shares[number] for shares in left.values()], height=0.26, label=phase.value)
    axes.set_yticks(range(len(left)), list(left))
    axes.invert_yaxis()
    axes.set_xlabel("MACs left, % of dense")
    figure.legend(fontsize="small", loc="outside right upper")


EXPERIMENT = Analysis("table1", "Table 1: what each configuration prunes, counted from operands", compute)
