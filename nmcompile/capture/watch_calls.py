"""Calls that leave no node in a trace: activation checkpointing, questions about autocast, writes to real tensors."""

import gc
import inspect
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
import torch.utils.checkpoint
from torch._ops import OpOverload

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.frames import is_aside, is_model_code
from nmcompile.capture.unseen import unseen_tests
from nmcompile.capture.watched_proxy import CarefulTracer
from nmcompile.capture.write_guard import WriteGuard

CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__
READS = {
    torch.is_autocast_enabled: "its code asks whether autocast is on",
    torch.is_autocast_cpu_enabled: "its code asks whether autocast is on",
    torch.is_grad_enabled: "its code asks whether gradients are on",
    operator.is_: "its code calls operator.is_",
    operator.is_not: "its code calls operator.is_not",
}
"""Functions whose answer a trace fixes, with the complaint."""


@contextmanager
def watch_calls(tracer: CarefulTracer, tested_for_none: set[str]) -> Iterator[None]:
    """Notice what leaves no node: activation checkpointing, questions about autocast or the grad mode, unseen tests.

    `tested_for_none` receives the arguments of the model that its code tests for None.
    """
    previous, trace = sys.getprofile(), type(tracer).trace.__code__

    def profile(frame: FrameType, event: str, function: object) -> None:
        if event == "call" and frame.f_code is CHECKPOINT:
            tracer.complain("it calls torch.utils.checkpoint, which a trace would lose")
        elif event == "call" and is_model_code(frame):
            reasons = list(unseen_tests(frame, tested_for_none))
            if reasons and not is_aside(frame, trace):
                tracer.complaints.update(dict.fromkeys(reasons))
        elif event == "c_call" and function in READS and is_model_code(frame):
            tracer.complain(READS[function])

    # The garbage collector would run finalizers and callbacks as if the forward called them.
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)
        if collects:
            gc.enable()


class Guard(WriteGuard):
    """A watch over the real operators in a trace: they may not write the model's tensors or draw random numbers."""

    def __init__(self, tracer: CarefulTracer, protected: frozenset[int]) -> None:
        super().__init__(protected, RuntimeError("it changes a tensor of the model in place"))
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.tracer.complain("it draws random numbers")
        return super().__torch_dispatch__(func, types, args, kwargs)
