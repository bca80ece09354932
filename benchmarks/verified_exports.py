"""Do ONNX Runtime and ONNX's own evaluator compute what the compiled module computes?

The table has networks, targets and containers. CREPE is a trained network; the others have random weights and matching
norm statistics.

python benchmarks/verified_exports.py   # writes benchmarks/results/verified_exports.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import crepe
import onnx
import onnxruntime
import tensorrt_plans
import torch
from tabulate import tabulate
from torch import Tensor, nn

import nmcompile
from nmcompile.errors import ExportError

NETWORKS = tensorrt_plans.NETWORKS | {"CREPE full": lambda: (crepe.load("full"), crepe.tones(4, 20, seed=1)[0])}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "4-bit for ONNX Runtime": ("inference", {}, {}),
    "4-bit for ONNX Runtime, INT4 container": ("inference", {}, {"container": "int4"}),
    "4-bit for ONNX Runtime, 8-bit results": ("inference", {"outputs": "int8"}, {}),
    "4-bit for TensorRT": ("inference", {}, {"target": "tensorrt"}),
    "4-bit for TensorRT, 8-bit results": ("inference", {"outputs": "int8"}, {"target": "tensorrt"}),
    "fp32, 2:4": ("weights", {}, {}),
    "fp16, 2:4": ("weights", {}, {"precision": "fp16"}),
}


def verify(model: nn.Module, x: Tensor, variant: str) -> dict[str, Any]:
    mode, options, export_options = VARIANTS[variant]
    config = nmcompile.CompileConfig(**options)
    calibration = [x] if mode == "inference" else None
    compiled = nmcompile.compile(model, mode, args=(x,), config=config, calibration=calibration).eval()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = nmcompile.export(compiled, Path(folder) / "model.onnx", (x,), verify=True, **export_options)
        except ExportError as error:
            return {"agrees": False, "error": str(error)}
    found = report.verification
    steps = [check.most_steps for check in found.layers if check.is_quantized]
    checks = {
        check.runtime: {"relative L2": check.relative_l2, "same top-1": check.same_top1, "taken over": check.taken_over}
        for check in found.runtimes
    }
    return {"agrees": True, "layers": len(found.layers), "most steps": max(steps, default=None), **checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verified_exports.json")
    options = parser.parse_args()
    rows = []
    for name in options.networks:
        torch.manual_seed(0)
        model, x = NETWORKS[name]()
        for variant in VARIANTS:
            rows.append({"network": name, "variant": variant, **verify(model, x, variant)})
            print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys"))
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({**versions, "exports": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
