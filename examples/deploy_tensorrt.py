"""Prune a trained network 2:4 and build a TensorRT engine from it, or the ONNX file for one.

    python examples/deploy_tensorrt.py --folder deployed

Without TensorRT or a GPU it writes the ONNX file, checked in ONNX Runtime, and says how to build the engine elsewhere.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import nmcompile
from nmcompile.backends.tensorrt import load_engine
from nmcompile.errors import BackendUnavailable


def network() -> nn.Module:
    """Return a network whose layers are wide enough for sparse tensor cores to pay."""
    return nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256)
    ).eval()  # fmt: skip


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(32, 256)
    folder.mkdir(parents=True, exist_ok=True)
    sparse = nmcompile.compile(model, mode="weights", args=(x,))
    print(nmcompile.export(sparse, folder / "model.onnx", args=(x,), target="tensorrt", precision="fp16"))
    print(nmcompile.verify(folder / "model.onnx"))
    try:
        report = nmcompile.export(sparse, folder / "model.engine", args=(x,), precision="fp16")
    except BackendUnavailable as reason:
        print(f"\nno engine was built: {reason}")
        print(f"where TensorRT is: trtexec --onnx={folder / 'model.onnx'} --sparsity=enable --saveEngine=model.engine")
        return
    print(report)
    engine = load_engine(folder / "model.engine")
    half = x.half().cuda()
    print(f"largest difference {(engine(half).float().cpu() - sparse(x)).abs().max().item():.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    main(parser.parse_args().folder)
