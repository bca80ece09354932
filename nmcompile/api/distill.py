"""Recovery of a pruned model: a few hundred steps of distillation from the dense one."""

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from nmcompile.api.calibrate import check_data, floats_of
from nmcompile.checks import check_callable, check_compiled, check_kind, check_number
from nmcompile.errors import CalibrationError, ConfigError, StateError
from nmcompile.three_gemm.record import record_of
from nmcompile.three_gemm.run_model import evaluating, run_batch, shown

LEARNING_RATE = 1e-4
MOST_STEPS = 2**53

Loss = Callable[[object, object], Tensor]
"""(output of the pruned model, output of the dense model) -> scalar."""


def output_error(pruned: object, dense: object) -> Tensor:
    """Return the squared relative error of all floating-point outputs: Σ‖y - ŷ‖² / Σ‖y‖².

    Outputs that the dense model masks with an infinity do not count.
    """
    pairs = [_unmasked(y, target) for y, target in zip(floats_of(pruned), floats_of(dense), strict=True)]
    error = torch.stack([(y - target).float().square().sum() for y, target in pairs]).sum()
    return error / torch.stack([target.float().square().sum() for _, target in pairs]).sum().clamp_min(1e-30)


def _unmasked(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with zeros where the target is infinite; NaN stays, and makes the loss NaN."""
    masked = target.isinf()
    return y.masked_fill(masked, 0.0), target.masked_fill(masked, 0.0)


def distill(
    compiled: nn.Module,
    dense: nn.Module,
    data: Iterable[object],
    *,
    steps: int = 300,
    optimizer: Optimizer | None = None,
    loss: Loss = output_error,
) -> list[float]:
    """Train a pruned model to give the outputs of the dense one: the cheap end of ASP's second training.

    Both run in eval mode: without dropout, and with the batch norms' own statistics. Labels are not used.

    Args:
        compiled: a model that `compile` made, with masks that stand (found from data, or `refresh=None`), or without.
        dense: the model before pruning, with parameters of its own.
        data: batches, as `calibrate` takes them; read again and again, so not a generator.
        steps: optimizer steps, one a batch.
        optimizer: steps the parameters of `compiled`; by default AdamW, whose learning rate falls from 1e-4 to 0.
        loss: of both outputs; for a language model, say, the Kullback-Leibler divergence of the logits.

    Returns:
        The losses, one a step.

    Raises:
        StateError: the models share a parameter that is trained.
        CalibrationError: no data; a batch that a model does not run on; a loss that is not finite, by its step.
    """
    _check(compiled, dense, data, steps, optimizer, loss)
    trained = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
    stepper = AdamW(trained, LEARNING_RATE, weight_decay=0.0) if optimizer is None else optimizer
    falling = LinearLR(stepper, 1.0, 0.0, steps) if optimizer is None else None
    losses: list[float] = []
    with evaluating(compiled), evaluating(dense):
        for batch in tqdm(
            _endless(data, steps), total=steps, desc="distilling", unit="step", leave=False, disable=None
        ):
            losses.append(_step(compiled, dense, batch, stepper, loss, len(losses)))
            if falling is not None:
                falling.step()
    return losses


def _check(compiled: nn.Module, dense: nn.Module, data: object, steps: object, optimizer: object, loss: object) -> None:
    check_compiled("compiled", compiled)
    record_of(compiled)
    check_kind("dense", dense, nn.Module, "the model before pruning")
    check_data(data)
    check_number("steps", steps, Integral, 1, MOST_STEPS, "a number of optimizer steps >= 1")
    check_kind("optimizer", optimizer, Optimizer | None, "a torch.optim.Optimizer of the pruned model's parameters")
    check_callable("loss", loss, "a function of both outputs that returns a scalar tensor")
    taught = {id(parameter) for parameter in dense.parameters()}
    shared = (n for n, parameter in compiled.named_parameters() if parameter.requires_grad and id(parameter) in taught)
    if name := next(shared, None):
        raise StateError(
            f"{name!r} is a parameter of both models, so training the pruned one would change its teacher; give "
            "copy.deepcopy(model), taken before compile, as dense"
        )


def _endless(data: Iterable[object], steps: int) -> Iterator[object]:
    """Yield batches until there are enough, and start over as often as it takes."""
    count = 0
    while count < steps:
        before = count
        for batch in data:
            if count < steps:
                yield batch
                count += 1
        if count == before:
            raise CalibrationError(
                f"the data is empty after {count} of {steps} steps; give batches that can be read again"
            )


def _step(compiled: nn.Module, dense: nn.Module, batch: object, optimizer: Optimizer, loss: Loss, number: int) -> float:
    with torch.no_grad():
        target = run_batch(dense, batch, f"data batch {number}")
    optimizer.zero_grad()
    value = loss(run_batch(compiled, batch, f"data batch {number}"), target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigError(f"the loss that loss returns is {shown(value)}; let it return a tensor of one number")
    if not bool(value.isfinite()):
        raise CalibrationError(
            f"the loss of step {number} is {float(value.detach())}; give a lower learning rate, or other data"
        )
    value.backward()
    optimizer.step()
    return float(value.detach())
