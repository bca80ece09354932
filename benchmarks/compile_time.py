"""The time of `nmcompile.compile`, in turns with `torch.export.export` of the same model.

Kernels are measured later, in the first step. Masks are computed in the first forward; `masks` is their time.

python benchmarks/compile_time.py   # writes results/compile_time.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from timing import in_turns, processor
from torch import nn
from vision import models

import nmcompile
from nmcompile.training.find_masks import masks_of

MODELS = {"ResNet-18": models.resnet18, "ResNet-50": models.resnet50, "ViT-B/16": models.vit_b_16}
RESULT = Path(__file__).parent / "results" / "compile_time.json"


def seconds_for_masks(model: nn.Module) -> float:
    """Time the computation of all masks of a compiled model."""
    parameters = dict(model.named_parameters())
    start = time.perf_counter()
    for name, mask in masks_of(model).items():
        mask.current(parameters[name], None)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    args, rows = (torch.randn(2, 3, 224, 224),), []
    for name, make in MODELS.items():
        model = make()
        calls = {
            "torch.export": lambda model=model: torch.export.export(model, args),
            "compile": lambda model=model: nmcompile.compile(model, "training"),
            "compile with args": lambda model=model: nmcompile.compile(model, "training", args=args),
        }
        medians = {key: statistics.median(found) / 1e3 for key, found in in_turns(calls, options.repeats, 1).items()}
        masks = min(seconds_for_masks(nmcompile.compile(model, "training")) for _ in range(3))
        ratio = medians["compile"] / medians["torch.export"]
        rows.append({"model": name, "seconds": {**medians, "masks": masks}, "compile / torch.export": ratio})
        print(
            name,
            *(f"{key} {value:.2f} s" for key, value in rows[-1]["seconds"].items()),
            f"ratio {ratio:.2f}",
            sep="; ",
        )
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    RESULT.write_text(json.dumps({**setting, "repeats": options.repeats, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
