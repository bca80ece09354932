"""FATReLU: ReLUs that also drop small positive values, so that fewer are left for 4:8 to prune (Kurtz et al. 2020)."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from nmcompile.api.calibrate import EXAMPLES, check_data, floats_of, squared_error, squared_norm
from nmcompile.api.decompile import is_compiled
from nmcompile.checks import check_kind, check_number
from nmcompile.errors import CalibrationError, ConfigError
from nmcompile.quantization import Histogram
from nmcompile.three_gemm.copy_model import share_copy
from nmcompile.three_gemm.run_model import evaluating, run_batch

SHARES = tuple(step / 20 for step in range(19, 0, -1))
"""Candidates for the share of the positive values that the thresholds drop."""


@torch.no_grad()
def fatrelu(
    model: nn.Module, calibration: Iterable[object], *, max_change: float = 0.05, inplace: bool = False
) -> nn.Module:
    """Replace each `nn.ReLU` by an `nn.Threshold` that drops positive values too: y = x if x > T, else 0.

    Each threshold is a quantile of the positive values that its ReLU gives. One quantile serves all, the highest that
    changes the outputs of the model by `max_change` at most.

    Args:
        model: a plain module; functional ReLUs stay.
        calibration: batches, as `calibrate` takes them.
        max_change: the relative change of the outputs, ‖y - ŷ‖ / ‖y‖ over the first batches, that is accepted.
        inplace: edit the given module tree, else a copy that shares every tensor.

    Returns:
        A module of the model's class; the same ReLUs if no threshold changes the outputs that little.

    Raises:
        ConfigError: the model is compiled, or has no `nn.ReLU`.
        CalibrationError: no data, or a batch that forward does not run on.
    """
    check_kind("model", model, nn.Module, "a module")
    check_number(
        "max_change", max_change, Real, 0, 1, "the relative change of the outputs that is accepted, from 0 to 1"
    )
    check_kind("inplace", inplace, bool, "True or False")
    check_data(calibration)
    if is_compiled(model):
        raise ConfigError("fatrelu takes a plain model; call it before compile")
    batches = list(calibration)
    trial = share_copy(model)
    relus = {name: module for name, module in trial.named_modules() if name and type(module) is nn.ReLU}
    if not relus:
        raise ConfigError(f"{type(model).__name__} has no nn.ReLU module, and functional ReLUs cannot be replaced")
    if not batches:
        raise CalibrationError("the calibration data is empty; give at least one batch")
    with evaluating(model), evaluating(trial):
        thresholds = _search(model, trial, relus, batches, max_change)
    changed = model if inplace else share_copy(model)
    _replace(changed, thresholds)
    return changed


def _search(
    model: nn.Module, trial: nn.Module, relus: Mapping[str, nn.ReLU], batches: Sequence[object], most: float
) -> dict[str, float]:
    """Return the threshold of each ReLU, by name; none if every share changes the outputs too much."""
    observed = _observe(trial, relus, batches)
    examples = batches[:EXAMPLES]
    dense = _outputs(model, examples)
    whole = sum(map(squared_norm, dense))
    for share in SHARES:
        thresholds = {name: _threshold(histogram, share) for name, histogram in observed.items()}
        _replace(trial, thresholds)
        if sum(map(squared_error, _outputs(trial, examples), dense)) <= most**2 * whole:
            return thresholds
    return {}


def _observe(trial: nn.Module, relus: Mapping[str, nn.ReLU], batches: Sequence[object]) -> dict[str, Histogram]:
    """Return histograms of the results of the ReLUs that the data reaches."""
    observed: dict[str, Histogram] = {}

    def look(name: str, result: Tensor) -> None:
        observed.setdefault(name, Histogram()).observe(result)

    hooks = [relu.register_forward_hook(lambda _, __, y, name=name: look(name, y)) for name, relu in relus.items()]
    try:
        for number, batch in enumerate(batches):
            run_batch(trial, batch, f"calibration batch {number}")
            _check_finite(observed, number)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: histogram for name, histogram in observed.items() if histogram.largest > 0}


def _check_finite(observed: Mapping[str, Histogram], number: int) -> None:
    broken = next((name for name, histogram in observed.items() if not histogram.is_finite), None)
    if broken is not None:
        raise CalibrationError(
            f"module {broken!r}: calibration batch {number} gives NaN or infinity here; remove such samples"
        )


def _threshold(histogram: Histogram, share: float) -> float:
    """Return the threshold that drops a share of the positive values."""
    positive = float(histogram.counts.sum())
    return histogram.percentile(100 * (histogram.zeros + share * positive) / (histogram.zeros + positive))


def _replace(model: nn.Module, thresholds: Mapping[str, float]) -> None:
    """Replace each of these ReLUs, or thresholds of an earlier trial, wherever the model holds it."""
    new: dict[nn.Module, nn.Module] = {}
    for name, threshold in thresholds.items():
        old = model.get_submodule(name)
        new[old] = nn.Threshold(threshold, 0.0, bool(getattr(old, "inplace", False))).train(old.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def _outputs(model: nn.Module, batches: Sequence[object]) -> list[Tensor]:
    found = (run_batch(model, batch, f"calibration batch {number}") for number, batch in enumerate(batches))
    return [output for outputs in found for output in floats_of(outputs)]
