"""Philox4x32-10, the counter-based random numbers of all operators.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". A key is 64 bits, held in a 0-d int64 tensor; its low
and high 32 bits are the two words of the Philox key. Uniform number i of a key is

    c = i >> 2
    words = philox4x32_10(counter=(c & 0xffffffff, c >> 32, 0, 0), key)
    u = (words[i & 3] >> 8) * 2**-24         exact in float32, 0 <= u < 1

so a kernel computes the number of any block without the others. 32-bit words are held in int64 tensors.
"""

import torch
from torch import Tensor

from nmcompile.checks import check_kind
from nmcompile.errors import ConfigError

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_key(generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """Draw a 64-bit key, 0-d int64 on `device`.

    Args:
        generator: where the key comes from, on any device; `None` is torch's default CPU generator.
        device: device of the key; `None` leaves it on the generator's device.
    """
    check_kind("generator", generator, torch.Generator | None, "a torch.Generator, or None for torch's own")
    check_kind("device", device, torch.device | str | None, "a torch.device, its name, or None")
    if isinstance(device, str):
        device = _device(device)
    source = torch.device("cpu") if generator is None else generator.device
    key = torch.empty((), dtype=torch.int64, device=source).random_(-(2**63), None, generator=generator)
    return key if device is None else key.to(device)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"device {name!r} is unknown to torch; give 'cpu' or 'cuda:0', for example") from error


def uniforms(key: Tensor, count: int, per_block: int = 1) -> Tensor:
    """Return uniform numbers of `count` blocks, float32 `(per_block, count)` on the key's device.

    Row k holds the numbers `per_block * b + k` of the blocks b = 0, 1, 2, ...
    """
    numbers = per_block * count
    counter = torch.arange(-(-numbers // 4), device=key.device)
    zero = torch.zeros_like(counter)
    words = torch.stack(philox4x32(counter & LOW, counter >> 32, zero, zero, key & LOW, (key >> 32) & LOW), dim=1)
    u = (words.flatten()[:numbers] >> 8).to(torch.float32) * 2.0**-24
    return u.view(count, per_block).t().contiguous()


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """Compute Philox4x32-10 of a counter and a key, each word an int64 tensor in [0, 2**32)."""
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return high and low 32 bits of a product; int64 wraps around, and the mask removes the copies of the sign."""
    product = word * multiplier
    return (product >> 32) & LOW, product & LOW
