"""Kept launches: equal ones call the compiled kernel, all others and all doubtful ones go through Triton."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.on_triton import HAS_DEVICE, interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

with interpreter():
    from triton import knobs

    from nmcompile.backends.triton.kernels import kept_launches
    from nmcompile.backends.triton.kernels.kept_launches import is_known, launch


class Compiled:
    """A compiled kernel, which notes how it is called."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Kernel:
    """A kernel, which notes the launches that go through Triton."""

    arg_names = ("x", "count", "absent", "sizes", "M", "WIDE")

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.launches = 0
        self.pre_run_hooks: list[object] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.launches += 1
            return self.compiled

        return run


class Driver:
    """Triton's driver on stream 5."""

    @property
    def active(self) -> "Driver":
        return self

    def get_current_stream(self, device: int) -> int:
        return 5


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Return a kernel on a device that kept launches are trusted on."""
    monkeypatch.setattr(Tensor, "get_device", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kept_launches, "driver", Driver())
    monkeypatch.setattr(kept_launches, "_kept", {})
    monkeypatch.setattr(kept_launches, "_is_trusted", {0: True})
    return Kernel()


X = torch.zeros(64)


def run(kernel: Kernel, x: Tensor = X, count: int = 7, sizes: tuple[int, ...] = (3, 4), **changed: Any) -> None:
    constants = {"M": 4, "WIDE": False, "num_warps": 4} | changed
    launch(kernel, constants.pop("programs", 2), x, count, None, sizes, **constants)


def test_the_second_equal_launch_calls_the_compiled_kernel(kernel: Kernel) -> None:
    other = torch.ones(64)
    run(kernel)
    run(kernel)
    run(kernel, other)
    assert kernel.launches == 1
    head = 2, 1, 1, 5, Compiled.function, Compiled.packed_metadata, None, None, None
    assert [call[:9] for call in kernel.compiled.calls] == [head, head]
    assert [call[9:] for call in kernel.compiled.calls] == [(x, 7, None, (3, 4), 4, False) for x in (X, other)]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": X[1:]},
        {"x": X.to(torch.int16)},
        {"count": 1},
        {"count": 16},
        {"count": 2**33},
        {"sizes": (3, 1)},
        {"programs": 3},
        {"M": 8},
        {"WIDE": True},
        {"num_warps": 8},
    ],
)
def test_other_launches_go_through_triton_first(changed: dict[str, Any], kernel: Kernel) -> None:
    for different in ({}, changed):
        run(kernel, **different)
    assert kernel.launches == 2 and not kernel.compiled.calls
    for different in ({}, changed):
        run(kernel, **different)
    assert kernel.launches == 2 and len(kernel.compiled.calls) == 2


def test_addresses_of_one_kind_are_equal(kernel: Kernel) -> None:
    for start in (4, 8, 1, 2):
        run(kernel, X[start:])
    assert kernel.launches == 2


def test_devices_have_launches_of_their_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run(kernel)
    monkeypatch.setattr(Tensor, "get_device", lambda _: 1)
    monkeypatch.setattr(kept_launches, "_is_trusted", {0: True, 1: True})
    run(kernel)
    assert kernel.launches == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_see_every_launch(hook: str, kernel: Kernel) -> None:
    run(kernel)
    chain, seen = getattr(knobs.runtime, hook), print
    chain.add(seen)
    try:
        run(kernel)
    finally:
        chain.remove(seen)
    assert kernel.launches == 2
    kernel.pre_run_hooks.append(seen)
    run(kernel)
    assert kernel.launches == 3 and not kernel.compiled.calls


def test_nothing_is_kept_on_a_device_that_fails_the_trial(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_launches, "_is_trusted", {})
    monkeypatch.setattr(kept_launches, "trial_kernel", None)  # it ends in an exception
    for _ in range(2):
        run(kernel)
    assert kernel.launches == 2 and kept_launches._is_trusted == {0: False}


def test_the_trial_waits_until_a_graph_is_captured(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_launches, "_is_trusted", {})
    monkeypatch.setattr(kept_launches, "_passes_trial", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        run(kernel)
    assert kernel.launches == 2 and kept_launches._is_trusted == {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        run(kernel)
    assert kernel.launches == 3 and kept_launches._is_trusted == {0: True}


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False), ("4.0", False)],
)
def test_versions_that_were_not_looked_at_keep_nothing(version: str, expected: bool) -> None:
    assert is_known(version) == expected


def test_the_kept_launches_are_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_launches, "LAUNCHES", 3)
    for count in range(20):
        run(kernel, count=count)
    assert len(kept_launches._kept) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device")
def test_the_trial_passes_on_a_device() -> None:
    assert kept_launches._passes_trial(0)


def test_compiled_kernels_get_what_triton_s_launcher_passes_on() -> None:
    """The driver is a stand-in; the kernels are compiled, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.launches_of_sm90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == 4 and found["differences"] == []
    assert found["a launch that writes nothing passes the trial"] is False
