"""Peak memory of training steps, each variant in a process of its own.

Measures the largest resident set, less what the process held before the model was made. It runs once with glibc's
default settings, which keep freed blocks of up to 32 MiB and so include fragmentation, and once with every freed block
of a tensor returned to the system, which counts live memory only.

python benchmarks/memory.py   # writes results/memory.json
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from gradients import check_finite
from timing import cpu_setting
from vision import models

import nmcompile

VARIANTS = ("dense", "training", "t-weights", "gradients")
STEPS = 3
ALLOCATORS = {
    "blocks returned": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "glibc's defaults": {},
}
RESULT = Path(__file__).parent / "results" / "memory.json"


def peak(variant: str, batch: int) -> int:
    """Return the bytes that training takes in this process."""
    nmcompile.compile(torch.nn.Linear(8, 8), "training")  # loads the code, which is not counted as memory of training
    torch.nn.Linear(8, 8)(torch.randn(2, 8)).sum().backward()
    before = _resident()
    torch.manual_seed(0)
    model = models.resnet18()
    if variant != "dense":
        model = nmcompile.compile(model, variant, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(torch.randn(batch, 3, 224, 224)), torch.randint(1000, (batch,))
        ).backward()
        optimizer.step()
    check_finite({variant: model})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def peak_elsewhere(variant: str, batch: int, environment: dict[str, str]) -> int:
    """Return the bytes that training takes in a new process."""
    command = [sys.executable, __file__, "--variant", variant, "--batch", str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return int(done.stdout)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one here and print its bytes")
    options = parser.parse_args()
    if options.variant:
        print(peak(options.variant, options.batch))
        return
    rows = []
    for name, environment in ALLOCATORS.items():
        found: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeats):
            for variant in VARIANTS:
                found[variant].append(peak_elsewhere(variant, options.batch, environment))
        medians = {variant: statistics.median(bytes_) for variant, bytes_ in found.items()}
        ratios = {variant: value / medians["dense"] for variant, value in medians.items()}
        print(
            name,
            *(f"{key} {medians[key] / 2**20:.0f} MiB ({ratios[key]:.3f})" for key in VARIANTS),
            sep="; ",
            flush=True,
        )
        workload = f"ResNet-18, batch {options.batch}, SGD with momentum"
        rows.append({"workload": workload, "allocator": name, "bytes": medians, "of dense": ratios})
    setting = {"command": sys.argv, **cpu_setting()}
    RESULT.write_text(json.dumps({**setting, "repeats": options.repeats, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
