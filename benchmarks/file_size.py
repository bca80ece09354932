"""The size of exported ResNet-18 files (1000 classes), relative to the dense fp32 file and to INT8 weights.

python benchmarks/file_size.py        # writes benchmarks/results/file_size.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import onnx
import torch
from tabulate import tabulate
from vision import models

import nmcompile
from nmcompile import CompileConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "file_size.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    x = torch.randn(2, 3, 224, 224)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        dense = nmcompile.export(nmcompile.compile(model, "dense", args=(x,)).eval(), path, (x,), verify=False)
        rows.append(["dense", "fp32", "dense", dense.onnx.bytes, 1.0, None])
        for ends in ("dense", "int8"):
            config = CompileConfig(ends=ends)
            compiled = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=[x]).eval()
            int8, int4 = (
                nmcompile.export(compiled, path, (x,), container=container, verify=False).onnx.bytes
                for container in ("int8", "int4")
            )
            for container, size in (("int8", int8), ("int4", int4)):
                rows.append(["2:4, 4-bit", container, ends, size, size / dense.onnx.bytes, size / int8])
    headers = ["weights", "container", "ends", "bytes", "of dense fp32", "of INT8"]
    print(tabulate(rows, headers=headers, floatfmt=".3f"))
    versions = {"torch": torch.__version__, "onnx": onnx.__version__}
    options.out.parent.mkdir(exist_ok=True)
    results = [dict(zip(headers, row, strict=True)) for row in rows]
    options.out.write_text(
        json.dumps({"model": "ResNet-18, 1000 classes", **versions, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
