"""The stages of `gpu_all.py`: first whether everything is right, then kernels, products and steps.

Expected speed-ups are the time of a dense step over that of a sparse one.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages import Expected, Stage

HERE = Path(__file__).parent
PARALLEL = ("-n", "8") if find_spec("xdist") else ()
BITS = "bfloat16 or tiles or lines or images"  # names of tests
SAMPLES = "MVUE 2:4, along samples, channels last"
BOTH = "masked and packed for cuSPARSELt, both directions"
GRAPHED = "milliseconds", "training, graphed"

Find = Callable[[Any], float]


def tests(name: str, seconds: float, arguments: str, *selection: str) -> Stage:
    """Return a stage of tests that run on the GPU, by several processes where pytest-xdist is installed."""
    command = sys.executable, "-m", "pytest", "-q", "-m", "gpu", *PARALLEL, *arguments.split(), *selection
    return Stage(name, command, seconds)


def benchmark(name: str, seconds: float, command: str, *expected: Expected) -> Stage:
    """Return a stage of a script beside this one."""
    script, *arguments = command.split()
    return Stage(name, (sys.executable, str(HERE / script), *arguments, "--out", "{out}"), seconds, expected)


def step(name: str, seconds: float, options: str, *expected: Expected) -> Stage:
    """Return a stage of one workload of `gpu_training_step.py`."""
    return benchmark(name, seconds, f"gpu_training_step.py --repeats 5 {options}", *expected)


def copies(tensor: str, call: str) -> Find:
    """Return how many copies of a tensor a call of `gpu_pruning.py` takes as long as."""
    return lambda content: float(next(row["copies"] for row in content["results"] if row["tensor"] == tensor)[call])


def figure(*keys: str) -> Find:
    """Return a figure of the first result."""

    def find(content: Any) -> float:
        for key in ("results", 0, *keys):
            content = content[key]
        return float(content)

    return find


def speedup(clock: str, variant: str, over: str = "dense") -> Find:
    """Return a speed-up by "milliseconds", in which the GPU may wait for Python, or by "busy", in which it does not."""
    return ratio((clock, over), (clock, variant))


def ratio(over: tuple[str, str], under: tuple[str, str]) -> Find:
    return lambda content: figure(*over)(content) / figure(*under)(content)


STAGES = (
    tests("bits", 80, "tests/backends/test_triton.py tests/backends/test_triton_channels_last.py", "-k", BITS),
    tests("library", 45, "tests/backends/test_cusparselt_gpu.py"),
    benchmark(
        "pruning",
        40,
        "gpu_pruning.py --repeats 10",
        Expected("channels last, 2:4 along samples, in copies", copies("images", SAMPLES), high=2.0),
        Expected("the same by the old kernel, in copies", copies("images", f"{SAMPLES}, by number"), low=9.0),
        Expected("1:2 of a gradient, in copies", copies("gradient", "MVUE 1:2, dense"), high=1.4),
        Expected("2:4 of a gradient, packed, in copies", copies("gradient", "MVUE 2:4, packed"), high=1.7),
        Expected("a weight in both directions, in copies", copies("weight", BOTH), high=1.6),
    ),
    benchmark(
        "depth",
        25,
        "gpu_depth.py",
        Expected("13008 tokens, unpadded over padded", figure("padded over unpadded"), low=1.0),
    ),
    benchmark("gemm", 60, "gpu_gemm.py --repeats 7 --tokens 2048 16384"),
    step(
        "mlp",
        35,
        "--workloads 1 --compiled",
        Expected("MLP 4096-14336-4096", speedup("milliseconds", "training"), low=1.40),
        Expected("the same, GPU alone", speedup("busy", "training"), 1.40, 1.48),
    ),
    step(
        "vit-mlp",
        25,
        "--workloads 0 --compiled",
        Expected("MLP of ViT-L, 13008 tokens", speedup("milliseconds", "training"), low=1.0),
        Expected("the same, GPU alone", speedup("busy", "training"), 1.0, 1.06),
    ),
    step(
        "llama",
        50,
        "--workloads 4 --compiled --variants dense training",
        Expected("four blocks of Llama 3 8B", speedup("milliseconds", "training"), 1.2, 1.35),
    ),
    step(
        "vit",
        60,
        "--workloads 2 --compiled --variants dense training",
        Expected("ViT-L", speedup("milliseconds", "training"), 1.10, 1.20),
        Expected("the same, GPU alone", speedup("busy", "training"), 1.14, 1.18),
    ),
    step(
        "resnet",
        60,
        "--workloads 3 --compiled --variants dense training pays",
        Expected("ResNet-50, GPU alone, ms", figure("busy", "training"), high=59.5),
        Expected("ResNet-50, GPU alone", speedup("busy", "training"), 0.88, 0.95),
        Expected('ResNet-50, where="pays"', speedup("milliseconds", "pays"), low=0.99),
    ),
    step(
        "resnet-graphed",
        45,
        "--workloads 3 --compiled --variants dense training --graphed training",
        Expected("ResNet-50 as a CUDA graph, over dense, GPU alone", ratio(("busy", "dense"), GRAPHED), 0.88, 0.95),
        Expected("its time over that of its kernels", ratio(GRAPHED, ("busy", "training")), high=1.05),
    ),
    step(
        "vit-compiled",
        90,
        "--workloads 2 --variants dense training --compiled dense training",
        Expected(
            "ViT-L under torch.compile",
            speedup("milliseconds", "training, torch.compile", "dense, torch.compile"),
            1.05,
            1.12,
        ),
    ),
)
