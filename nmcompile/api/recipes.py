"""Training schemes as generators: each yields the model of its next phase, for any training loop to train.

    for model in scheme_b(model, calibration=loader):
        train(model)

Every phase shares the parameters of the given model, so one optimizer can serve them all; the last model is the result.
A mask or clip that a phase needs from the previous one is computed when the loop asks for the phase.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from nmcompile.api.calibrate import check_data
from nmcompile.api.compile import compile as compile_model
from nmcompile.api.decompile import decompile, is_compiled
from nmcompile.api.distill import distill as distill
from nmcompile.checks import check_kind
from nmcompile.config import CompileConfig, given_config

SR_STE = 2e-4  # λ of Zhou et al. 2021


def scheme_a(
    model: nn.Module, *, calibration: Iterable[object], config: CompileConfig | None = None, inplace: bool = False
) -> Iterator[nn.Module]:
    """Train sparse weights with SR-STE, sparse activations, 4 bits and learned clips (§6.4, scheme A, one phase).

    Args:
        model: untrained, or pretrained.
        calibration: batches for the first clips, which training then moves; see `nmcompile.calibrate`.
        config: layers and ends; refresh, SR-STE and clip are the scheme's (masks of every step).
        inplace: edit the given module tree.
    """
    chosen = replace(given_config(config), refresh=1, sr_ste=SR_STE, clip="pact")
    yield compile_model(model, "inference", config=chosen, calibration=calibration, inplace=inplace)


def scheme_b(
    model: nn.Module, *, calibration: Iterable[object], config: CompileConfig | None = None, inplace: bool = False
) -> Iterator[nn.Module]:
    """Train with sparse activations in full precision; fix the weight masks; train sparse with 4 bits (§6.4, scheme B).

    Args and yields as `scheme_a`; the masks of the second phase come from the weights that the first has trained.
    """
    chosen = given_config(config)
    if calibration is not None:
        check_data(calibration)  # before the first phase, not after it
    sparse = compile_model(model, "activations", config=chosen, inplace=inplace)
    yield sparse
    fixed = replace(chosen, refresh=None, clip="pact")
    yield compile_model(sparse, "inference", config=fixed, calibration=calibration, inplace=inplace)


def asp(model: nn.Module, *, config: CompileConfig | None = None, inplace: bool = False) -> Iterator[nn.Module]:
    """Train dense, compute masks once, and train again with the same schedule: NVIDIA's recipe (arXiv 2104.08378)."""
    check_kind("model", model, nn.Module, "a module")
    yield decompile(model) if is_compiled(model) else model
    yield compile_model(model, "weights", config=replace(given_config(config), refresh=None), inplace=inplace)
