"""A cache of weights: compressed for the sparse kernel, masked for the dense kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nmcompile.backends.cusparselt.library import is_capturing
from nmcompile.ir.operations import apply_mask
from nmcompile.weight_cache import WeightCache, is_cacheable

_compressed: WeightCache[Tensor] = WeightCache()
_masked: WeightCache[Tensor] = WeightCache()
_captured: list[tuple[StorageWeakRef, Tensor]] = []
"""Forms that CUDA graphs read, each with the memory of its weight."""


def is_kept(weight: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether forms of a weight are cached: only those of an unchanging parameter."""
    return isinstance(weight, nn.Parameter) and is_cacheable(weight, mask)


def compressed_weight(
    weight: Tensor, mask: Tensor | None, size: tuple[int, int], compress: Callable[[], Tensor]
) -> Tensor:
    """Return the weight compressed by `compress`, of that size with the appended zeros."""
    return _get(_compressed, weight, mask, size, compress)


def masked_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the masked weight."""
    return weight if mask is None else _get(_masked, weight, mask, None, lambda: apply_mask(weight, mask))


def forms_of(weight: Tensor | None) -> frozenset[str]:
    """Name the kernels for which a form of the weight is cached."""
    return frozenset(kernel for kernel, cache in _caches().items() if weight is not None and weight in cache)


def forget_other_forms(weight: Tensor | None, chosen: str, before: frozenset[str]) -> None:
    """Free the forms that were cached for trying kernels that were not chosen; graphs may read those from `before`."""
    for kernel in forms_of(weight) - before - {chosen}:
        _caches()[kernel].forget(weight)


def _caches() -> dict[str, WeightCache[Tensor]]:
    return {"sparse": _compressed, "dense": _masked}


def _get(
    cache: WeightCache[Tensor], weight: Tensor, mask: Tensor | None, how: Any, make: Callable[[], Tensor]
) -> Tensor:
    if not is_kept(weight, mask):
        return make()
    if not is_capturing(weight.device):
        return cache.get(weight, (mask,), how, lambda: _finished(make()))
    if not cache.has(weight, (mask,), how):
        return make()  # in each replay: a tensor made in a capture exists only during replays
    form = cache.get(weight, (mask,), how, make)
    _pin(form, weight)
    return form


def _pin(form: Tensor, weight: Tensor) -> None:
    """Keep a form alive as long as the memory of its weight, even if the cache drops it: a CUDA graph reads it there.

    A weak reference to the weight itself would keep torch from swapping it.
    """
    _captured[:] = [(memory, pinned) for memory, pinned in _captured if not (memory.expired() or pinned is form)]
    _captured.append((StorageWeakRef(weight.untyped_storage()), form))


def _finished(form: Tensor) -> Tensor:
    """Return a form once it is ready for every stream."""
    if form.is_cuda:
        torch.cuda.current_stream(form.device).synchronize()
    return form
