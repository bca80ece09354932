"""Table 6: the time of pruning gradients as a share of a training step (Appendix A.3).

The paper measured a non-optimized implementation on a GPU. Here the time of the pruning operators comes from torch's
profiler, added up over all layers of a step, over the time of a step of the dense network. Native kernels prune; the
pairs of Appendix A.2 have none, so that row is the reference operator, which is not optimized either.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nmcompile.backends.shared.timing import Call, Turns, medians_in_turns, seconds
from nmcompile.errors import ConfigError
from nmcompile.paper.experiment import Findings, Options
from nmcompile.paper.methods import gradients
from nmcompile.paper.networks import build_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRUNING = ("nmcompile::cpu_prune", "nmcompile::prune")
"""Custom operators that prune: a native kernel, and the reference."""
VARIANTS: dict[str, tuple[str, str, float | None]] = {
    "MVUE 1:2": ("mvue", "1:2", 15.0),
    "MVUE 2:4": ("mvue", "2:4", 95.0),
    "approx-MVUE 2:4": ("mvue_approx", "2:4", 27.0),
    "MVUE 2:4, pairs of A.2": ("mvue_pairs", "2:4", None),
    "MVUE 4:8": ("mvue", "4:8", None),
    "MVUE 1:4": ("mvue", "1:4", None),
}
"""Operator, pattern, and the paper's overhead in percent."""
SIZES = {"quick": (32, 32), "full": (64, 224)}
"""Batch and pixels by scale."""
NETWORKS = {"quick": "resnet18-cifar", "full": "resnet50"}
TURNS = Turns(3, 3, 0.0)
CAPTION = (
    "Time of pruning all gradients of a training step, in % of a dense step (fp32), on this machine, and the paper's "
    "overhead (ResNet-50, GPU, non-optimized)."
)


@dataclass(frozen=True)
class Overheads:
    """The experiment: times a step of each variant in turns."""

    name: str = "table6"
    title: str = "Table 6: overhead of the operators"

    def run(self, options: Options) -> Findings:
        """Time a step of the dense network, and the pruning in a step of each variant.

        Raises:
            ConfigError: there is no such network, or data is given.
        """
        if options.data is not None:
            raise ConfigError("table6 times steps on random images: leave out --data")
        network = options.model or NETWORKS[options.scale]
        batch, pixels = SIZES[options.scale]
        dense, pruning = measure(network, torch.randn(batch, 3, pixels, pixels))
        overheads = {name: 100 * time / dense for name, time in pruning.items()}
        rows = [[name, 1e3 * pruning[name], share, VARIANTS[name][2]] for name, share in overheads.items()]
        headers = ["operator", "pruning, ms a step", "% of a dense step", "the paper's %"]
        data: dict[str, object] = {"network": network, "batch": batch, "pixels": pixels, "dense step, ms": 1e3 * dense}
        notes = [f"{network}, batch {batch}, {pixels} pixels: a dense step takes {1e3 * dense:.0f} ms"]
        return Findings(headers, rows, CAPTION, lambda figure: draw(figure, overheads), data, notes)


def measure(network: str, x: Tensor) -> tuple[float, dict[str, float]]:
    """Return the seconds of a dense step, and those of the pruning in a step of each variant."""
    labels = torch.arange(len(x)) % 10
    dense = build_network(network, x, 10, seed=0).train()
    steps: dict[str, Call] = {}
    for name, (operator, pattern, _) in VARIANTS.items():
        (model,) = gradients(operator, pattern)(copy.deepcopy(dense), [x])
        steps[name] = partial(_step, model, x, labels)
    whole = medians_in_turns({"dense": partial(_step, dense, x, labels)}, seconds, TURNS)["dense"]
    return whole, medians_in_turns(steps, pruning_seconds, TURNS)


def _step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()


def pruning_seconds(call: Call) -> float:
    """Return the seconds that the pruning operators in a call take."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    microseconds: float = sum(event.cpu_time_total for event in found.key_averages() if event.key in PRUNING)
    return microseconds / 1e6


def draw(figure: "Figure", overheads: dict[str, float]) -> None:
    axes = figure.add_subplot()
    names = list(overheads)
    axes.plot(list(overheads.values()), range(len(names)), "o", label="ours")
    papers = {index: paper for index, name in enumerate(names) if (paper := VARIANTS[name][2]) is not None}
    axes.plot(list(papers.values()), list(papers), "D", markerfacecolor="none", label="the paper")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="% of a dense step")
    axes.grid(axis="x")
    axes.legend()


EXPERIMENT = Overheads()
