"""Launches of compiled kernels by Triton's launcher and as kept ones, to a driver that notes them.

`python -m tests.backends.launches_of_sm90` prints what differs as JSON. As `sm90`, it is a program of its own.
"""

import json
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.backends.sm90 import MATRIX, h200, image


def launches() -> None:
    from nmcompile.backends.triton.kernels.blocks import prune_blocks
    from nmcompile.backends.triton.kernels.lines import pack_lines
    from nmcompile.backends.triton.kernels.tiles import prune_tiles
    from nmcompile.backends.triton.layout import empty_sums
    from nmcompile.pruning import NMPattern

    key, pattern, x, last = torch.tensor(1), NMPattern(2, 4), MATRIX, image(8, 64, 16)
    packed = x.new_empty(64, 2048), x.new_empty(64, 512, dtype=torch.uint8)
    prune_blocks(x, "mvue", pattern, 0, key, torch.empty_like(x))
    prune_blocks(last, "mvue", pattern, 0, key, torch.empty_like(last))
    pack_lines(x, "mvue", 0, key, *packed, sums=empty_sums(x))
    prune_tiles(x, out=torch.empty_like(x), mask=torch.empty_like(x, dtype=torch.bool))


def described(argument: Any) -> Any:
    """Return an argument as JSON; of a tensor what does not depend on its address."""
    if isinstance(argument, Tensor):
        return [str(argument.dtype), list(argument.shape), list(argument.stride())]
    return list(argument) if isinstance(argument, tuple) else str(argument)


def main() -> None:
    from triton.runtime.driver import driver

    active = h200()
    launcher = active.launcher_cls.return_value
    driver.set_active(active)
    with (
        mock.patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
        mock.patch.object(Tensor, "get_device", lambda _: 0),
    ):
        from nmcompile.backends.triton.kernels import kept_launches

        makers = (mock.patch.object(torch, name, on_cpu(getattr(torch, name))) for name in ("arange", "full"))
        with next(makers), next(makers):
            passes = kept_launches._passes_trial(0)
        trial = len(launcher.call_args_list)
        kept_launches._is_trusted[0] = True
        launches()
        first = len(launcher.call_args_list)
        with mock.patch("triton.runtime.jit.JITFunction.run", side_effect=AssertionError("through Triton")):
            launches()
    calls = [[described(argument) for argument in call.args] for call in launcher.call_args_list]
    ordinary, kept = calls[trial:first], calls[first:]
    # Triton passes on its empty chains of hooks, and metadata for them.
    for call in (*ordinary, *kept):
        call[6:9] = []
    pairs = zip(ordinary, kept, strict=True)
    found = {
        "kernels": len(kept),
        "differences": [pair for pair in pairs if pair[0] != pair[1]],
        "a launch that writes nothing passes the trial": passes,
        "launches of the trial": trial,
    }
    print(json.dumps(found))


def on_cpu(make: Any) -> Any:
    """Return a function that makes a tensor on the CPU wherever it is asked for."""
    return lambda *arguments, **options: make(*arguments, **options | {"device": "cpu"})


if __name__ == "__main__":
    main()
