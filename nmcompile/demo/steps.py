"""Training steps of the dense and the sparse model, in turns, and where the time goes by which they differ."""

import copy
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile.backends.shared.timing import Turns, medians_in_turns, seconds
from nmcompile.config import CompileConfig
from nmcompile.demo.images import Images
from nmcompile.demo.training import BATCH

TURNS = Turns(20, 20, 0.0)
STAGES = "dense", "rewritten", "masked", "sparse"
"""Models of which each does more than the one before."""


class Steps(NamedTuple):
    """Seconds of a training step of each model, pruned shares of the MACs, and the number of rewritten layers."""

    times: Mapping[str, float]
    shares: Mapping[str, float]
    layers: int


def step_times(dense: nn.Module, sparse: nn.Module, images: Images) -> str:
    """Time a training step of each model in turns, and return the medians as text; the models' state stays as it is."""
    return described(*measured(dense, sparse, images, TURNS))


def measured(dense: nn.Module, sparse: nn.Module, images: Images, turns: Turns) -> Steps:
    """Time a training step of each model in turns; `sparse` has run before, so its layers are known."""
    x, y = images.train_images[:BATCH], images.train_labels[:BATCH]
    layers = nmcompile.inspect(sparse).layers
    rest = {layer.name: None for layer in layers if layer.status != "sparse"}

    def compiled(mode: str, config: CompileConfig) -> nn.Module:
        return nmcompile.compile(copy.deepcopy(dense).train(), mode, args=(x,), config=config)

    models = {
        "dense": copy.deepcopy(dense).train(),
        "rewritten": compiled("dense", CompileConfig(layers=rest)),
        "masked": compiled("t-weights", CompileConfig()),
        "sparse": copy.deepcopy(sparse).train(),
        "pays": compiled("training", CompileConfig(where="pays")),
    }
    steps = {name: partial(_step, model, x, y) for name, model in models.items()}
    times = medians_in_turns(steps, seconds, turns)
    shares = {name: nmcompile.inspect(models[name]).pruned_share or 0.0 for name in ("sparse", "pays")}
    return Steps(times, shares, len(layers) - len(rest))


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def described(times: Mapping[str, float], shares: Mapping[str, float], layers: int) -> str:
    """Return the times of a step as text, with the parts of what the sparse step takes longer than the dense one.

    Args:
        times: seconds of a step of the dense model; of its `layers` rewritten ones without pruning; with their weights
            masked; with their gradients pruned too ("sparse"); and pruned only where that pays.
        shares: the pruned shares of the MACs of "sparse" and "pays".
        layers: the number of rewritten layers.
    """
    ms = {name: time * 1e3 for name, time in times.items()}
    shown = ", ".join(f"{name} {ms[name]:.1f} ms" for name in ("dense", "sparse", "pays"))
    gains = " and ".join(f"{ms['dense'] / ms[name]:.2f} ({share:.0%})" for name, share in shares.items())
    more = ms["sparse"] - ms["dense"]
    host, masks, gradients = (ms[after] - ms[before] for before, after in pairwise(STAGES))
    parts = (
        f"of the {more:.1f} ms more, {host:.1f} ms are Python around {layers} layers ({host / layers:.2f} each),\n"
        f"{masks:.1f} ms masks and {gradients:.1f} ms pruned gradients, both with the change of their GEMMs"
    )
    if not 0 <= host <= ms["dense"]:  # rewriting alone makes no step faster, nor twice as slow
        parts = f"where the {more:.1f} ms more go is not known: other programs disturbed the steps"
    return (
        f"a step with a batch of {BATCH}: {shown} (pruned only where that pays):\n"
        f"{gains} times as fast as dense, with that share of the MACs pruned; layers this small gain little"
        + (f";\n{parts}" if more > 0 else "")
    )
