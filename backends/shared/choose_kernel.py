"""Sparse or dense kernel: a small GEMM runs dense; a larger one is measured with both when it first runs.

Both kernels compute the same product of the same pruned operands, so a choice never changes the mathematics, only how
sums round. The dense kernel rounds as PyTorch does. On CPUs it also runs wherever an operand holds a NaN or an
infinity, so a choice never hides one. On GPUs that check would have to wait for the device. There cuSPARSELt skips
pruned elements: a NaN reaches the results of the kept elements that meet it, with the dense kernel all results.
Measured choices can be kept in a file.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmcompile.checks import check_path
from nmcompile.errors import FileError, StateError, nearest
from nmcompile.files.read_files import parse_json, read_record, read_regular
from nmcompile.files.write_atomically import write_atomically
from nmcompile.ir.choice import Choice

SMALL = 2**24  # multiplications: about a tenth of a millisecond, in which there is nothing to gain
ROUNDS = 4
HEAD_START = 2_000_000  # of a call over the GPU, in its cycles: about a millisecond
MARGIN = 0.95  # of the dense time, that the sparse kernel must stay below: a run differs from the next by some percent
UNFIT = Choice("dense", "no sparse kernel computes it: a NaN or an infinity, no right algorithm, or no room to try one")
CAPTURING = Choice("dense", "nothing can be measured while a CUDA graph is captured; call it once before")

KERNELS = ("dense", "sparse", "integers")
LARGEST_FILE = 2**26  # bytes: some hundred thousand choices

_measured: dict[Hashable, Choice] = {}
_loaded: dict[str, Choice] = {}
_latest: dict[str, Choice] = {}


def run_best(
    call: str,
    problem: Hashable,
    multiplications: int,
    predict: Callable[[], float | None],
    sparse: Callable[[], Tensor | None],
    dense: Callable[[], Tensor],
    device: torch.device | None = None,
) -> Tensor:
    """The product by the kernel that pays; `latest(call)` says which it was.

    Args:
        call: the name of the GEMM that asks.
        problem: what decides how long both kernels take; equal problems (by `repr`, for files) are measured once.
        multiplications: of the dense product.
        predict: the speed-up, dense time / sparse time, by the cost model, if there is one.
        sparse, dense: run the kernels. `sparse` gives None where the operand keeps more than its pattern.
        device: that they run on; None is the CPU.
    """
    choice = _choice(problem, multiplications, predict, sparse, dense, device)
    result = sparse() if choice.kernel == "sparse" else None
    if result is None and choice.kernel == "sparse":
        choice = UNFIT
    note(call, choice)
    return dense() if result is None else result


def note(call: str, choice: Choice) -> None:
    """Remember what was chosen for a call."""
    _latest[call] = choice


def latest(call: str) -> Choice | None:
    """What was chosen when that GEMM ran last; None if it never did."""
    return _latest.get(call)


def forget() -> None:
    """Measure again what has been measured: after the machine or its load has changed."""
    _measured.clear()
    _loaded.clear()


def save_choices(path: str | os.PathLike[str]) -> None:
    """Write what was measured in this process as JSON, so that another on this machine need not measure it."""
    known = _loaded | {repr(problem): choice for problem, choice in _measured.items()}
    found = {problem: asdict(choice) for problem, choice in known.items()}
    write_atomically(check_path("path", path), json.dumps({"setting": _setting(), "choices": found}, indent=2).encode())


def load_choices(path: str | os.PathLike[str]) -> None:
    """Take over what `save_choices` wrote.

    Raises:
        FileError: no such file, or no file of that kind; nothing is taken over then.
        StateError: it was measured on another machine, or with another PyTorch.
    """
    try:
        setting, found = _saved(check_path("path", path))
    except FileError as error:
        raise FileError(f"measured choices cannot be read: {error}; write them with save_choices") from error
    if setting != _setting():
        raise StateError(f"{path} was measured with {setting}, and this is {_setting()}; measure again and save that")
    _loaded.update(found)


@dataclass(frozen=True)
class _Saved:
    """The content of a file of choices: where they were measured, and the fields of each by its problem."""

    setting: dict[str, str]
    choices: dict[str, dict[str, str | float | None]]


def _saved(path: Path) -> tuple[dict[str, str], dict[str, Choice]]:
    document = parse_json(read_regular(path, LARGEST_FILE), str(path), largest=LARGEST_FILE)
    saved = read_record(_Saved, document, str(path))
    return saved.setting, {key: _choice_of(values, f"{path}: {key!r}") for key, values in saved.choices.items()}


def _choice_of(values: dict[str, Any], name: str) -> Choice:
    choice = read_record(Choice, values, name)
    if choice.kernel not in KERNELS:
        raise FileError(f"{name}: kernel {choice.kernel!r} is unknown; {nearest(choice.kernel, KERNELS)}")
    if any(isinstance(value, float | int) and value < 0 for value in values.values()):
        raise FileError(f"{name}: a time below 0")
    return choice


def _setting() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "processor": name or platform.processor(), "cuda": device}


def _choice(
    problem: Hashable,
    multiplications: int,
    predict: Callable[[], float | None],
    sparse: Callable[[], Tensor | None],
    dense: Callable[[], Tensor],
    device: torch.device | None,
) -> Choice:
    if multiplications < SMALL:
        return Choice("dense", f"small, {multiplications / 1e6:.2f} M multiplications")
    if torch.are_deterministic_algorithms_enabled():
        return Choice("sparse", "not measured, so that every run rounds alike: deterministic algorithms are asked for")
    if problem not in _measured and _loaded and repr(problem) in _loaded:
        _measured[problem] = _loaded[repr(problem)]
    if problem not in _measured:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return CAPTURING
        if sparse() is None:
            return UNFIT  # what it takes to notice that is no measurement
        _measured[problem] = measure(predict(), sparse, dense, device)
    return _measured[problem]


def measure(
    predicted: float | None,
    sparse: Callable[[], object],
    dense: Callable[[], object],
    device: torch.device | None = None,
) -> Choice:
    """Time both kernels in turn and choose by the best of a few calls each."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(1 + ROUNDS):
        times["dense"].append(seconds(dense, device))
        times["sparse"].append(seconds(sparse, device))
    best = {kernel: min(values[1:]) for kernel, values in times.items()}
    return Choice(faster(best["sparse"], best["dense"]), "measured", predicted, best["dense"], best["sparse"])


def faster(sparse_seconds: float, dense_seconds: float) -> str:
    """The kernel to run; the dense one unless there is something to gain."""
    return "sparse" if sparse_seconds < MARGIN * dense_seconds else "dense"


def seconds(run: Callable[[], object], device: torch.device | None = None, head_start: int = HEAD_START) -> float:
    """How long one call takes; on a CUDA device, for how long it keeps that busy.

    There a call only asks for the work, which a model does ahead. So that the asking is not timed, the device is made
    to wait for `head_start` cycles.
    """
    if device is None or device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(head_start)
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) / 1e3
