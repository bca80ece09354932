"""Which exported networks do TensorRT's parser and builder take? Needs TensorRT, but no GPU.

python benchmarks/tensorrt_plans.py   # writes benchmarks/results/tensorrt_plans.json
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crepe
import torch
from tabulate import tabulate
from torch import Tensor, nn
from vision import models

import nmcompile
from nmcompile.backends.tensorrt import find_tensorrt

VARIANTS = {
    "INT8 container": ("inference", {}),
    "fp32, 2:4": ("weights", {}),
    "fp16, 2:4": ("weights", {"precision": "fp16"}),
}


def network(name: str, size: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    """Return a network with random weights and measured norm statistics, without which activations would fade away."""

    def load() -> tuple[nn.Module, Tensor]:
        model = models.get_model(name, weights=None)
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(8, 3, size, size))
        return model.eval(), torch.randn(2, 3, size, size)

    return load


def vision_transformer() -> tuple[nn.Module, Tensor]:
    model = models.get_model("vit_b_16", weights=None)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros would make all outputs equal
    return model.eval(), torch.randn(2, 3, 224, 224)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "CREPE tiny": lambda: (crepe.load("tiny"), crepe.tones(4, 20, seed=1)[0]),
    "ResNet-18": network("resnet18", 64),
    "ResNet-50": network("resnet50", 64),
    "MobileNetV2": network("mobilenet_v2", 64),
    "ViT-B/16": vision_transformer,
}


def build(name: str, mode: str, options: dict[str, Any]) -> int:
    """Build a plan with an open batch size and return its size in bytes."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    calibration = [x] if mode == "inference" else None
    config = nmcompile.CompileConfig(outputs="int8")  # TensorRT wants integers on both sides
    compiled = nmcompile.compile(model, mode, args=(x,), config=config, calibration=calibration).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.engine"
        nmcompile.export(compiled, path, (x,), verify=False, **options)
        return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tensorrt_plans.json")
    options = parser.parse_args()
    plans = []
    for name in options.networks:
        for variant, (mode, extra) in VARIANTS.items():
            plans.append({"network": name, "variant": variant, "plan bytes": build(name, mode, extra)})
            print(plans[-1], flush=True)
    print(tabulate(plans, headers="keys"))
    versions = {"torch": torch.__version__, "tensorrt": find_tensorrt().__version__}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({**versions, "plans": plans}, indent=2) + "\n")


if __name__ == "__main__":
    main()
