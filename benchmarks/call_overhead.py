"""Cost of a small layer on the host: a 16 → 16 linear layer on one thread, whose GEMMs take next to no time.

Over eager PyTorch, in turns: a training step (forward, backward) in modes "dense", "t-weights" and "training", and a
forward without gradients in mode "weights". Python calls are counted by `sys.setprofile`.

python benchmarks/call_overhead.py   # writes results/call_overhead.json
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from timing import in_turns, processor
from torch import Tensor, nn

import nmcompile

CALLS = 20  # a turn
MODES = "dense", "t-weights", "training"
RESULT = Path(__file__).parent / "results" / "call_overhead.json"


def trained(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a training step without an optimizer."""

    def step() -> None:
        for _ in range(CALLS):
            model(x).sum().backward()

    return step


def called(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward without gradients."""

    @torch.no_grad()
    def forward() -> None:
        for _ in range(CALLS):
            model(x)

    return forward


def python_calls(call: Callable[[], object]) -> float:
    """Count the Python functions that one of `CALLS` repetitions enters."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(16, 16, requires_grad=True)
    config = nmcompile.CompileConfig(ends="sparse")
    models = {mode: nmcompile.compile(copy.deepcopy(plain), mode, config=config) for mode in (*MODES, "weights")}
    for mode in MODES:  # an optimizer that steps the weights, as in training
        optimizer = torch.optim.SGD(models[mode].parameters(), lr=0.0)
        trained(models[mode], x)()
        optimizer.step()
    steps = {"eager": trained(plain, x), **{mode: trained(models[mode], x) for mode in MODES}}
    forwards = {"eager": called(plain, x), "weights": called(models["weights"], x)}
    found = {"step": steps, "forward without gradients": forwards}
    rows = []
    for name, calls in found.items():
        micros = {
            key: statistics.median(times) * 1e3 / CALLS for key, times in in_turns(calls, options.repeats).items()
        }
        for key, time in micros.items():
            row = {"call": name, "mode": key, "microseconds": time, "over eager": time / micros["eager"]}
            rows.append(row | {"Python calls": python_calls(calls[key])})
            print({label: round(value, 2) if isinstance(value, float) else value for label, value in rows[-1].items()})
    setting = {"torch": torch.__version__, "threads": 1, "machine": processor(), "repeats": options.repeats}
    options.out.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
