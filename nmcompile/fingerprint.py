"""A fingerprint of a tensor's content, which differs after any write: in place, through `.data`, or by a fused kernel.

Memory is read as 32-bit words, in rows of `WORDS`. The sum of key × word over a row, mod 2^64, always changes when one
word changes or two words swap places. Each row's sum is mixed with the row's number, and the results are added. The
native kernel and torch's operators compute the same number, so it also holds on another device and in another process.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.native import MISSING, kernels
from nmcompile.sharded import PLAIN

WORDS = 1024
ROWS = {"cpu": 64}  # rows whose products torch holds at a time; few enough for a CPU's cache
MANY_ROWS = 4096


def fingerprint(x: Tensor) -> int | None:
    """Return the fingerprint of a tensor; None if it cannot be read now.

    Shards cannot be read, nor can tensors on meta or inside a transform of `torch.func`, nor any CUDA tensor while a
    CUDA graph is captured. On a GPU the caller waits for the result.
    """
    if not _is_readable(x):
        return None
    if x.is_contiguous():
        return _of_memory(x, x.numel())
    reach = _reach(x)
    if reach > x.numel():  # the gaps between its elements are not part of it
        return _of_memory(x.contiguous(), x.numel())
    # The same bytes in another layout are another matrix.
    return _of_memory(x, reach) ^ hash((x.shape, x.stride()))


def _of_memory(x: Tensor, reach: int) -> int:
    """Return the fingerprint of `reach` elements from the first one on, as they lie in memory."""
    if x.is_cpu and not MISSING:
        return kernels.fingerprint(x.data_ptr(), reach * x.itemsize, torch.get_num_threads())
    return _by_torch(x.detach().as_strided((reach,), (1,)).view(torch.uint8))


def _is_readable(x: Tensor) -> bool:
    if type(x) not in PLAIN or x.is_meta or x.layout != torch.strided:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _reach(x: Tensor) -> int:
    """Return the number of elements of memory between a tensor's first and last element, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


@torch.no_grad()
def _by_torch(content: Tensor) -> int:
    size, device = len(content), content.device
    padded = F.pad(content, (0, -size % (4 * WORDS)))
    words = (padded.clone() if padded.storage_offset() % 4 else padded).view(torch.int32).view(-1, WORDS)
    keys = _mixed(torch.arange(1, WORDS + 1, device=device)) >> 33 & 2**31 - 1
    sums = [((part.long() & 2**32 - 1) * keys).sum(1) for part in words.split(ROWS.get(device.type, MANY_ROWS))]
    numbers = torch.arange(1, len(words) + 1, device=device)
    rows = _mixed(torch.cat(sums) + _mixed(numbers)) if sums else numbers
    return int(rows.sum() + _mixed(torch.tensor(size, device=device)))


def _mixed(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 to int64."""
    x = x * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, bits: int) -> Tensor:
    logical: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return logical


def _signed(x: int) -> int:
    return x - 2**64
