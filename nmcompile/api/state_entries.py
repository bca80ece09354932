"""Entries of a sparse state, checked before any of them is loaded: it may be damaged, or come from elsewhere."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nmcompile.errors import StateError, nearest
from nmcompile.training.weight_clock import HOLDS, STEPPED

FORMAT = 1
CLOCK, DRAW, CLIP, STEP, DENSE = ".clock", ".draw", "clip", ".weight_step", ".dense_phases"  # how keys end
MOST = 2**62  # steps or calls: a counter continues from the loaded number


def check_readable(state: object) -> None:
    """Raise unless `state` is named tensors in a format that this version reads."""
    if not isinstance(state, Mapping):
        raise StateError(f"the sparse state is of type {type(state).__name__}; give what sparse_state_dict returned")
    for name in state:
        if not isinstance(name, str):
            raise StateError(f"a name in the sparse state is of type {type(name).__name__}, not text")
    if "format" not in state:
        raise StateError(f"a sparse state of format none cannot be read; this version reads up to {FORMAT}")
    check_entry("format", state["format"], torch.tensor(FORMAT))
    if not 1 <= int(state["format"]) <= FORMAT:
        raise StateError(
            f"a sparse state of format {int(state['format'])} cannot be read; this version reads up to {FORMAT}"
        )


def check_entries(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise unless the state has the same entries as the model's own, each with values that can be loaded."""
    for name in expected.keys() - state.keys():
        raise StateError(
            f"the sparse state lacks {name!r}; {nearest(name, state)}; compile with the mode it was saved in"
        )
    for name in state.keys() - expected.keys():
        raise StateError(f"the model has nothing for {name!r} of the sparse state; {nearest(name, expected)}")
    for name, mine in expected.items():
        if mine.is_meta:
            raise StateError(f"{name!r} of the model is on the meta device; load the sparse state once it has storage")
        check_entry(name, state[name], mine)


def check_entry(name: str, value: object, mine: Tensor) -> None:
    """Raise unless an entry can replace the model's own."""
    if reason := _refusal(name, value, mine):
        raise StateError(f"{name!r} of the sparse state {reason}")


def _refusal(name: str, value: object, mine: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}; expected a tensor"
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        return f"is not a dense tensor with values (device {value.device}, {value.layout})"
    if value.dtype != mine.dtype:
        return f"is {value.dtype}; the model's is {mine.dtype}"
    if value.shape != mine.shape:
        return f"has shape {tuple(value.shape)}; the model's is {tuple(mine.shape)}"
    return _wrong_number(name, value)


def _wrong_number(name: str, value: Tensor) -> str:
    if name.endswith(CLOCK) and not (0 <= value[0] < MOST and HOLDS <= value[1] <= STEPPED):
        return f"is {value.tolist()}; expected a number of steps, and 0, 1 or 2 for a stale mask"
    if name.endswith(DRAW) and not 0 <= value < MOST:
        return f"is {int(value)}; expected a number of backward calls"
    if name.endswith(STEP) and not (value.isnan() | ((value > 0) & value.isfinite())).all():
        return f"is {value.flatten()[:4].tolist()}; expected positive steps, or NaN where SAWB finds them"
    if name.endswith(CLIP) and value.isinf():
        return "is infinite; expected a finite clip, or NaN before calibration"
    return ""
