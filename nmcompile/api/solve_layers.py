"""Masks and kept weights of a model from calibration data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nmcompile.api.solved_parts import Part, Solved, SolvedParts, identify_run
from nmcompile.api.stops import Stop
from nmcompile.api.visit_layers import visit_layers
from nmcompile.config import CompileConfig
from nmcompile.errors import CalibrationError, ConfigError
from nmcompile.ir import operations as ops
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.solve import keeps_weights, solve
from nmcompile.pruning.pattern import NMPattern
from nmcompile.sharded import is_sharded
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.stored_weights import find_place

ONLY_MASKS = "wanda"  # the method for weights that no parameter holds, so that only their mask can be chosen


def solve_layers(
    trial: nn.Module, batches: Sequence[object], config: CompileConfig, folder: Path | None = None
) -> dict[Part, Solved]:
    """Find the mask of every pruned weight, and its new values where the method changes them.

    Each layer is solved from the inputs that the layers pruned before give it, see `visit_layers`.

    Args:
        trial: a compiled model; neither its weights nor its masks are changed.
        batches: as `calibrate` takes them.
        config: method and refit.
        folder: where each solved part is saved; parts that it holds already are not solved again.

    Returns:
        The parts of weights that the data reaches.

    Raises:
        CalibrationError: no data; a batch that forward does not run on, or that gives NaN or infinity.
        ConfigError: a weight is split among processes; the folder holds parts of another run.
    """
    check_whole(trial, batches)
    rules = config.masks, config.refit, *(row for triple in triples_of(trial) for row in triple.graphs.plan.rows)
    solved = SolvedParts(folder, identify_run(trial, rules, batches) if folder is not None else "")

    def solver(stop: Stop, hessian: Hessian) -> Solved:
        pattern = stop.row.pattern
        assert pattern is not None
        return solve_part(trial, stop, hessian, config, pattern)

    visit_layers(trial, batches, solved, solver, "finding masks", not keeps_weights(config.masks, config.refit))
    return solved.parts


def solve_part(trial: nn.Module, stop: Stop, hessian: Hessian, config: CompileConfig, pattern: NMPattern) -> Solved:
    """Solve the weight of one call for a pattern."""
    place = find_place(trial, stop.triple.site, stop.weight)
    method, refit = (config.masks, config.refit) if place else (ONLY_MASKS, False)
    found = solve(method, stop.layer, stop.weight, hessian, pattern, stop.row.is_transposable, refit, stop.rounding)
    is_kept = torch.equal(found.weight, ops.apply_mask(stop.weight, found.mask))
    weight, step = (None, None) if is_kept else (found.weight, found.step)
    solved = Solved(found.mask, weight, place, method, found.error, step)
    if found.bias is None or stop.bias is None:
        return solved
    bias = (stop.bias.double() + found.bias).to(stop.bias)
    return replace(solved, bias=bias, bias_place=find_place(trial, stop.triple.site, stop.bias))


def check_whole(trial: nn.Module, batches: Sequence[object]) -> None:
    """Raise if there is no batch, or if a weight is split among processes."""
    if not batches:
        raise CalibrationError("the calibration data is empty; give at least one batch")
    if split := next((name for name, parameter in trial.named_parameters() if is_sharded(parameter)), None):
        raise ConfigError(
            f"{split!r} is split among processes; compile the model with masks from calibration data before it is "
            "sharded"
        )
