"""`doctor`: what of this package works on this machine, and how to get what does not."""

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from nmcompile.api.choose_backends import ACCELERATED
from nmcompile.api.compile import compile as compile_model
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.tensorrt.installed import tensorrt_support
from nmcompile.config import CompileConfig
from nmcompile.ir.protocols import Backend, Support
from nmcompile.native import INSTRUCTION_SETS
from nmcompile.printable import first_line, printable, table

SCHEMA_VERSION = 1
NEEDED = ("nmcompile", "torch", "numpy", "onnx", "onnxruntime")
OPTIONAL = ("triton", "tensorrt", "transformers", "lightning", "tensorboard")
OK, WRONG, ABSENT = "ok", "wrong", "absent"
REMEDIES = {
    "cpu": "install a C++20 compiler and run `pip install --force-reinstall --no-deps .` without NMCOMPILE_PURE",
    "triton": "`pip install triton` beside a PyTorch with CUDA, on an NVIDIA GPU of compute capability 8.0 or newer",
    "cusparselt": "a PyTorch with CUDA (`pip install torch`, on Linux), on an NVIDIA GPU of capability 8.0 or newer",
    "tensorrt": "`pip install tensorrt`, on a machine with an NVIDIA GPU",
}
"""How to get a backend that is not available."""
TOLERANCE = 1e-4
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: of the package, the backend or the hardware.
        state: `"ok"`; `"wrong"` if it ought to work here and does not; `"absent"` if nothing needs it here.
        found: its version or its reason.
        remedy: what to do; empty if it is ok.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The findings on a machine; healthy if nothing is wrong."""

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Return whether everything works that ought to."""
        return all(one.state != WRONG for one in self.findings)

    def __str__(self) -> str:
        rows = [[one.name, one.state, one.found] for one in self.findings]
        shown = table(rows, ["", "state", "found"], maxcolwidths=[None, None, 70])
        remedies = [f"{printable(one.name)}: {one.remedy}" for one in self.findings if one.remedy]
        verdict = "Everything works that can work here." if self.is_healthy else "Something is wrong: see above."
        told = "\n".join(["How to get what is missing:", *remedies, ""]) if remedies else ""
        return f"{shown}\n\n{told}{verdict}"

    def to_json(self) -> str:
        """Return versioned JSON."""
        findings = [asdict(one) for one in self.findings]
        return json.dumps(
            {"schema_version": SCHEMA_VERSION, "healthy": self.is_healthy, "findings": findings}, indent=2
        )


def diagnose() -> Diagnosis:
    """Look at versions, hardware and backends, and run a small layer on each backend that is available."""
    return Diagnosis((*_packages(), *_hardware(), *_backends()))


def _packages() -> Iterator[Finding]:
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Finding(name, OK, version(name))
        except PackageNotFoundError:
            if importlib.util.find_spec(name) is not None:
                yield Finding(
                    name, OK, str(getattr(sys.modules.get(name), "__version__", "a version that is not known"))
                )
            elif name in NEEDED:
                yield Finding(name, WRONG, "not installed", f"`pip install {name}`")
            else:
                yield Finding(name, ABSENT, "not installed")


def _hardware() -> Iterator[Finding]:
    yield Finding("processor", OK, f"{_processor()}; instruction sets: {', '.join(INSTRUCTION_SETS) or 'not known'}")
    yield _threads()
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield Finding("CUDA", OK, f"{torch.version.cuda}, {torch.cuda.get_device_name()}, capability {capability}")
    else:
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a PyTorch without CUDA"
        yield Finding("CUDA", ABSENT, f"not available ({built}); everything runs on the CPU")


def _processor() -> str:
    """Return the name of the processor and those of its features that matter to kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return ", ".join([name, *(flag for flag in FEATURES if flag in fields.get("flags", "").split())])


def _threads() -> Finding:
    """Compare PyTorch's threads with the cores that this process may use."""
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{threads} of PyTorch on {cores} cores"
    if threads > cores:
        return Finding(
            "threads", WRONG, found, f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores}: they wait"
        )
    return Finding("threads", OK, found)


def _backends() -> Iterator[Finding]:
    for backend in (ReferenceBackend(), *ACCELERATED):
        support = backend.available()
        if support.ok:
            support = _tried(backend, support)
            state = OK if support.ok else WRONG
        else:
            state = WRONG if _ought_to_work(backend) else ABSENT
        yield Finding(f"backend {backend.name}", state, support.reason, "" if support.ok else REMEDIES[backend.name])
    engine = tensorrt_support()
    state = OK if engine.ok else ABSENT
    yield Finding("engines by TensorRT", state, engine.reason, "" if engine.ok else REMEDIES["tensorrt"])


def _ought_to_work(backend: Backend) -> bool:
    """Return whether this machine has the hardware of a backend that is not available."""
    if backend.name == "cpu":
        return platform.machine() in ("x86_64", "AMD64")
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def _tried(backend: Backend, support: Support) -> Support:
    """Return whether a pruned layer gives the same on a backend as on the reference."""
    device = "cpu" if backend.name in ("cpu", "reference") or not torch.cuda.is_available() else "cuda"
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            layer, x = nn.Linear(64, 64).to(device), torch.randn(64, 64, device=device)
            found, expected = (_step(layer, x, one) for one in (backend.name, "reference"))
    except Exception as error:  # whatever a broken installation raises
        return Support(False, f"{support.reason}; but a layer of 64 x 64 fails: {first_line(error)}")
    off = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    if not off <= TOLERANCE:
        return Support(False, f"{support.reason}; but a layer of 64 x 64 differs from the reference by {off:.1e}")
    return support


def _step(layer: nn.Module, x: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """Return the output and the weight's gradient of a masked layer."""
    config = CompileConfig(ends="sparse")
    compiled = compile_model(nn.Sequential(layer), "t-weights", config=config, backend=backend)
    output = compiled(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), [compiled.get_parameter("0.weight")])
    return output.detach(), gradient / gradient.abs().max()
