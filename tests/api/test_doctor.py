"""The doctor finds what is broken, tells how to mend it, and its exit status says so."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nmcompile
from nmcompile.api import doctor
from nmcompile.api.choose_backends import ACCELERATED
from nmcompile.api.doctor import Finding, diagnose
from nmcompile.cli import cli
from nmcompile.ir.protocols import Support
from nmcompile.native import INSTRUCTION_SETS, MISSING

CPU = next(backend for backend in ACCELERATED if backend.name == "cpu")


def finding(name: str) -> Finding:
    (found,) = [one for one in diagnose().findings if one.name == name]
    return found


def test_versions_and_hardware_are_those_of_this_process() -> None:
    random = torch.get_rng_state()
    found = {one.name: one.found for one in diagnose().findings}
    assert (found["nmcompile"], found["torch"]) == (nmcompile.__version__, torch.__version__)
    assert found["numpy"] == np.__version__
    assert found["threads"].startswith(f"{torch.get_num_threads()} of PyTorch on ")
    assert all(name in found["processor"] for name in INSTRUCTION_SETS)
    assert torch.equal(random, torch.get_rng_state())


def test_every_backend_has_its_reason() -> None:
    found = {one.name: one for one in diagnose().findings}
    for backend in ACCELERATED:
        support, told = backend.available(), found[f"backend {backend.name}"]
        assert told.found == support.reason and (told.state == "ok") == support.ok
        assert bool(told.remedy) != support.ok
    assert found["backend reference"].state == "ok"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_native_kernels_that_are_missing_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CPU), "available", lambda _: Support(False, "no such file"))
    told = finding("backend cpu")
    assert (told.state, told.found) == ("wrong", "no such file") and "compiler" in told.remedy
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 1


def falsified(layer: Any, x: Any, backend: str) -> tuple[torch.Tensor, ...]:
    """Return what a step gives, with one element off on one backend."""
    results = step(layer, x, backend)
    if backend == "cpu":
        results[1].view(-1)[77] += 1e-2
    return results


step = doctor._step


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("how", ["another result", "NaN", "an exception"])
def test_a_backend_that_computes_something_else_is_wrong(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Any, x: Any, backend: str) -> tuple[torch.Tensor, ...]:
        if how == "an exception" and backend == "cpu":
            raise RuntimeError("illegal instruction\nsecond line")
        results = falsified(layer, x, backend)
        return (results[0] * float("nan"), results[1]) if how == "NaN" and backend == "cpu" else results

    monkeypatch.setattr(doctor, "_step", broken)
    told = finding("backend cpu")
    expected = {"another result": "differs from the reference by 1.0e-02", "NaN": "differs", "an exception": "illegal"}
    assert told.state == "wrong" and expected[how] in told.found and "second line" not in told.found
    assert not diagnose().is_healthy and finding("backend reference").state == "ok"


def test_more_threads_than_cores_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    told = doctor._threads()
    assert told.state == "wrong" and "set_num_threads" in told.remedy


def test_the_command_prints_json() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json"], catch_exceptions=False)
    data = json.loads(result.output)
    assert data["schema_version"] == 1 and result.exit_code == (0 if data["healthy"] else 1)
    assert [one["name"] for one in data["findings"]] == [one.name for one in diagnose().findings]
