"""A cache of weights: compressed for the sparse kernel, masked for the dense kernel."""

from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nmcompile.backends.cusparselt.library import Library
from nmcompile.ir.operations import apply_mask
from nmcompile.weight_cache import WeightCache, is_cacheable


def is_kept(weight: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether forms of a weight are cached: only those of an unchanging parameter."""
    return isinstance(weight, nn.Parameter) and is_cacheable(weight, mask)


@cache
def kept_for(library: Library) -> "KeptWeights":
    """Return the forms of weights that a library multiplies."""
    return KeptWeights(library)


class KeptWeights:
    """The cached forms of weights, by the kernel that reads them.

    Attributes:
        captured: forms that CUDA graphs read, each with the memory of its weight.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.forms: dict[str, WeightCache[Tensor]] = {"sparse": WeightCache(), "dense": WeightCache()}
        self.captured: list[tuple[StorageWeakRef, Tensor]] = []

    def compressed(
        self, weight: Tensor, mask: Tensor | None, size: tuple[int, int], compress: Callable[[], Tensor]
    ) -> Tensor:
        """Return the weight compressed by `compress`, of that size with the appended zeros."""
        return self._get("sparse", weight, mask, size, compress)

    def masked(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        """Return the masked weight."""
        return weight if mask is None else self._get("dense", weight, mask, None, lambda: apply_mask(weight, mask))

    def pin(self, form: Tensor, weight: Tensor) -> None:
        """Keep a form alive as long as the memory of its weight, even if the cache drops it: a CUDA graph reads it.

        A weak reference to the weight itself would keep torch from swapping it.
        """
        self.captured[:] = [one for one in self.captured if not (one[0].expired() or one[1] is form)]
        self.captured.append((StorageWeakRef(weight.untyped_storage()), form))

    def _get(
        self, kernel: str, weight: Tensor, mask: Tensor | None, how: Hashable, make: Callable[[], Tensor]
    ) -> Tensor:
        cached = self.forms[kernel]
        if not is_kept(weight, mask):
            return make()
        if not self.library.is_capturing(weight.device):
            return cached.get(weight, (mask,), how, lambda: _finished(make()))
        if not cached.has(weight, (mask,), how):
            return make()  # in each replay: a tensor made in a capture exists only during replays
        form = cached.get(weight, (mask,), how, make)
        self.pin(form, weight)
        return form


def _finished(form: Tensor) -> Tensor:
    """Return a form once it is ready for every stream."""
    if form.is_cuda:
        torch.cuda.current_stream(form.device).synchronize()
    return form
