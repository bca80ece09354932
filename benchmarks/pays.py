"""`CompileConfig(where="pays")` beside the dense model: training steps of single layers of many shapes.

A second copy of the dense layer runs along. Its difference from the first is the noise of the measurement.

python benchmarks/pays.py   # writes results/pays.json; takes some minutes
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import in_turns, processor
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase

RESULT = Path(__file__).parent / "results" / "pays.json"
LINEARS = [(t, i, o) for t in (1, 16, 128, 1024) for i, o in ((64, 64), (768, 3072), (1024, 1024), (3072, 768))]
CONVS = [
    (samples, channels, side, kernel, layout)
    for samples in (1, 8)
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    for kernel in (1, 3)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def layers() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield the name, the layer and the input of each row."""
    for tokens, inputs, outputs in LINEARS:
        yield f"linear {tokens} x {inputs} -> {outputs}", nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
    for samples, channels, side, kernel, layout in CONVS:
        name = f"conv {kernel}x{kernel} {samples} x {channels} x {side}²" + (
            ", last" if layout != torch.contiguous_format else ""
        )
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).to(memory_format=layout)  # type: ignore[call-overload]
        yield name, layer, torch.randn(samples, channels, side, side).contiguous(memory_format=layout)


def stepper(model: nn.Module, x: Tensor) -> Callable[[], object]:
    leaf = x.detach().requires_grad_()
    gradient = torch.ones_like(model(leaf))
    return lambda: torch.autograd.grad(model(leaf), [leaf, *model.parameters()], gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, layer, x in layers():
        models = {name: copy.deepcopy(nn.Sequential(layer)) for name in ("dense", "dense again", "pays")}
        config = CompileConfig(where="pays", ends="sparse")
        # With a gradient of the input, like a layer in the middle of a model.
        args = (x.detach().requires_grad_(),)
        models["pays"] = nmcompile.compile(models["pays"], "training", args=args, config=config)
        times = in_turns({key: stepper(model, x) for key, model in models.items()}, options.repeats)
        medians = {key: statistics.median(found) for key, found in times.items()}
        ratios = {key: medians["dense"] / medians[key] for key in ("pays", "dense again")}
        report = nmcompile.inspect(models["pays"])
        pruned = [phase.value for phase in Phase if report.layers[0].plan.is_pruned(phase)]
        share = report.pruned_share
        rows.append(
            {"layer": name, "milliseconds": medians, "speedup": ratios, "pruned": pruned, "pruned_share": share}
        )
        speed = f"{ratios['pays']:.2f} ({ratios['dense again']:.2f})"
        print(f"{name}: {speed}, pruned in {', '.join(pruned) or 'no phase'}, {share or 0.0:.0%} of the MACs")
    for key in ("pays", "dense again"):
        speeds = sorted(row["speedup"][key] for row in rows)
        print(
            f"{key}: {speeds[0]:.2f} at least, {statistics.median(speeds):.2f} in the middle, {speeds[-1]:.2f} at most"
        )
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    RESULT.write_text(json.dumps({**setting, "repeats": options.repeats, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
