"""Launches that are kept: the second equal launch calls the compiled kernel, not Triton's search for it.

In every launch Triton's launcher binds the arguments, sorts them into kinds, and looks for the kernel that was compiled
for these. That takes several times as long as the driver needs. Equal launches have one kernel: here, those of equal
numbers, and of tensors of the same dtype whose addresses are multiples of 16 or not. The compiled kernel is called as
the launcher calls it, which is no promise of Triton's. So versions are listed, and a trial compares both ways to
launch before any launch is kept.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

OLDEST, NEWEST = (3, 6), (3, 9)
"""Versions of Triton that call compiled kernels in this way."""
ALIGNMENT = 16  # bytes: the kinds of addresses that kernels are compiled for
LAUNCHES = 4096  # kept launches, about a kilobyte each
SIZE = 32  # numbers of the trial


class Kept(NamedTuple):
    """A compiled kernel with what its launcher passes on to it, and the kernel's constants."""

    run: Callable[..., None]
    function: int
    metadata: object
    constants: tuple[object, ...]

    def launch(self, programs: int, device: int, arguments: tuple[object, ...]) -> None:
        stream = driver.active.get_current_stream(device)
        hooks = None, None, None  # and their metadata
        self.run(programs, 1, 1, stream, self.function, self.metadata, *hooks, *arguments, *self.constants)


_kept: dict[Hashable, Kept] = {}
_is_trusted: dict[int, bool] = {}
"""Whether kept launches are right on a device."""


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel[(programs,)](*arguments, **constants)` on the current device, that of the first argument, a tensor.

    Args:
        kernel: a kernel whose parameters are first the arguments, then constants.
        programs: the number of programs.
        arguments: tensors, ints, None, and tuples of ints.
        constants: its constants, and options for the compiler.
    """
    device = arguments[0].get_device()
    key = launch_key(kernel, device, programs, arguments, constants)
    kept = _kept.get(key)
    if kept is not None and not is_watched(kernel):
        kept.launch(programs, device, arguments)
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if kept is None and compiled is not None and device >= 0 and is_trusted(device):
        keep(key, kernel, compiled, len(arguments), constants)


def launch_key(
    kernel: object, device: int, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Hashable:
    """Return the key of a launch; launches of one key are of one compiled kernel."""
    kinds = ((x.dtype, x.data_ptr() % ALIGNMENT == 0) if isinstance(x, Tensor) else x for x in arguments)
    return id(kernel), device, programs, *kinds, *constants.values()


def keep(key: Hashable, kernel: Any, compiled: Any, count: int, constants: dict[str, Any]) -> None:
    """Keep a compiled kernel for the launches of a key, which have `count` arguments."""
    values = tuple(constants[name] for name in kernel.arg_names[count:])
    if len(_kept) >= LAUNCHES:
        _kept.clear()
    _kept[key] = Kept(compiled.run, compiled.function, compiled.packed_metadata, values)


def is_watched(kernel: Any) -> bool:
    """Return whether a hook wants to see the launches of a kernel; profilers set some."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or any(getattr(hook, "calls", True) for hook in hooks))


def is_trusted(device: int) -> bool:
    """Return whether kept launches are right on a device, by a trial that runs once, outside of CUDA graphs."""
    found = _is_trusted.get(device)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return False
        found = _is_trusted[device] = is_known(triton.__version__) and _passes_trial(device)
    return found


def is_known(version: str) -> bool:
    """Return whether a version of Triton is one that was looked at."""
    major, minor = version.split(".")[:2]
    return OLDEST <= (int(major), int(minor)) <= NEWEST


def _passes_trial(device: int) -> bool:
    """Return whether a kept launch writes what Triton's own launch writes; an exception counts as a no."""
    try:
        first, second = (torch.arange(i, SIZE + i, dtype=torch.int32, device=f"cuda:{device}") for i in (0, 7))
        expected, found = (torch.full((3 * SIZE,), -i, dtype=torch.int32, device=first.device) for i in (1, 2))
        numbers, constants = (None, 1, 48, (5, 1, -3), 2**40), {"SIZE": SIZE, "IS_DOUBLE": True, "num_warps": 1}
        compiled = trial_kernel[(3,)](expected, first, *numbers, **constants)
        values = tuple(constants[name] for name in ("SIZE", "IS_DOUBLE"))
        kept = Kept(compiled.run, compiled.function, compiled.packed_metadata, values)
        kept.launch(3, device, (found, second, *numbers))
        trial_kernel[(3,)](expected, second, *numbers, **constants)
        return torch.equal(found, expected)
    except Exception:  # whatever another version of Triton does
        return False


@triton.jit
def trial_kernel(out, x, absent, one, number, numbers, wide, SIZE: tl.constexpr, IS_DOUBLE: tl.constexpr):
    """Take an argument of every kind."""
    place = tl.arange(0, SIZE)
    value = tl.load(x + place) + one + number * numbers[0] + numbers[2] + (wide >> 38).to(tl.int32)
    if absent is not None:
        value = -value
    if IS_DOUBLE:
        value += value
    tl.store(out + tl.program_id(0) * SIZE + place, value + tl.program_id(0))
