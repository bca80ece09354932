"""Figures of one step of one layer, which only a run with real data can tell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSample:
    """Figures of one step of a layer; None for what the layer does not do.

    Args:
        noise: the variance that pruning adds to the weight's gradient, relative to that gradient: ‖dW' - dW‖² / ‖dW‖²,
            where dW' is computed from the pruned dY. An unbiased estimator gives 0 bias and this variance.
        natural_zeros: the share of zeros in the layer's input.
        forced_zeros: the share of zeros after the input was pruned.
        kept_magnitude: Σ|w| over the kept weights / Σ|w| over all.
    """

    noise: float | None = None
    natural_zeros: float | None = None
    forced_zeros: float | None = None
    kept_magnitude: float | None = None
