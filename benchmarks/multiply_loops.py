"""Loops of multiply-adds with AVX-512 that run as fast as the processor can, written as machine code."""

import ctypes
import mmap
from collections.abc import Callable

import torch

SUMS, LANES = 24, 16
ROUNDS = 2_000_000
OPERATIONS = 2 * ROUNDS * SUMS * LANES  # of one call

# The rest of an instruction behind its sum, whether all lanes share a float, and whether it is one of the last vectors.
OPERANDS: dict[str, Callable[[int], tuple[bytes, bool, bool]]] = {
    "registers": lambda _: (b"\xc3", False, True),
    "a shared float from memory": lambda i: (bytes([0x46, i]), True, False),
    "a vector from memory": lambda i: (bytes([0x46, i]), False, False),
}
MULTIPLY_ADD, XOR = 0xB8, 0xEF


def instruction(opcode: int, sum_: int, vector: int, last: bytes, shares: bool = False, high: bool = False) -> bytes:
    """Encode sum += vector * last, or sum = vector ^ last; `last` is the ModRM byte without the sum, and an offset."""
    prefix = (~sum_ & 8) << 4 | (0 if high else 0x60) | (~sum_ & 16) | (2 if opcode == MULTIPLY_ADD else 1)
    third = 0x40 | shares << 4 | (~vector & 16) >> 1
    return bytes([0x62, prefix, (~vector & 15) << 3 | 5, third, opcode, last[0] | (sum_ & 7) << 3, *last[1:]])


def code(operand: Callable[[int], tuple[bytes, bool, bool]]) -> bytes:
    """Return code that adds products to all sums, as often as its first argument says; the second is an address."""
    clear = b"".join(instruction(XOR, i, 0, b"\xc0") for i in range(32))
    body = b"".join(instruction(MULTIPLY_ADD, i, 28 + i % 4, *operand(i)) for i in range(SUMS))
    again = b"\x48\xff\xcf\x0f\x85" + (-len(body) - 9).to_bytes(4, "little", signed=True)  # dec rdi; jnz
    return clear + body + again + b"\xc5\xf8\x77\xc3"  # vzeroupper; ret


def multiply_loop(operand: str) -> Callable[[], None]:
    """Return a function that runs the loop."""
    pages = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    pages.write(code(OPERANDS[operand]))
    entry = ctypes.c_char.from_buffer(pages)  # keeps the pages
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)(ctypes.addressof(entry))
    values = torch.zeros(4096)

    def call() -> None:
        run(ROUNDS, values.data_ptr() + -values.data_ptr() % 64)

    call.entry = entry  # type: ignore[attr-defined]
    return call
