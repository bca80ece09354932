"""Compiling in one thread does not affect the modules of other threads, and leaves nothing patched."""

import logging
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as symbolic

import nmcompile
from nmcompile.own_thread import silent, tracing_alone

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.linear, self.norm = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(torch.relu(self.linear(x)), self.w))


def net() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(8, 4))


def in_threads(*works: Callable[[], None]) -> list[str]:
    """Run all at the same time, and return the errors that they raised."""
    errors: list[str] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def patched() -> tuple[object, ...]:
    return (
        nn.Module.__call__,
        nn.Module.__getattr__,
        symbolic.Tracer.trace,
        symbolic.CURRENT_PATCHER,
        symbolic._is_fx_tracing_flag,
        torch.compiler.is_compiling(),
        sys.stdout,
        sys.stderr,
    )


def test_models_run_while_others_are_compiled() -> None:
    before, done = patched(), threading.Event()
    plain, compiled = net(), nmcompile.compile(net())
    expected = {model: model(X).detach() for model in (plain, compiled)}
    left = [2]

    def runs(model: nn.Module) -> Callable[[], None]:
        def work() -> None:
            while not done.is_set():
                output = model(X)
                output.sum().backward()
                assert torch.equal(output, expected[model])
                assert not torch.compiler.is_compiling()
                assert not symbolic._is_fx_tracing_flag

        return work

    def compiles(*args: Tensor) -> Callable[[], None]:
        def work() -> None:
            try:
                for _ in range(2):
                    model = net()
                    made = nmcompile.compile(model, "dense", args=args or None)
                    assert torch.equal(made(X), model(X))
            finally:
                left[0] -= 1
                if not left[0]:
                    done.set()

        return work

    assert in_threads(runs(plain), runs(compiled), compiles(), compiles(X)) == []
    assert patched() == before


def test_a_trace_patches_modules_for_its_own_thread_only() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            assert left.wait(10)
            return self.linear(x)

    before, entered, left = patched(), threading.Event(), threading.Event()
    other, graphs = nn.Linear(8, 8), list[fx.Graph]()
    expected = other(X)

    def traces() -> None:
        with tracing_alone():
            graphs.append(fx.Tracer().trace(Slow()))

    def runs() -> None:
        assert entered.wait(10)
        try:
            assert nn.Module.__call__ is not before[0]
            assert torch.equal(other(X), expected)
            assert not symbolic.is_fx_symbolic_tracing()
        finally:
            left.set()

    assert in_threads(traces, runs) == []
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_module", "output"]
    assert patched() == before


def test_a_failed_trace_leaves_nothing_patched() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    before = patched()
    with pytest.raises(RuntimeError, match="no"), tracing_alone():
        fx.Tracer().trace(Fails())
    assert patched() == before


def test_tracing_within_tracing_and_behind_torch_compile() -> None:
    """torch.compile wraps the method of the tracer that is replaced here."""
    torch.compile(nn.Linear(8, 8), backend="eager")(X)
    before = patched()
    with tracing_alone(), tracing_alone():
        graph = fx.Tracer().trace(nn.Sequential(nn.Linear(8, 8)))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    assert patched() == before


def test_silence_is_for_one_thread(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def speaks() -> None:
        print("from another thread")
        logging.getLogger("torch.other").error("logged by another thread")

    with silent():
        print("from this one")
        logging.getLogger("torch.other").error("logged by this one")
        assert in_threads(speaks) == []
    print("afterwards")
    assert capsys.readouterr().out == "from another thread\nafterwards\n"
    assert caplog.messages == ["logged by another thread"]
