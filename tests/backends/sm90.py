"""Compiled kernels for sm_90, made without a device: Triton's wheel has a compiler and a disassembler.

`python -m tests.backends.sm90` prints their accesses and their instructions as JSON. It is a program of its own: a
process that has imported kernels for the interpreter cannot compile them.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nmcompile.backends.triton.layout import empty_sums

LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+)?\s*(?P<code>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);")
LABEL = re.compile(r"\.L_x_\d+")


class Code:
    """The instructions of a compiled kernel."""

    def __init__(self, text: str) -> None:
        self.lines: list[re.Match[str]] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if line.startswith(".L_x_"):
                self.labels[line.rstrip(":")] = len(self.lines)
            elif found := LINE.match(line):
                self.lines.append(found)

    def accesses(self) -> dict[str, int]:
        """Count the loads from global memory and the stores to it, by their width."""
        return Counter(line["code"] for line in self.lines if line["code"].startswith(("LDG", "STG")))

    def executed(self, rounds: int) -> int:
        """Count what a thread executes on the shortest path, which skips rare ones; a loop counts `rounds` times."""
        for place, line in enumerate(self.lines):
            head = self._target(line)
            if head is not None and head < place and (body := self._distance(head, {place})):
                return self._distance(0, {head}) + rounds * body
        lines = enumerate(self.lines)
        return self._distance(0, {at for at, line in lines if line["code"] == "EXIT" and not line["predicate"]})

    def _distance(self, start: int, ends: set[int]) -> int:
        """Count the instructions from one to the nearest of others, both of them; 0 if none is reached."""
        distances, queue = {start: 1}, deque([start])
        while queue:
            at = queue.popleft()
            if at in ends:
                return distances[at]
            for following in self._following(at):
                if following not in distances:
                    distances[following] = distances[at] + 1
                    queue.append(following)
        return 0

    def _following(self, at: int) -> Iterator[int]:
        line = self.lines[at]
        target = self._target(line)
        is_conditional = line["predicate"] is not None or "P" in line["operands"].split("`")[0]
        if target is not None:
            yield target
        if at + 1 < len(self.lines) and (is_conditional or (target is None and line["code"] != "EXIT")):
            yield at + 1

    def _target(self, line: re.Match[str]) -> int | None:
        found = LABEL.search(line["operands"]) if line["code"].startswith("BRA") else None
        return None if found is None else self.labels[found[0]]


def h200() -> Any:
    """Return a driver for Triton that compiles for an H200 and launches nothing."""
    from triton.backends.compiler import GPUTarget

    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    driver = mock.Mock()
    driver.utils.load_binary.return_value = 1, 1, 0, 0, 1024  # module, function, registers, spills, threads
    driver.utils.get_device_properties.return_value = properties
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    driver.get_current_device.return_value = 0
    driver.get_current_stream.return_value = 0
    driver.get_active_torch_device.return_value = torch.device("cpu")
    return driver


def compiled(launch: Callable[[], object]) -> Code:
    """Return the code of the one kernel that `launch` launches on CPU tensors."""
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(h200())
    kernels: list[Any] = []
    run = JITFunction.run
    with (
        mock.patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
        mock.patch.object(JITFunction, "run", lambda *args, **options: kernels.append(run(*args, **options))),
    ):
        launch()
    (kernel,) = kernels
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        return Code(subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout)


def pruning(x: Tensor, operator: str, n_keep: int, block: int, dim: int) -> Code:
    from nmcompile.backends.triton.kernels.blocks import prune_blocks
    from nmcompile.pruning import NMPattern

    pattern, key = NMPattern(n_keep, block), torch.tensor(1)
    return compiled(lambda: prune_blocks(x, operator, pattern, dim, key, torch.empty_like(x)))


def packing(x: Tensor, operator: str, sums: Tensor | None) -> Code:
    from nmcompile.backends.triton.kernels.lines import pack_lines

    lines, length = x.shape[1], x.shape[0]
    out = x.new_empty(lines, length // 2), x.new_empty(lines, length // 8, dtype=torch.uint8)
    return compiled(lambda: pack_lines(x, operator, 0, torch.tensor(1), *out, sums=sums))


def packing_both(w: Tensor) -> Code:
    from nmcompile.backends.triton.kernels.both_directions import pack_both
    from nmcompile.backends.triton.layout import PackedForm, Places

    def form(lines: int, length: int) -> PackedForm:
        places = Places(torch.zeros(lines, dtype=torch.int32), torch.zeros(length // 4, dtype=torch.int32), 8)
        return PackedForm(w.new_empty(lines, length // 2), w.new_empty(w.nbytes, dtype=torch.uint8), places)

    mask, forms = torch.zeros(w.shape, dtype=torch.bool), (form(*w.shape), form(*w.shape[::-1]))
    return compiled(lambda: pack_both(w, mask, *forms))


def image(samples: int, channels: int, side: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(samples, side, side, channels, dtype=dtype).movedim(-1, 1)


def positions(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


MATRIX = torch.zeros(4096, 64, dtype=torch.bfloat16)
CASES: dict[str, Callable[[], Code]] = {
    "samples": lambda: pruning(image(8, 64, 16), "mvue", 2, 4, 0),
    "samples of odd sides": lambda: pruning(image(8, 64, 7), "mvue", 2, 4, 0),
    "samples, a partial block": lambda: pruning(image(6, 24, 7), "greedy", 2, 4, 0),
    "samples, 34 channels": lambda: pruning(image(8, 34, 7), "greedy", 2, 4, 0),
    "samples, 33 channels": lambda: pruning(image(8, 33, 7), "greedy", 2, 4, 0),
    "samples in float32": lambda: pruning(image(8, 64, 16, torch.float32), "mvue", 1, 2, 0),
    "positions": lambda: pruning(positions(image(8, 24, 16)), "mvue", 1, 2, 1),
    "positions, a partial block": lambda: pruning(positions(image(3, 24, 7)), "greedy", 2, 4, 1),
    "channels": lambda: pruning(image(8, 64, 16), "greedy", 4, 8, 1),
    "channels, a partial block": lambda: pruning(image(8, 60, 16), "greedy", 4, 8, 1),
    "pairs of a matrix": lambda: pruning(MATRIX, "mvue", 1, 2, 0),
    "packed in both directions": lambda: packing_both(MATRIX),
    "packed": lambda: packing(MATRIX, "mvue", None),
    "packed and summed": lambda: packing(MATRIX, "mvue", empty_sums(MATRIX)),
}
ROUNDS = 4  # of the loop over positions


def main() -> None:
    codes = {name: case() for name, case in CASES.items()}
    found = {name: {"accesses": code.accesses(), "executed": code.executed(ROUNDS)} for name, code in codes.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
