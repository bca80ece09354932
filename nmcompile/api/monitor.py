"""`monitor`: a live view of sparse training, sampled so seldom that it takes at most a hundredth of the time."""

import time
from contextlib import ExitStack
from itertools import chain
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nmcompile.api.pace import Pace
from nmcompile.api.sample_layers import LayerFigures, Sampler, totals
from nmcompile.checks import check_compiled, check_number, described
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.sharded import is_sharded
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import observing
from nmcompile.three_gemm.record import record_of
from nmcompile.training.find_masks import masks_of
from nmcompile.training.masks import WeightMask
from nmcompile.training.optimizer_hooks import held

PREFIX = "nmcompile"


class Writer(Protocol):
    """Anything that takes scalars, such as TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take a value of a step."""


class Monitor:
    """A live view that `monitor` started; `stop()` ends it, and so does the end of a `with` block.

    Args:
        root: the compiled model.
        writer: takes the scalars.
        share: of the time of all steps, which samples may take.
    """

    def __init__(self, root: nn.Module, writer: Writer, share: float) -> None:
        self.root = root
        self.writer = writer
        self.pace = Pace(share)
        self.steps = max((mask.steps for mask in self._masks), default=0)
        self._began: float | None = None
        self._figures: dict[str, LayerFigures] = {}
        self._before: dict[WeightMask, Tensor] = {}
        self._sampling = ExitStack()
        # Dynamo would trace it with the optimizer's step.
        self._hook = register_optimizer_step_post_hook(torch.compiler.disable(self._after_step))

    def stop(self) -> None:
        """Sample no more."""
        self._hook.remove()
        self._sampling.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def _masks(self) -> list[WeightMask]:
        return list(masks_of(self.root).values())

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        ours = set(map(id, self.root.parameters()))
        if not any(id(parameter) in ours for parameter in held(optimizer)):
            return
        now, self.steps = self._now(), self.steps + 1
        is_sampled = bool(self._figures)
        if self._began is not None:
            self.pace.note(now - self._began, is_sampled)
        self._began = now
        if is_sampled:
            self._write()
        if self.pace.is_due and self._masks_move():
            self._sample()

    def _now(self) -> float:
        """Return the time; the ends of a sampled step wait for the GPU."""
        if self._figures or self.pace.is_due:
            for device in {parameter.device for parameter in self.root.parameters() if parameter.is_cuda}:
                torch.cuda.synchronize(device)
        return time.perf_counter()

    def _masks_move(self) -> bool:
        """Return whether the next step rebuilds a mask, or none ever will."""
        moving = [mask for mask in self._masks if mask.found is None and mask.refresh is not None]
        return not moving or any(mask.is_stale for mask in moving)

    def _sample(self) -> None:
        """Look at the next step."""
        _, record = record_of(self.root)
        captured, triples = record.program.captured, [one for one in triples_of(self.root) if one.observer is None]
        self._figures = {triple.layer.name: LayerFigures() for triple in triples}
        self._before = {mask: mask.tensor.clone() for mask in self._masks if mask.is_stale}
        self._sampling.enter_context(
            observing(triples, lambda triple: Sampler(triple, self._figures[triple.layer.name], captured))
        )

    def _write(self) -> None:
        """Write the scalars of the step that was sampled."""
        self._sampling.close()
        found, values = totals(self._figures), dict[str, float | None]()
        sample = found.sample()
        values["kept_magnitude"] = sample.kept_magnitude
        values["mask_flips"] = self._flips()
        values["estimator_noise"] = sample.noise
        values["gradient_norm"] = found.gradient**0.5 if sample.noise is not None else None
        values["zeros/natural"], values["zeros/forced"] = sample.natural_zeros, sample.forced_zeros
        values |= {f"milliseconds/{phase.value}": found.seconds[phase] * 1e3 for phase in Phase}
        self._figures, self._before = {}, {}  # now, so that a writer that fails does so once a sample
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"{PREFIX}/{name}", value, self.steps)

    def _flips(self) -> float | None:
        """Return the share of the mask elements that the refresh changed, over the masks that it rebuilt."""
        flips = [int((mask.tensor != before.to(mask.tensor.device)).sum()) for mask, before in self._before.items()]
        elements = sum(before.numel() for before in self._before.values())
        return sum(flips) / elements if elements else None


def monitor(model: nn.Module, writer: Writer, *, share: float = 0.01) -> Monitor:
    """Write scalars on the training of a compiled model, from samples of single steps.

    Steps are those of optimizers of `torch.optim` that hold a parameter of the model. Training computes the same, bit
    for bit. A sampled step takes longer: samples come as often as they together stay within `share` of the time of all
    steps, the first after ten steps at the earliest, and where masks are rebuilt. The scalars:

    - `nmcompile/mask_flips`: the share of the mask elements that a refresh changed
    - `nmcompile/kept_magnitude`: Σ|w| over kept weights / Σ|w| over all, of the masked layers
    - `nmcompile/estimator_noise`: Σ‖dW' - dW‖² / Σ‖dW‖² over layers, the variance that pruned dY adds to gradients
      relative to them; `nmcompile/gradient_norm` is the square root of Σ‖dW‖² over these layers and all their calls
    - `nmcompile/zeros/natural`, `nmcompile/zeros/forced`: shares of zeros in pruned inputs, before and after
    - `nmcompile/milliseconds/forward`, `.../backward`, `.../update`: of rewritten layers' GEMMs with pruning

    Args:
        model: compiled, also inside DDP.
        writer: `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`.
        share: of the time, over 0 and up to 1.

    Raises:
        StateError: the model is not compiled.
        ConfigError: no `add_scalar`; a model inside `torch.compile`, whose graphs nothing can look into, or one whose
            parameters are split among processes.
    """
    check_compiled("model", model)
    check_number("share", share, Real, 1e-9, 1.0, "the share of the time that samples may take, over 0 and up to 1")
    if not callable(getattr(writer, "add_scalar", None)):
        raise ConfigError(f"writer is {described(writer)}; give an object with add_scalar(tag, value, step)")
    root, _ = record_of(model)
    dynamo = any(type(module).__name__ == "OptimizedModule" for module in chain([model], model.modules()))
    if dynamo or any(map(is_sharded, root.parameters())):
        raise ConfigError(
            f"model is {'inside torch.compile' if dynamo else 'split among processes'}, where layers cannot be looked "
            "at; monitor a run without it"
        )
    return Monitor(root, writer, share)
