"""What is kept of a weight at rest: its compressed form for the sparse kernel, its masked one for the dense kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmcompile.backends.cusparselt.library import is_capturing
from nmcompile.backends.shared.choose_kernel import latest
from nmcompile.ir.operations import apply_mask
from nmcompile.weight_cache import WeightCache, is_cacheable

_compressed: WeightCache[Tensor] = WeightCache()
_masked: WeightCache[Tensor] = WeightCache()
_captured: list[Tensor] = []
"""What CUDA graphs read, which nobody frees."""


def is_kept(weight: Tensor | None, mask: Tensor | None) -> bool:
    """Whether what is made of a weight is kept: of a parameter at rest. Others are made anew in each call."""
    return isinstance(weight, nn.Parameter) and is_cacheable(weight, mask)


def compressed_weight(
    weight: Tensor, mask: Tensor | None, size: tuple[int, int], compress: Callable[[], Tensor]
) -> Tensor:
    """What `compress` makes of a weight, of that size with the zeros that are appended."""
    return _get(_compressed, weight, mask, size, compress)


def masked_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight under its mask."""
    return weight if mask is None else _get(_masked, weight, mask, None, lambda: apply_mask(weight, mask))


@contextmanager
def only_the_chosen(weight: Tensor | None, call: str) -> Iterator[None]:
    """Forget what was made inside for the kernel that was not chosen; what was there before, graphs may read."""
    before = {kernel: weight is not None and weight in kept for kernel, kept in _forms()}
    yield
    choice = latest(call)
    for kernel, kept in _forms():
        if weight is not None and choice is not None and choice.kernel != kernel and not before[kernel]:
            kept.forget(weight)


def _forms() -> tuple[tuple[str, WeightCache[Tensor]], ...]:
    return ("sparse", _compressed), ("dense", _masked)


def _get(
    cache: WeightCache[Tensor], weight: Tensor, mask: Tensor | None, how: Any, make: Callable[[], Tensor]
) -> Tensor:
    if not is_kept(weight, mask):
        return make()
    if not is_capturing(weight.device):
        return cache.get(weight, (mask,), how, lambda: _finished(make()))
    if not cache.has(weight, (mask,), how):
        return make()  # in each replay: what a capture makes is not there before one
    form = cache.get(weight, (mask,), how, make)
    _captured.append(form)
    return form


def _finished(form: Tensor) -> Tensor:
    """Once it is there for every stream."""
    if form.is_cuda:
        torch.cuda.current_stream(form.device).synchronize()
    return form
